"""LoRA files of Stable Diffusion, as diffusers, peft and kohya write them, merged into a pipeline's kernels."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_qformer.convert.axes import Parameter
from flax_qformer.convert.files import open_tensors
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.convert.tensors import StoredTensor
from flax_qformer.convert.trees import PARAMETER_DTYPES
from flax_qformer.errors import InputError

FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""Names of the file in a folder that diffusers wrote."""

KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
"""kohya's prefix of the modules of each part; the rest of a module's name has `_` in place of `.`."""

ENDINGS = (
    (r"\.lora_down\.weight|\.lora_A\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_up\.weight|\.lora_B\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
)
"""Endings of the names of the three tensors of a module: kohya's, peft's, and diffusers' two older forms."""

XL_NAMES = r"lora_te[12]_|text_encoder_2\."
XL_CROSS_ATTENTION = 2048
"""The width of the text that Stable Diffusion XL's UNet attends to."""


@dataclass
class Update:
    """The tensors of one module: the update of its kernel is `alpha / rank * up @ down`; alpha is rank by default."""

    names: list[str] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


def load_pipeline_lora(
    path: str | os.PathLike[str], components: Mapping[str, Any], params: Mapping[str, Any], scale: float = 1.0
) -> dict[str, Any]:
    """Add the update of a LoRA file to the kernels of the UNet and the text encoder.

    The sum is computed in float32; kernels keep their dtype and sharding. The tree that was passed is unchanged.

    Args:
      path: a safetensors or PyTorch file of diffusers, peft or kohya, or a folder of diffusers with one.
      components: modules of the pipeline by name; `unet` and `text_encoder` can have updates.
      params: parameter tree of each component.
      scale: factor on the update, besides the file's own `alpha / rank`.

    Returns:
      The parameter trees with updated kernels; all other leaves are shared with `params`.

    Raises:
      InputError: the file cannot be read, is of Stable Diffusion XL, or holds a tensor that fits no kernel; the error
        lists all such tensors.
    """
    file = _file_of(Path(path))
    tensors = open_tensors(file)
    kernels = {part: flatten_dict(dict(params[part]), sep="/") for part in KOHYA_PREFIXES if part in components}
    targets = _targets(kernels)
    updates: dict[str, Update] = {}
    misfits = []
    for name, tensor in tensors.items():
        module, kind = _module_and_kind(name)
        if kind and module in targets:
            update = updates.setdefault(module, Update())
            update.names.append(name)
            if kind in update.tensors:
                misfits.append(f"{name} is there twice")
            update.tensors[kind] = tensor
        else:
            misfits.append(name)
    for module, update in updates.items():
        misfits += _unfit_tensors(update, targets[module][1])
    if any(_is_of_xl(name, tensor) for name, tensor in tensors.items()):
        raise InputError(
            f"{file} is a LoRA of Stable Diffusion XL; this pipeline needs one that was trained on Stable Diffusion 1.5"
        )
    if misfits or not updates:
        described = ", ".join(misfits) if misfits else "it has no tensors"
        raise InputError(
            f"{file} does not fit the UNet and the text encoder: {described}; take a LoRA of this base model, in the "
            "form of diffusers, peft or kohya"
        )
    for module, update in updates.items():
        part, row = targets[module]
        kernels[part][row.path] = _updated(kernels[part][row.path], row, update, scale)
    return {**params, **{part: unflatten_dict(flat, sep="/") for part, flat in kernels.items()}}


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = [path / name for name in FILES if (path / name).is_file()]
    if not files:
        raise InputError(f"{path} has no {' or '.join(FILES)}; name the LoRA file itself")
    return files[0]


def _targets(kernels: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, Parameter]]:
    """Part and row of every kernel, by diffusers' and by kohya's name of its module."""
    targets = {}
    for part, flat in kernels.items():
        for path, leaf in flat.items():
            if path.endswith("/kernel"):
                row = parameter_at(path, np.shape(leaf))
                module = row.name.removesuffix(".weight")
                targets[f"{part}.{module}"] = part, row
                targets[KOHYA_PREFIXES[part] + module.replace(".", "_")] = part, row
    return targets


def _module_and_kind(name: str) -> tuple[str, str]:
    """The name of a tensor's module, with its part in front, and `down`, `up`, `alpha`, or "" if it is none of them."""
    endings = ((re.search(rf"(?:{pattern})$", name), kind) for pattern, kind in ENDINGS)
    ending, kind = next((found for found in endings if found[0]), (None, ""))
    if ending is None:
        return name, ""
    module = name[: ending.start()].replace(".processor", "")
    if module.startswith(tuple(KOHYA_PREFIXES.values())):
        return module, kind
    # Files of the UNet alone have no prefix.
    if not module.startswith(("unet.", "text_encoder.")):
        module = f"{'text_encoder' if module.startswith('text_model.') else 'unet'}.{module}"
    if module.startswith("text_encoder."):
        # Older diffusers named the projections of both parts alike.
        module = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", module)
    return re.sub(r"\.to_out$", ".to_out.0", module), kind


def _unfit_tensors(update: Update, row: Parameter) -> list[str]:
    """Reasons why the tensors of a module do not fit its kernel."""
    missing = [kind for kind in ("down", "up") if kind not in update.tensors]
    if missing:
        return [f"{name} has no matching {' and '.join(missing)}" for name in update.names]
    down, up = (update.tensors[kind] for kind in ("down", "up"))
    rank = down.shape[0] if down.shape else 0
    out, *inner = row.torch_shape
    # Kernels of 1x1 convolutions are stored as matrices or with their two axes of length one.
    fits = rank and _without_ones(down.shape) == _without_ones((rank, *inner))
    fits = fits and _without_ones(up.shape) == _without_ones((out, rank))
    fits = fits and all(tensor.dtype in PARAMETER_DTYPES for tensor in (down, up))
    if fits and ("alpha" not in update.tensors or np.prod(update.tensors["alpha"].shape, dtype=int) == 1):
        return []
    wanted = f"for {row.name} of {row.torch_shape}"
    return [
        f"{name} {tensor.dtype} {tensor.shape} {wanted}"
        for name, tensor in zip(update.names, update.tensors.values(), strict=True)
    ]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def _is_of_xl(name: str, tensor: StoredTensor) -> bool:
    is_cross = re.search(r"attn2[._](processor\.)?to_[kv][._].*(down|lora_A)\.weight$", name)
    return bool(re.match(XL_NAMES, name) or (is_cross and tensor.shape[1:2] == (XL_CROSS_ATTENTION,)))


def _updated(kernel: Any, row: Parameter, update: Update, scale: float) -> jax.Array:
    """The kernel with its update; kernel: Flax's shape."""
    down, up = (update.tensors[kind].view().astype(np.float32) for kind in ("down", "up"))
    rank = len(down)
    if "alpha" in update.tensors:
        scale *= float(update.tensors["alpha"].view().astype(np.float32).reshape(())) / rank
    product = (up.reshape(-1, rank) @ down.reshape(rank, -1)).reshape(row.torch_shape)
    change = scale * product.transpose(row.order).reshape(row.shape)
    kernel = jnp.asarray(kernel)
    total = kernel.astype(jnp.float32) + jax.device_put(change.astype(np.float32), kernel.sharding)
    return total.astype(kernel.dtype)
