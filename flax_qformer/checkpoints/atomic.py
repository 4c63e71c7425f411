"""Atomic writes: an interrupted run leaves no partial output."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from flax_qformer.errors import InputError


def check_absent(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists unless it may be replaced.

    Raises:
      InputError: it exists, or it may be replaced but is not the folder of a model.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise InputError(f"{target} exists; name another place, or replace it with `overwrite=True`")
    if target.is_symlink() or not target.is_dir():
        raise InputError(f"{target} is not a folder; name another place")
    is_model = any((target / name).is_file() for name in ("config.json", "model_index.json"))
    if any(target.iterdir()) and not is_model:
        raise InputError(f"{target} is not the folder of a model (no config.json); name another place, or remove it")


def check_apart(source: Path, target: Path) -> None:
    """Refuse to replace a target that contains the source or lies inside it."""
    one, other = source.resolve(), target.resolve()
    if os.path.exists(target) and (one.is_relative_to(other) or other.is_relative_to(one)):
        raise InputError(f"{target} cannot replace what it is made from, {source}; name another place")


def check_writable(target: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file that cannot be written, before the work starts. Nothing is created.

    Raises:
      InputError: the target is not a file, its folder is not writable, or it is one of the inputs.
    """
    with writing(target):
        if target.exists() and not target.is_file():
            raise InputError(f"{target} is not a file; name another place")
        if target.exists() and any(os.path.exists(other) and target.samefile(other) for other in inputs):
            raise InputError(f"{target} is one of the inputs; name another place")
        place = next(place for place in Path(os.path.abspath(target)).parents if place.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is not a folder")
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, f"no permission in {place}")


def check_space(folder: Path, size: int) -> None:
    """Raise OSError if `size` bytes do not fit.

    orbax would fail halfway, in many threads, and print tracebacks.
    """
    needed = size + size // 20 + (1 << 20)
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed, more than is left")


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill. It becomes `target` when the block ends and is removed if the block fails.

    It is a hidden folder beside the target, locked while its process lives. The next write to the same target removes
    unlocked folders, which killed processes left.

    The block should only write: any OSError in it is reported as an error of writing.

    Raises:
      InputError: the target exists and may not be replaced, or cannot be written.
    """
    target = Path(os.path.abspath(target))
    with writing(target), _made(target.parent):
        _remove_abandoned(target)
        check_absent(target, overwrite)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            with (work / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                filled = work / "filled"
                filled.mkdir()
                yield filled
                _flush(filled)
                check_absent(target, overwrite)
                if target.exists():
                    target.rename(work / "replaced")
                filled.rename(target)
        finally:
            _clear(work, target)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A file to fill. It replaces `target` when the block ends and is removed if the block fails.

    It is hidden and locked as in `new_folder`, so the next write removes what a killed process left.

    The block should only write: any OSError in it is reported as an error of writing. `check_writable` finds most of
    these errors earlier.

    Raises:
      InputError: it cannot be written.
    """
    check_writable(target)
    target = Path(os.path.abspath(target))
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    with writing(target), _made(target.parent):
        _remove_abandoned_files(target)
        try:
            with work.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, target)
        finally:
            work.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(target: Path, other: str = "another place") -> Iterator[None]:
    """Turn an OSError into an InputError that says why; `other` is what to name instead of the target."""
    try:
        yield
    except OSError as error:
        remedy = "free space, or name" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name"
        raise InputError(f"cannot write {target} ({error.strerror or error}); {remedy} {other}") from None


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create a folder and its parents; remove the new ones if the block fails."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _remove_abandoned(target: Path) -> None:
    # Exactly mkdtemp's suffix, so that longer target names do not match.
    for work in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}.partial"):
        try:
            with (work / ".lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(work, target)
        except OSError:
            continue


def _remove_abandoned_files(target: Path) -> None:
    for work in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 32}.partial"):
        with contextlib.suppress(OSError), work.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            work.unlink()


def _clear(work: Path, target: Path) -> None:
    """Remove a working folder. A target that was to be replaced moves back if nothing has taken its place."""
    if (work / "replaced").exists() and not target.exists():
        (work / "replaced").rename(target)
    shutil.rmtree(work, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush the files to disk before the rename, which could otherwise survive a crash that they do not."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
