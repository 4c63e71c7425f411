"""Subject vectors: average, mix, keep. The text encoder reads the vectors of a subject as words."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jax.typing import ArrayLike

from flax_qformer.errors import InputError, first_line
from flax_qformer.processing.processor import Image, to_rgb


def mix_subjects(vectors: Sequence[ArrayLike] | ArrayLike, weights: Sequence[float] | None = None) -> np.ndarray:
    """The weighted mean of several subjects' vectors. Source: LAVIS `forward_ctx_embeddings(ratio=)`.

    Args:
      vectors: of each subject (Q, D) or (1, Q, D), or one array (N, Q, D).
      weights: one number a subject; they are divided by their sum. By default all are equal.

    Returns:
      (Q, D) float32.

    Raises:
      InputError: shapes differ, or the weights do not fit.
    """
    arrays = [np.asarray(item, np.float32) for item in vectors]  # type: ignore[union-attr]
    shapes = [array.shape[1:] if array.ndim == 3 and len(array) == 1 else array.shape for array in arrays]
    if not arrays or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise InputError(f"the vectors to mix have the shapes {shapes}; all must have the same shape (queries, width)")
    shares = np.ones(len(arrays)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(arrays),):
        raise InputError(f"{len(arrays)} subjects and weights of shape {shares.shape}: give one weight a subject")
    if not (np.isfinite(shares).all() and shares.sum() > 0):
        raise InputError(f"the weights are {shares.tolist()}; they must be finite, and their sum must be above 0")
    stacked = np.stack([array.reshape(shapes[0]) for array in arrays])
    return np.tensordot((shares / shares.sum()).astype(np.float32), stacked, 1)


def save_subjects(file: str | os.PathLike[str], vectors: ArrayLike, names: Sequence[str] | str) -> None:
    """Write subject vectors into an `.npz` file.

    Args:
      vectors: (Q, D), or (N, Q, D) of several subjects.
      names: what each subject is, such as "dog".

    Raises:
      InputError: there is not one name for each subject.
    """
    array = _as_subjects(np.asarray(vectors, np.float32))
    words = [names] if isinstance(names, str) else list(names)
    if len(words) != len(array):
        raise InputError(f"{len(array)} subjects and {len(words)} names: give one name a subject")
    # An open file, because np.savez would append .npz to another name.
    with Path(file).open("wb") as opened:
        np.savez(opened, subject_embeddings=array, names=np.array(words, dtype=np.str_))


def load_subjects(file: str | os.PathLike[str]) -> tuple[np.ndarray, list[str]]:
    """Read an `.npz` file of `save_subjects`: vectors (N, Q, D) float32, and the subjects' names.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            array, names = content["subject_embeddings"], content["names"]
    except OSError as error:
        raise InputError(f"the subjects {file} cannot be read ({error.strerror or first_line(error)})") from None
    except (KeyError, ValueError, TypeError, EOFError, IndexError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is no file of `save_subjects` ({first_line(error)})") from None
    if array.dtype != np.float32 or names.dtype.kind != "U" or names.shape != array.shape[:1]:
        raise InputError(
            f"{file} has vectors {array.dtype} {array.shape} and names {names.dtype} {names.shape}; "
            "write it with `save_subjects`"
        )
    return _as_subjects(array), names.tolist()


def _as_subjects(array: np.ndarray) -> np.ndarray:
    """Vectors (N, Q, D) from (Q, D) or (N, Q, D)."""
    subjects = array[None] if array.ndim == 2 else array
    if subjects.ndim != 3 or not subjects.size:
        raise InputError(
            f"subject vectors have shape {array.shape}; they must be (queries, width) or (N, queries, width)"
        )
    if not np.isfinite(subjects).all():
        raise InputError("subject vectors hold infinities or NaN; compute them again")
    return subjects


def photo_groups(photos: Any) -> list[list[Image]]:
    """The photos of each subject: from one photo, from a list with one a subject, or from a list of lists."""
    subjects = list(photos) if isinstance(photos, list | tuple) else [photos]
    groups = [list(photo) if isinstance(photo, list | tuple) else [photo] for photo in subjects]
    empty = [i for i, group in enumerate(groups) if not group]
    if empty or not groups:
        raise InputError(f"subject {empty[0] if empty else 0} has no photo; give at least one")
    return groups


def centre_crop(photo: Image, side: int) -> PIL.Image.Image:
    """Resize the shorter side of a photo and cut the longer one at both ends, as LAVIS does.

    Upstream squashes the whole photo into a square instead.
    """
    image = to_rgb(photo)
    shorter = min(image.size)
    # Truncated, as torchvision's Resize.
    width, height = (side if length == shorter else int(side * length / shorter) for length in image.size)
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))
