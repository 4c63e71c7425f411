"""LoRA: train a low-rank update of some dense kernels and keep everything else frozen. Source: arXiv 2106.09685.

A kernel of shape (*in_shape, *out_shape) gets two leaves beside it: `lora_A` (*in_shape, rank) and `lora_B`
(rank, *out_shape). `layers.Dense` then computes x·kernel + (x·A)·B, so every `model.apply` works with such a tree.
Stacked layers have their axis of depth in front of each leaf.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from flax_qformer.errors import InputError, listed
from flax_qformer.models.layers import LORA, lora_kernel
from flax_qformer.models.selection import Selection, select
from flax_qformer.parallel.partition_rules import shard_params


def add_lora(params: Mapping[str, Any], pattern: Selection, rank: int, key: jax.Array) -> dict[str, Any]:
    """Add LoRA weights, in float32, to dense kernels. The model's output stays the same until they are trained.

    Args:
      params: the whole tree; on a mesh, the LoRA weights are replicated over it.
      pattern: which kernels, see `Selection`.
      rank: the rank of each kernel's update, 1 or more.
      key: draws `lora_A` from the uniform distribution up to 1 / sqrt(inputs), as peft does; `lora_B` is zero.

    Returns:
      The tree with the LoRA weights, which a pattern such as `lora_[AB]$` selects for training.

    Raises:
      InputError: the pattern matches no kernel, the rank is too small, or a kernel already has LoRA weights.
    """
    if rank < 1:
        raise InputError(f"`rank` is {rank}; it must be 1 or more")
    flat = flatten_dict(dict(params), sep="/")
    paths, new = _selected(params, pattern), {}
    for path, own_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        depth, inner, outer = split_shape(flat, path)
        bound = math.prod(inner) ** -0.5
        down, up = beside(path)
        new[down] = jax.random.uniform(own_key, (*depth, *inner, rank), minval=-bound, maxval=bound)
        new[up] = jnp.zeros((*depth, rank, *outer))
    return attached(flat, new)


def merge_lora(params: Mapping[str, Any]) -> dict[str, Any]:
    """Add each LoRA update to its kernel, in float32, and drop the LoRA weights: a tree as before `add_lora`.

    Raises:
      InputError: LoRA weights have no kernel beside them.
    """
    flat = flatten_dict(dict(params), sep="/")
    merged = {path: leaf for path, leaf in flat.items() if not path.endswith(LORA)}
    for path in lora_kernels(flat):
        down, up = beside(path)
        merged[path] = lora_kernel(flat[path], flat[down], flat[up])
    return unflatten_dict(merged, sep="/")


def _selected(params: Mapping[str, Any], pattern: Selection) -> list[str]:
    """Paths of the dense kernels that a pattern selects."""
    selected = select(params, pattern)
    kernels = sorted(path for path in selected if path.endswith("/kernel"))
    if not kernels:
        raise InputError(f"`pattern` selects no dense kernel, only {listed(sorted(selected))}; name paths of kernels")
    return kernels


def beside(path: str) -> tuple[str, str]:
    """Paths of the LoRA weights of a kernel."""
    parent = path.removesuffix("kernel")
    return parent + LORA[0], parent + LORA[1]


def lora_kernels(flat: Mapping[str, Any]) -> list[str]:
    """Paths of the kernels that have LoRA weights."""
    kernels = {path.rpartition("/")[0] + "/kernel" for path in flat if path.endswith(LORA)}
    missing = sorted(name for path in kernels for name in (path, *beside(path)) if name not in flat)
    if missing:
        raise InputError(f"the tree has LoRA weights without {listed(missing)}; give the whole tree")
    return sorted(kernels)


def split_shape(flat: Mapping[str, Any], path: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axis of depth of a stacked kernel, its in_shape and its out_shape."""
    shape, bias = np.shape(flat[path]), flat.get(path.removesuffix("kernel") + "bias")
    depth = 1 if "/layers/" in path else 0
    # A bias has the out_shape. Without one: (3, heads, head_dim) for a fused qkv, else the width alone.
    outer = np.ndim(bias) - depth if bias is not None else 3 if path.endswith("qkv/kernel") else 1
    return shape[:depth], shape[depth : len(shape) - outer], shape[len(shape) - outer :]


def attached(flat: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with LoRA weights beside its kernels, on the mesh of the kernels if there is one."""
    twice = sorted(flat.keys() & new.keys())
    if twice:
        raise InputError(f"the parameters already have {listed(twice)}; call `training.merge_lora` first")
    shardings = [getattr(leaf, "sharding", None) for leaf in flat.values() if not isinstance(leaf, jax.core.Tracer)]
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
    return unflatten_dict({**flat, **(new if mesh is None else shard_params(new, mesh))}, sep="/")
