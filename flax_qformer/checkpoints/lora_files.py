"""LoRA weights in a separate file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from flax_qformer.checkpoints.atomic import new_file
from flax_qformer.convert.files import open_tensors
from flax_qformer.convert.trees import PARAMETER_DTYPES
from flax_qformer.errors import InputError, listed
from flax_qformer.models.layers import LORA
from flax_qformer.models.lora import attached, beside, lora_kernels, split_shape
from flax_qformer.models.surgery import stack_layers, unstack_layers
from flax_qformer.parallel.processes import is_first, wait_for_all

FORMAT = "flax_qformer_lora"
"""`format` in the metadata of a LoRA file."""


def save_lora(path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Write the LoRA weights of a tree to one safetensors file, atomically; an existing file is replaced.

    The file is the same for stacked and unstacked layers. All processes of a job must call this together.

    Args:
      path: the file to write, whose suffix is .safetensors.
      params: the whole tree, from which only the LoRA weights are written.

    Raises:
      InputError: the tree has no LoRA weights, the path has another suffix, or the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path} does not end in .safetensors, the format of a LoRA file; add the suffix")
    flat = flatten_dict(dict(params), sep="/")
    if not lora_kernels(flat):
        raise InputError("the parameters have no LoRA weights; add them with `training.add_lora`")
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
        raise InputError(f"{path} has no LoRA weights; give a file that `training.save_lora` wrote")
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
    return attached(flat, new)


def _misfits(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Any]) -> list[str]:
    """Reasons why a LoRA file does not fit an unstacked base."""
    misfits = [f"{name} is not a LoRA weight" for name in shapes if not name.endswith(LORA)]
    for path in sorted({name.rpartition("/")[0] + "/kernel" for name in shapes if name.endswith(LORA)}):
        names = down, up = beside(path)
        absent = [name for name in names if name not in shapes]
        if path not in base or absent:
            misfits.append(f"the model has no {path}" if path not in base else f"the file has no {absent[0]}")
            continue
        _, inner, outer = split_shape(base, path)
        rank = shapes[down][-1:]
        for name, wanted in ((down, (*inner, *rank)), (up, (*rank, *outer))):
            if shapes[name] != wanted:
                misfits.append(f"{name} {shapes[name]} instead of {wanted}")
    return misfits
