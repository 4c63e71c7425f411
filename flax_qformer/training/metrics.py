"""Write a run's metrics and samples to `metrics.jsonl`, TensorBoard and Weights & Biases."""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from flax_qformer.checkpoints.atomic import check_space, new_file
from flax_qformer.errors import InputError, first_line
from flax_qformer.parallel.processes import is_first, wait_for_all

METRICS = "metrics.jsonl"
FOLDERS = ("tensorboard", "wandb")
"""Subfolders of a run's folder that reporters write."""

ReportTo: TypeAlias = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class Samples:
    """Outputs of a model for a few examples.

    Attributes:
      captions: the true caption and the model's caption of each example.
      pictures: (height, width, 3) uint8, by name.
    """

    captions: list[tuple[str, str]]
    pictures: dict[str, np.ndarray]


class Reporter(Protocol):
    """Sends metrics and samples to a program that shows them. A resumed run continues the earlier record."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def show(self, step: int, samples: Samples) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Write TensorBoard's files in `tensorboard`. A resumed run discards entries of later steps."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        # Its thread writes the entries; `flush` does not wait for that thread.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=0.1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, samples: Samples) -> None:
        rows = [("", "true caption", "written caption"), ("---",) * 3]
        rows += [(str(number), *pair) for number, pair in enumerate(samples.captions)]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        self._writer.add_text("samples/captions", table, step)
        for name, picture in samples.pictures.items():
            self._writer.add_image(f"samples/{name}", picture, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; the file `wandb/run_id` holds its id.

    The step is logged as a metric. W&B's own step cannot decrease, so W&B would drop an evaluation of the step from
    which a run resumes.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        id_file = folder / "wandb" / "run_id"
        if not id_file.exists():
            with new_file(id_file) as file:
                file.write(uuid.uuid4().hex[:8].encode())
        self._wandb: Any = importlib.import_module("wandb")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "flax_qformer"),
                id=id_file.read_text(),
                resume="allow",
                dir=str(folder),
                name=folder.resolve().name,
                config=dict(settings),
                # W&B's copy of standard output would contain each update of the progress bar.
                settings=self._wandb.Settings(
                    console="off", silent=not logging.getLogger(__name__).isEnabledFor(logging.INFO)
                ),
            )
        except self._wandb.Error as error:
            raise InputError(
                f"Weights & Biases cannot start the run ({first_line(error)}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave wandb out of `report_to`"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def show(self, step: int, samples: Samples) -> None:
        pictures = {f"samples/{name}": self._wandb.Image(picture) for name, picture in samples.pictures.items()}
        captions = self._wandb.Table(columns=["true caption", "written caption"], data=samples.captions)
        self._run.log({"step": step, "samples/captions": captions, **pictures})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


REPORTERS: dict[ReportTo, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_reporters(report_to: Sequence[ReportTo]) -> None:
    """Raise InputError if Weights & Biases is named but not installed."""
    # A folder `wandb`, which wandb makes where it runs, looks to Python like a package without a file.
    spec = importlib.util.find_spec("wandb") if "wandb" in report_to else None
    if "wandb" in report_to and (spec is None or spec.origin is None):
        raise InputError("`report_to` names wandb, which is not installed; run pip install 'flax-qformer[wandb]'")


class MetricsLogger:
    """Writes each record to a line of `metrics.jsonl` and to the reporters. Only the first process writes."""

    def __init__(self, folder: Path, step: int, report_to: Sequence[ReportTo], settings: Mapping[str, Any]) -> None:
        """Open after a step. Lines of later steps are removed, because the resumed run writes them again.

        Args:
          folder: the run's folder.
          step: the last finished step.
          report_to: names of `REPORTERS`.
          settings: the run's settings, for the reporters.
        """
        self._folder, self._path = folder, folder / METRICS
        self._last: dict[str, float] = {}
        self._evaluated: set[int] = set()
        kept = []
        for line in self._path.read_text(errors="replace").splitlines() if self._path.exists() else ():
            # If the run was killed, the last line may be incomplete.
            with contextlib.suppress(ValueError):
                figures = json.loads(line)
                if figures["step"] <= step:
                    kept.append(line + "\n")
                    self._note(**figures)
        wait_for_all("read")
        if is_first():
            with new_file(self._path) as file:
                file.write("".join(kept).encode())
        self._reporters: list[Reporter] = [
            REPORTERS[name](folder, step, settings) for name in dict.fromkeys(report_to) if is_first()
        ]

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for reporter in self._reporters:
            reporter.close(failed=kind is not None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._note(step, **figures)
        if not is_first():
            return
        with self._writing():
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            for reporter in self._reporters:
                reporter.write(step, figures)

    def show(self, step: int, samples: Samples) -> None:
        with self._writing():
            for reporter in self._reporters:
                reporter.show(step, samples)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            # On a full disk, TensorBoard's writer thread would end with a traceback.
            check_space(self._folder, 0)
            yield
        except OSError as error:
            raise InputError(
                f"cannot write {self._path} ({error.strerror}); free space and run the same command again"
            ) from None

    def is_evaluated(self, step: int) -> bool:
        return step in self._evaluated

    def last(self) -> str:
        """The figures written last, one a line."""
        return "".join(f"\n  {name}: {value:g}" for name, value in self._last.items())

    def _note(self, step: int, **figures: float) -> None:
        self._last = figures
        if "images" in figures:
            self._evaluated.add(step)
