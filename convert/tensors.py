"""Tensors in a checkpoint file, read on access."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_qformer.errors import InputError, listed


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the offset and the layout of its bytes. `strides` are in elements."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the file, whose pages are read on access."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        extent = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        data = np.memmap(self.path, np.uint8, "r", self.offset, (extent * self.dtype.itemsize,)).view(self.dtype)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(data, self.shape, strides, writeable=False)


def merged(shards: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Merge the tensors of several files; InputError if two have the same name."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise InputError(
                f"{shard[twice[0]].path.parent}: two files hold the same tensors: {listed(twice)}; fetch them again"
            )
        tensors |= shard
    return tensors


_MAX_NAMES_BYTES = 4 << 20
"""Limit on a header or a pickle: names and shapes take about 250 bytes a tensor."""


def check_names_size(size: int) -> None:
    if size > _MAX_NAMES_BYTES:
        raise InputError(f"{size} bytes of names and shapes, far more than those of a model: not a checkpoint")


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
