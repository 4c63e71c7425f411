"""The folder of a run: check it, lock it, write its settings.yaml."""

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_qformer.checkpoints.atomic import new_file, writing
from flax_qformer.errors import InputError
from flax_qformer.training.metrics import FOLDERS, METRICS
from flax_qformer.training.run_checkpoints import Checkpoints
from flax_qformer.training.settings import TrainSettings, check_resumable, differences, to_yaml

logger = logging.getLogger(__name__)

SETTINGS = "settings.yaml"


def check_output(output: Path, checkpoints: Checkpoints, settings: TrainSettings) -> None:
    """Check that the run's folder can be created, or that the run in it can be resumed.

    Raises:
      InputError: the folder cannot be used, holds something other than a run, or holds a run with other settings; or
        overwriting it would remove the model or the data.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder; name another `output`")
    with writing(output, "another `output`"):
        visible = [path for path in output.iterdir() if path.name[0] != "."] if output.is_dir() else []
        if visible and not (output / SETTINGS).is_file():
            raise InputError(f"{output} holds something other than a run; name another `output`")
        if not settings.overwrite:
            check_resumable(checkpoints.notes().get("settings", {}), settings)
            return
        for name, source in (("`model`", settings.model), ("`data`", settings.data)):
            if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
                raise InputError(
                    f"{name} {source} is inside the run that `overwrite=True` removes; name another `output`"
                )


@contextlib.contextmanager
def locked_folder(output: Path, overwrite: bool) -> Iterator[None]:
    """Create the run's folder, and lock it for this program until the block ends.

    Args:
      output: the folder.
      overwrite: remove the run that it holds.

    Raises:
      InputError: another program holds the lock, or the folder cannot be created.
    """
    with writing(output, "another `output`"):
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another program trains in {output}; wait until it ends, or name another `output`"
            ) from None
        except OSError:
            logger.warning("%s is on a disk without locks: do not let two programs train in it", output)
        if overwrite:
            for name in ("checkpoints", *FOLDERS, "model"):
                shutil.rmtree(output / name, ignore_errors=True)
            (output / METRICS).unlink(missing_ok=True)
        yield


def log_resumption(done: int, saved: Mapping[str, Any], settings: TrainSettings) -> None:
    """Log the step from which a run resumes, and the settings that differ from the saved ones."""
    if done >= settings.steps:
        logger.warning("the run has %d steps already; to train longer, raise `steps` above that", done)
    elif saved:
        changes = differences(saved, settings)
        message = "; ".join([f"resuming from step {done}", *changes])
        logger.log(logging.WARNING if changes else logging.INFO, "%s", message)


def write_settings(output: Path, settings: TrainSettings) -> None:
    with new_file(output / SETTINGS) as file:
        file.write(to_yaml(settings).encode())
