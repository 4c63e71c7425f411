"""The checkpoints of a run: whole or not there, verified when they are read, the damaged ones passed over."""

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax

from flax_qformer.checkpoints.atomic import check_space
from flax_qformer.errors import InputError
from flax_qformer.parallel.processes import any_process, from_first, is_first, tells_of_lost_process, wait_for_all

logger = logging.getLogger(__name__)


class Checkpoints:
    """A folder with a folder of orbax's for each step, and beside it a JSON file that says what is in it.

    The JSON file comes last: without it a checkpoint does not count. It lists the files with their sizes and sums, and
    holds what is not an array, such as the position in the data; it has a sum of its own.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder.absolute(), keep  # orbax wants it so

    def steps(self) -> list[int]:
        """Those that were written whole, the newest first."""
        found = (path.stem for path in self._folder.glob("*.json"))
        return sorted((int(stem) for stem in found if stem.isdecimal()), reverse=True)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Write a state unless it is there, and remove what is older than the newest `keep`.

        Raises:
          InputError: it cannot be written; what was saved before stays.
        """
        import orbax.checkpoint.experimental.v1 as ocp

        # Not all processes may see yet what the first has written.
        if any_process(is_first() and step in self.steps()):
            return
        folder, arrays = self._path(step), _named(state)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            check_space(self._folder, sum(array.nbytes for array in arrays.values()))
            context = ocp.Context()
            context.array.saving.use_compression = False
            with context:
                ocp.save(folder, arrays)
            if is_first():
                content = {"arrays": _forms(state), "files": _sums(folder), "notes": notes}
                partial = self._folder / f"{step}.json.partial"
                partial.write_text(json.dumps({"sum": _sum_of(content), "content": content}))
                partial.rename(self._folder / f"{step}.json")
        except Exception as error:
            if tells_of_lost_process(error):
                raise
            # orbax reports a disk that fills up meanwhile in types of its own.
            if is_first():
                shutil.rmtree(folder, ignore_errors=True)
            saved = self.steps()
            raise InputError(
                f"the checkpoint of step {step} cannot be written to {self._folder} "
                f"({getattr(error, 'strerror', None) or error}); see that the folder can be written and has space, and "
                "run the same command again" + (f", which goes on from step {saved[0]}" if saved else "")
            ) from None
        if is_first():
            for old in self.steps()[self._keep :]:
                self._remove(old)
        wait_for_all("saved")

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state that is whole, placed like `state`, and its notes; None if none was saved.

        Raises:
          InputError: all are damaged, or hold the state of another model.
        """
        # Processes may see a shared disk differently; they go on from the same step, or not at all.
        steps = [int(step) for step in from_first(" ".join(map(str, self.steps()))).split()]
        for step in steps:
            reason = self._damage(step)
            if not any_process(bool(reason)):
                found = None
                try:
                    found = self._load(step, state)
                except InputError:
                    raise
                except Exception as error:
                    if tells_of_lost_process(error):
                        raise
                    reason = " ".join(str(error).split())
                if not any_process(found is None):
                    return found
            reason = reason or "another process cannot read it"
            logger.warning("the checkpoint of step %d is damaged (%s): trying the one before", step, reason)
        if steps:
            raise InputError(f"all checkpoints in {self._folder} are damaged; start anew with `overwrite=True`")
        return None

    def notes(self) -> dict[str, Any]:
        """Those of the newest checkpoint whose JSON file can be read, or none."""
        for step in self.steps():
            try:
                return self._manifest(step)["notes"]
            except ValueError:
                continue
        return {}

    def tidy(self, step: int) -> None:
        """Remove what is newer than the step to go on from, which was damaged, and what was never finished."""
        if not is_first():
            return
        whole = {name for kept in self.steps() if kept <= step for name in (str(kept), f"{kept}.json")}
        for path in self._folder.glob("*"):
            if path.name in whole:
                continue
            if path.is_dir():
                logger.warning("removing %s, which is damaged or was not written whole", path)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._folder / str(step)

    def _remove(self, step: int) -> None:
        (self._folder / f"{step}.json").unlink(missing_ok=True)
        shutil.rmtree(self._path(step), ignore_errors=True)

    def _manifest(self, step: int) -> dict[str, Any]:
        """What the JSON file says; ValueError if it is damaged."""
        try:
            manifest = json.loads((self._folder / f"{step}.json").read_bytes())
            content, expected = manifest["content"], manifest["sum"]
        except (ValueError, TypeError, KeyError):
            content, expected = {}, None
        if _sum_of(content) != expected:
            raise ValueError(f"{step}.json is not as it was written")
        return content

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint's files, if anything; the first process reads all bytes for all."""
        try:
            files = self._manifest(step)["files"]
            found = _sums(self._path(step)) if is_first() else files
        except (ValueError, OSError) as error:
            return str(error)
        wrong = sorted(name for name in files | found if files.get(name) != found.get(name))
        return f"{wrong[0]} is {'not as it was written' if wrong[0] in found else 'missing'}" if wrong else ""

    def _load(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint.experimental.v1 as ocp

        manifest = self._manifest(step)
        was, now = manifest["arrays"], _forms(state)
        # Earlier versions saved no frozen parameters that the losses do not read: these are as the model has them.
        now = {name: form for name, form in now.items() if name in was or not name.startswith("frozen.")}
        other = sorted(name for name in was | now if _differ(name, was.get(name), now.get(name)))
        if other:
            name = other[0]
            raise InputError(
                f"the run is of another model: {name} was {was.get(name, 'absent')} and is now "
                f"{now.get(name, 'absent')}; name the model it began with, or another `output`"
            )
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _named(state).items()
            if name in now
        }
        arrays = _named(state) | ocp.load(self._path(step), wanted)
        return jax.tree.unflatten(jax.tree.structure(state), arrays.values()), manifest["notes"]


def _named(state: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _forms(state: Any) -> dict[str, str]:
    """Type and shape of each array, as in float32[8, 16]."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(state).items()}


def _differ(name: str, was: str | None, now: str | None) -> bool:
    """Whether a saved array cannot become one of the state. Earlier versions saved frozen ones as float32."""
    if was and now and name.startswith("frozen."):
        return was.partition("[")[2] != now.partition("[")[2]
    return was != now


def _sum_of(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _sums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        sums[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return sums
