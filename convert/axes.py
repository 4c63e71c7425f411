"""How the axes of a parameter move between PyTorch and Flax.

In a rule such as `"(heads head_dim) width -> width heads head_dim"`, parentheses hold the axes that PyTorch merges into
one. These stay together and in order, so each rule is a permutation of PyTorch's axes, followed by a reshape. `1` is an
axis of length one.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """A row of a table for one model and layout, with its shapes and parsed axes.

    Attributes:
      path, name: names in Flax and in PyTorch.
      shape, torch_shape: shapes in Flax and in PyTorch.
      order: the permutation from PyTorch's order of axes to Flax's; splitting merged axes then gives `shape`.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    torch_shape: tuple[int, ...]
    order: tuple[int, ...]

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """The parameter in PyTorch's form. value: `shape` -> `torch_shape`."""
        merged = value.reshape([self.torch_shape[axis] for axis in self.order])
        return np.asarray(merged.transpose(np.argsort(self.order)), order="C")


def concrete(path: str, name: str, axes: str, sizes: Mapping[str, int]) -> Parameter:
    left, right = axes.split(" -> ")
    groups = [re.findall(r"\w+", group) for group in re.findall(r"\([^)]*\)|\w+", left)]
    names = right.split()
    return Parameter(
        path,
        name,
        shape=tuple(sizes[axis] for axis in names),
        torch_shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
        order=tuple(sorted(range(len(groups)), key=lambda axis: names.index(groups[axis][0]))),
    )
