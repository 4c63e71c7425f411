"""The checkpoints of a run: written by orbax, verified when they are read; damaged ones are skipped."""

import json
import logging
import shutil
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from flax_qformer.checkpoints.atomic import check_space
from flax_qformer.errors import InputError
from flax_qformer.parallel.processes import any_process, from_first, is_first, is_lost_process_error, wait_for_all

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
"""The file of a checkpoint with the sizes and checksums of its other files."""


class Checkpoints:
    """The checkpoints of a run, in the folder of orbax's `Checkpointer`, which writes and removes whole steps.

    Orbax's metadata of a step holds a manifest: the dtypes and shapes of the arrays, the notes (all that is not an
    array, such as the position in the data), and a checksum of both. The checksums of the files are written after the
    step is complete; a step that a kill left without them is restored only if no other can be.
    Earlier versions wrote both into `STEP.json`, beside the step and after it; there a step without it is incomplete.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder.absolute(), keep  # orbax needs an absolute path

    @cached_property
    def _checkpointer(self) -> Any:
        # Made at the first save: it creates the folder and lists its checkpoints.
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.array.saving.use_compression = False
        return ocp.training.Checkpointer(
            self._folder,
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, newest first."""
        return sorted((int(path.name) for path in self._folder.glob("*") if path.name.isdecimal()), reverse=True)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Write a checkpoint unless the step has one, and keep the newest `keep` only.

        Raises:
          InputError: the checkpoint cannot be written; earlier ones stay.
        """
        # On a shared disk, other processes may not see the checkpoint yet.
        if any_process(is_first() and step in self.steps()):
            return
        arrays = _named(state)
        content = {"arrays": _array_types(state), "notes": notes}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            check_space(self._folder, sum(array.nbytes for array in arrays.values()))
            manifest = {"sum": _checksum(content), "content": content}
            self._checkpointer.save(step, arrays, force=True, custom_metadata=manifest)
            if is_first():
                folder = self._folder / str(step)
                partial = folder / f"{CHECKSUMS}.partial"
                partial.write_text(json.dumps(_file_checksums(folder)))
                partial.rename(folder / CHECKSUMS)
        except Exception as error:
            if is_lost_process_error(error):
                raise
            # orbax raises types of its own when the disk becomes full.
            saved = self.steps()
            raise InputError(
                f"the checkpoint of step {step} cannot be written to {self._folder} "
                f"({getattr(error, 'strerror', None) or error}); see that the folder can be written and has space, and "
                "run the same command again" + (f", which goes on from step {saved[0]}" if saved else "")
            ) from None
        if is_first():
            self._remove_orphaned_manifests()
        wait_for_all("saved")

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged state, sharded like `state`, and its notes; None if there is no checkpoint.

        Raises:
          InputError: all checkpoints are damaged, or the newest undamaged one is of another model.
        """
        # Processes may see a shared disk differently, but all must restore the same step.
        steps = [int(step) for step in from_first(" ".join(map(str, self._in_order_of_trial()))).split()]
        for step in steps:
            restored, reason = None, self._damage(step)
            if not any_process(bool(reason)):
                try:
                    restored = self._load_step(step, state)
                except InputError:
                    raise
                except Exception as error:
                    if is_lost_process_error(error):
                        raise
                    reason = " ".join(str(error).split())
                if not any_process(restored is None):
                    return restored
            reason = reason or "another process cannot read it"
            logger.warning("the checkpoint of step %d is damaged (%s): trying the one before", step, reason)
        if steps:
            raise InputError(f"all checkpoints in {self._folder} are damaged; start anew with `overwrite=True`")
        return None

    def notes(self) -> dict[str, Any]:
        """The notes of the first checkpoint to try that has an undamaged manifest; empty if there is none."""
        for step in self._in_order_of_trial():
            try:
                return self._manifest(step)["notes"]
            except ValueError:
                continue
        return {}

    def tidy(self, step: int) -> None:
        """Remove checkpoints newer than the restored step, which are damaged, and incomplete ones."""
        if not is_first():
            return
        complete = {str(kept) for kept in self.steps() if kept <= step}
        for path in self._folder.glob("*"):
            if path.is_dir() and path.name not in complete:
                logger.warning("removing %s, which is damaged or incomplete", path)
                shutil.rmtree(path, ignore_errors=True)
        self._remove_orphaned_manifests()

    def _remove_orphaned_manifests(self) -> None:
        """Remove the files of earlier versions whose checkpoint is gone."""
        kept = {f"{step}.json" for step in self.steps()}
        for path in self._folder.glob("*.json*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def _in_order_of_trial(self) -> list[int]:
        """The steps with checksums, newest first, then those that a kill left without."""

        def has_checksums(step: int) -> bool:
            return (self._folder / str(step) / CHECKSUMS).exists() or (self._folder / f"{step}.json").exists()

        return sorted(self.steps(), key=lambda step: (has_checksums(step), step), reverse=True)

    def _manifest(self, step: int) -> dict[str, Any]:
        """The content of the manifest; ValueError if it is damaged."""
        import orbax.checkpoint.experimental.v1 as ocp

        path = self._folder / f"{step}.json"
        try:
            if path.exists():
                manifest = json.loads(path.read_bytes())
            else:
                manifest = ocp.metadata(self._folder / str(step)).custom_metadata
            content, expected = manifest["content"], manifest["sum"]
        except (ValueError, TypeError, KeyError):
            content, expected = {}, None
        if _checksum(content) != expected:
            raise ValueError("its manifest is not as it was written")
        return content

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint's files, or an empty text. Only the first process reads all their bytes."""
        folder = self._folder / str(step)
        try:
            expected = self._manifest(step).get("files", {})
            if (folder / CHECKSUMS).exists():
                expected = json.loads((folder / CHECKSUMS).read_bytes())
            actual = _file_checksums(folder) if is_first() and expected else expected
            wrong = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
        except (ValueError, OSError, TypeError, AttributeError) as error:
            return str(error)
        return f"{wrong[0]} is {'not as it was written' if wrong[0] in actual else 'missing'}" if wrong else ""

    def _load_step(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint.experimental.v1 as ocp

        manifest = self._manifest(step)
        saved, current = manifest["arrays"], _array_types(state)
        # Earlier versions saved no frozen parameters that the losses do not read; these keep the model's values.
        current = {name: kind for name, kind in current.items() if name in saved or not name.startswith("frozen.")}
        other = sorted(name for name in saved | current if _differ(name, saved.get(name), current.get(name)))
        if other:
            name = other[0]
            raise InputError(
                f"the run is of another model: {name} was {saved.get(name, 'absent')} and is now "
                f"{current.get(name, 'absent')}; name the model it began with, or another `output`"
            )
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _named(state).items()
            if name in current
        }
        arrays = _named(state) | ocp.load(self._folder / str(step), wanted)
        return jax.tree.unflatten(jax.tree.structure(state), arrays.values()), manifest["notes"]


def _named(state: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _array_types(state: Any) -> dict[str, str]:
    """Dtype and shape of each array, such as float32[8, 16]."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(state).items()}


def _differ(name: str, saved: str | None, current: str | None) -> bool:
    """Whether the dtype or shape differs; of frozen arrays the shape, as earlier versions saved them as float32."""
    if saved and current and name.startswith("frozen."):
        return saved.partition("[")[2] != current.partition("[")[2]
    return saved != current


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _file_checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file, except that of the checksums."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        sums[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return sums
