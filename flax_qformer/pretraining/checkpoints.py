"""The checkpoints of a run: whole or not there, verified when they are read, the damaged ones passed over."""

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax

from flax_qformer.errors import InputError
from flax_qformer.writing import check_space

logger = logging.getLogger(__name__)


class Checkpoints:
    """A folder with a folder of orbax's for each step, and beside it a JSON file that says what is in it.

    The JSON file comes last: without it a checkpoint does not count. It lists the files with their sizes and sums, and
    holds what is not an array, such as the position in the data.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """Those that were written whole, the newest first."""
        found = (path.stem for path in self._folder.glob("*.json"))
        return sorted((int(stem) for stem in found if stem.isdecimal()), reverse=True)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Write a state, and remove what is older than the newest `keep`.

        Raises:
          InputError: there is no space; what was saved before stays.
        """
        import orbax.checkpoint.experimental.v1 as ocp

        folder, arrays = self._path(step), _named(state)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            check_space(self._folder, sum(array.nbytes for array in arrays.values()))
            context = ocp.Context()
            context.array.saving.use_compression = False
            with context:
                ocp.save(folder, arrays)
            manifest = {"step": step, "notes": notes, "files": _sums(folder)}
            partial = self._folder / f"{step}.json.partial"
            partial.write_text(json.dumps(manifest))
            partial.rename(self._folder / f"{step}.json")
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(
                f"the checkpoint of step {step} cannot be written to {self._folder} ({error.strerror or error}); free "
                f"space and run the same command again{self._saved()}"
            ) from None
        for old in self.steps()[self._keep :]:
            self._remove(old)

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state that is whole, placed like `state`, and its notes; None if none was saved.

        Raises:
          InputError: all are damaged.
        """
        steps = self.steps()
        for step in steps:
            try:
                return self._read(step, state)
            except Exception as error:
                logger.warning("the checkpoint of step %d is damaged (%s): trying the one before", step, error)
        if steps:
            raise InputError(f"all checkpoints in {self._folder} are damaged; start anew with --overwrite")
        return None

    def notes(self) -> dict[str, Any] | None:
        """Those of the newest checkpoint whose JSON file can be read."""
        for step in self.steps():
            try:
                return json.loads((self._folder / f"{step}.json").read_text())["notes"]
            except (ValueError, KeyError):
                continue
        return None

    def remove_after(self, step: int) -> None:
        """Remove what is newer than a step: it was damaged, and the run goes on from before it."""
        for newer in self.steps():
            if newer > step:
                self._remove(newer)

    def _saved(self) -> str:
        steps = self.steps()
        return f"; the last good one is of step {steps[0]}" if steps else ""

    def _path(self, step: int) -> Path:
        return self._folder / str(step)

    def _remove(self, step: int) -> None:
        (self._folder / f"{step}.json").unlink(missing_ok=True)
        shutil.rmtree(self._path(step), ignore_errors=True)

    def _read(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint.experimental.v1 as ocp

        manifest = json.loads((self._folder / f"{step}.json").read_text())
        found = _sums(self._path(step))
        wrong = sorted(name for name in manifest["files"] | found if manifest["files"].get(name) != found.get(name))
        if wrong:
            raise ValueError(f"{wrong[0]} is not as it was written")
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _named(state).items()
        }
        loaded = ocp.load(self._path(step), wanted)
        return jax.tree.unflatten(jax.tree.structure(state), [loaded[name] for name in wanted]), manifest["notes"]


def _named(state: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


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
