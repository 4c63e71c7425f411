"""LoRA: train a low-rank update of some dense kernels and keep everything else frozen. Source: arXiv 2106.09685.

A kernel of shape (*in_shape, *out_shape) gets two leaves beside it: `lora_A` (*in_shape, rank) and `lora_B`
(rank, *out_shape). `layers.Dense` then computes x·kernel + (x·A)·B, so every `model.apply` works with such a tree.
Stacked layers have their axis of depth in front of each leaf.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save

from flax_qformer.convert import PARAMETER_DTYPES
from flax_qformer.convert.tensors import listed, open_tensors
from flax_qformer.errors import InputError
from flax_qformer.layers import LORA, lora_kernel
from flax_qformer.pretraining.optimizer import Selection, select
from flax_qformer.processes import is_first, wait_for_all
from flax_qformer.sharding import shard_params
from flax_qformer.surgery import stack_layers, unstack_layers
from flax_qformer.writing import new_file

FORMAT = "flax_qformer_lora"
"""`format` in the metadata of a LoRA file."""


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
        depth, inner, outer = _split(flat, path)
        bound = math.prod(inner) ** -0.5
        down, up = _beside(path)
        new[down] = jax.random.uniform(own_key, (*depth, *inner, rank), minval=-bound, maxval=bound)
        new[up] = jnp.zeros((*depth, rank, *outer))
    return _attached(flat, new)


def merge_lora(params: Mapping[str, Any]) -> dict[str, Any]:
    """Add each LoRA update to its kernel, in float32, and drop the LoRA weights: a tree as before `add_lora`.

    Raises:
      InputError: LoRA weights have no kernel beside them.
    """
    flat = flatten_dict(dict(params), sep="/")
    merged = {path: leaf for path, leaf in flat.items() if not path.endswith(LORA)}
    for path in _lora_kernels(flat):
        down, up = _beside(path)
        merged[path] = lora_kernel(flat[path], flat[down], flat[up])
    return unflatten_dict(merged, sep="/")


def save_lora(path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Write the LoRA weights of a tree to one safetensors file, atomically; an existing file is replaced.

    The file is the same for stacked and unstacked layers. All processes of a job must call this together.

    Args:
      path: the file to write.
      params: the whole tree, from which only the LoRA weights are written.

    Raises:
      InputError: the tree has no LoRA weights, or the file cannot be written.
    """
    flat = flatten_dict(dict(params), sep="/")
    if not _lora_kernels(flat):
        raise InputError("the parameters have no LoRA weights; add them with `pretraining.add_lora`")
    # Unstacking copies, so the other leaves are reduced to their depth.
    slim = {path: leaf if path.endswith(LORA) else np.empty(np.shape(leaf)[:1]) for path, leaf in flat.items()}
    flat = flatten_dict(unstack_layers(unflatten_dict(slim, sep="/")), sep="/")
    tensors = {path: np.asarray(leaf) for path, leaf in flat.items() if path.endswith(LORA)}
    if is_first():
        with new_file(Path(path)) as file:
            file.write(save(tensors, metadata={"format": FORMAT}))
    wait_for_all("saved")


def load_lora(path: str | os.PathLike[str], params: Mapping[str, Any]) -> dict[str, Any]:
    """Add the LoRA weights of a file to the tree that they were trained on.

    Args:
      path: a file of `save_lora`.
      params: the base, with stacked or unstacked layers; on a mesh, the LoRA weights are replicated over it.

    Raises:
      InputError: the file cannot be read, has no LoRA weights, or does not fit the base.
    """
    tensors = open_tensors(Path(path))
    if not any(name.endswith(LORA) for name in tensors):
        raise InputError(f"{path} has no LoRA weights; give a file that `pretraining.save_lora` wrote")
    flat = flatten_dict(dict(params), sep="/")
    base = flatten_dict(jax.eval_shape(unstack_layers, dict(params)), sep="/")
    misfits = _misfits({name: tensor.shape for name, tensor in tensors.items()}, base)
    misfits += [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in PARAMETER_DTYPES]
    if misfits:
        raise InputError(
            f"{path} does not fit the model: {listed(misfits)}; load it with the model that it was trained on"
        )
    new = {name: jnp.asarray(tensor.view()) for name, tensor in tensors.items()}
    if base.keys() != flat.keys():
        # Only the LoRA weights need stacking; zeros stand in for the base, which says how layers are grouped.
        tree = stack_layers(unflatten_dict(dict.fromkeys(base, np.float32(0)) | new, sep="/"))
        new = {name: leaf for name, leaf in flatten_dict(tree, sep="/").items() if name.endswith(LORA)}
    return _attached(flat, new)


def _selected(params: Mapping[str, Any], pattern: Selection) -> list[str]:
    """Paths of the dense kernels that a pattern selects."""
    selected = select(params, pattern)
    kernels = sorted(path for path in selected if path.endswith("/kernel"))
    if not kernels:
        raise InputError(f"`pattern` selects no dense kernel, only {listed(sorted(selected))}; name paths of kernels")
    return kernels


def _beside(path: str) -> tuple[str, str]:
    """Paths of the LoRA weights of a kernel."""
    parent = path.removesuffix("kernel")
    return parent + LORA[0], parent + LORA[1]


def _lora_kernels(flat: Mapping[str, Any]) -> list[str]:
    """Paths of the kernels that have LoRA weights."""
    kernels = {path.rpartition("/")[0] + "/kernel" for path in flat if path.endswith(LORA)}
    missing = sorted(name for path in kernels for name in (path, *_beside(path)) if name not in flat)
    if missing:
        raise InputError(f"the tree has LoRA weights without {listed(missing)}; give the whole tree")
    return sorted(kernels)


def _split(flat: Mapping[str, Any], path: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axis of depth of a stacked kernel, its in_shape and its out_shape."""
    shape, bias = np.shape(flat[path]), flat.get(path.removesuffix("kernel") + "bias")
    depth = 1 if "/layers/" in path else 0
    # A bias has the out_shape. Without one: (3, heads, head_dim) for a fused qkv, else the width alone.
    outer = np.ndim(bias) - depth if bias is not None else 3 if path.endswith("qkv/kernel") else 1
    return shape[:depth], shape[depth : len(shape) - outer], shape[len(shape) - outer :]


def _misfits(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Any]) -> list[str]:
    """What in a LoRA file does not fit an unstacked base."""
    misfits = [f"{name} is not a LoRA weight" for name in shapes if not name.endswith(LORA)]
    for path in sorted({name.rpartition("/")[0] + "/kernel" for name in shapes if name.endswith(LORA)}):
        names = down, up = _beside(path)
        absent = [name for name in names if name not in shapes]
        if path not in base or absent:
            misfits.append(f"the model has no {path}" if path not in base else f"the file has no {absent[0]}")
            continue
        _, inner, outer = _split(base, path)
        rank = shapes[down][-1:]
        for name, wanted in ((down, (*inner, *rank)), (up, (*rank, *outer))):
            if shapes[name] != wanted:
                misfits.append(f"{name} {shapes[name]} instead of {wanted}")
    return misfits


def _attached(flat: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with LoRA weights beside its kernels, on the mesh of the kernels if there is one."""
    twice = sorted(flat.keys() & new.keys())
    if twice:
        raise InputError(f"the parameters already have {listed(twice)}; call `pretraining.merge_lora` first")
    shardings = [getattr(leaf, "sharding", None) for leaf in flat.values() if not isinstance(leaf, jax.core.Tracer)]
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
    return unflatten_dict({**flat, **(new if mesh is None else shard_params(new, mesh))}, sep="/")
