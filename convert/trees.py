"""PyTorch checkpoints to Flax parameter trees and back, by the tables.

`flax_qformer.checkpoints.loading` reads whole folders.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from numpy.typing import DTypeLike

from flax_qformer.convert.tables.qformer import (
    BERT_BIAS,
    LEFT_OUT,
    PARTS,
    PREFIX,
    TIED,
    Layout,
    Parameter,
    bert_bias,
    parameters,
)
from flax_qformer.convert.tensors import StoredTensor
from flax_qformer.errors import InputError, listed
from flax_qformer.models.config import Blip2Config

PARAMETER_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))


def convert(
    tensors: Mapping[str, StoredTensor],
    config: Blip2Config,
    parts: Iterable[str] = ("proj_layer",),
    *,
    dtype: DTypeLike | None = None,
    allow_non_finite: bool = False,
    place: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Turn a PyTorch checkpoint into a parameter tree. Every tensor is accounted for.

    Args:
      tensors: the result of `files.open_tensors`; each is read when it is converted.
      config: the config of their model.
      parts: modules that the checkpoint must have; other modules of `PARTS` are read too if it has them.
      dtype: cast the parameters; by default each keeps its dtype.
      allow_non_finite: accept infinities and NaN.
      place: from path and shape to a sharding, by default JAX's default device. Only what this process's devices need
        is read.

    Returns:
      Nested dictionaries of arrays, and the names of the tensors that a rule leaves out.

    Raises:
      InputError: tensors are missing, unexpected, misshapen, doubled, not floating point, or not finite, as stored or
        after the cast; it lists all of them (the first 20 and the count).
    """
    layout = layout_of(tensors)
    rule, prefix = LEFT_OUT[layout], PREFIX[layout]
    parts = [part for part in PARTS if part in {*parts, *parts_of(tensors)}]
    wanted = list(parameters(config, layout, parts))
    stored: dict[str, list[str]] = {}
    left_out = []
    for full_name in tensors:
        name = full_name.removeprefix(prefix)
        if rule.fullmatch(name) or name == TIED[layout][0]:
            left_out.append(full_name)
        else:
            stored.setdefault(name, []).append(full_name)
    twice = [name for names in stored.values() if len(names) > 1 for name in sorted(names)]
    if twice:
        raise InputError(f"parameters would be filled twice, by {listed(twice)}; leave one of each out")
    for name in stored.get(BERT_BIAS.name(layout), []):
        wanted.append(bert_bias(layout, math.prod(tensors[name].shape)))
    found = {name: tensors[names[0]] for name, names in stored.items()}
    params = convert_rows(found, wanted, dtype=dtype, allow_non_finite=allow_non_finite, place=place)
    _check_tied(tensors, layout)
    return params, left_out


def convert_rows(
    tensors: Mapping[str, StoredTensor],
    rows: Sequence[Parameter],
    *,
    dtype: DTypeLike | None = None,
    allow_non_finite: bool = False,
    place: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> dict[str, Any]:
    """Turn tensors into a parameter tree, one row each; arguments and errors as of `convert`."""
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, {row.name: row.torch_shape for row in rows})
    _check_dtypes({row.name: tensors[row.name].dtype for row in rows}, dtype)

    def read(row: Parameter) -> tuple[jax.Array, bool]:
        return _on_devices(row, tensors[row.name], dtype, place and place(row.path, row.shape))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        arrays = list(pool.map(read, rows))
    if not allow_non_finite:
        check_finite([row.name for row, (_, finite) in zip(rows, arrays, strict=True) if not finite], dtype)
    return unflatten_dict({row.path: array for row, (array, _) in zip(rows, arrays, strict=True)}, sep="/")


def export(params: Mapping[str, Any], config: Blip2Config, layout: Layout = "diffusers") -> dict[str, np.ndarray]:
    """Turn a parameter tree, with all its parts, into PyTorch's tensors by name: the inverse of `convert`.

    Raises:
      InputError: the tree does not fit the config.
    """
    flat = flatten_dict(dict(params), sep="/")
    parts = [part for part, rows in PARTS.items() if any(row.path in flat for row in rows)]
    wanted = list(parameters(config, layout, parts))
    if BERT_BIAS.path in flat:
        wanted.append(bert_bias(layout, np.size(flat[BERT_BIAS.path])))
    tensors = export_rows(flat, wanted)
    # A buffer that both upstreams expect.
    position_ids = np.arange(config.qformer_config.max_position_embeddings)[None]
    if layout == "diffusers":
        return tensors | {"embeddings.position_ids": position_ids}
    tensors["Qformer.bert.embeddings.position_ids"] = position_ids
    if "lm_head" in parts:
        decoder, words = TIED[layout]
        tensors[decoder] = tensors[words]
    return tensors


def export_rows(flat: Mapping[str, Any], rows: Iterable[Parameter]) -> dict[str, np.ndarray]:
    """Turn parameters by path into PyTorch's tensors by name: the inverse of `convert_rows`."""
    rows = list(rows)
    check_shapes({path: np.shape(value) for path, value in flat.items()}, {row.path: row.shape for row in rows})
    return {row.name: row.to_torch(np.asarray(flat[row.path])) for row in rows}


def parts_of(names: Collection[str]) -> set[str]:
    """The parts of which a checkpoint has at least one tensor."""
    layout = layout_of(names)
    short = {name.removeprefix(PREFIX[layout]) for name in names}
    return {part for part, rows in PARTS.items() if short & {row.name(layout) for row in rows}}


def _check_tied(tensors: Mapping[str, StoredTensor], layout: Layout) -> None:
    short = {name.removeprefix(PREFIX[layout]): tensor for name, tensor in tensors.items()}
    copy, table = TIED[layout]
    if copy in short and not np.array_equal(short[copy].view(), short[table].view()):
        raise InputError(f"{copy} differs from {table}, of which it should be a copy: the LM head here has no table")


def layout_of(names: Collection[str]) -> Layout:
    """Whose names they are: LAVIS's, else diffusers'."""
    return "lavis" if any(re.match(r"(blip\.)?Qformer\.bert\.", name) for name in names) else "diffusers"


def check_shapes(actual: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError that lists missing, unexpected and misshapen tensors, if there are any."""
    missing = [name for name in wanted if name not in actual]
    unexpected = [name for name in actual if name not in wanted]
    misshapen = [
        f"{name} {actual[name]} instead of {wanted[name]}"
        for name in wanted
        if name in actual and tuple(actual[name]) != tuple(wanted[name])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen}
    problems = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        hint = (
            "check that it is a part of BLIP-Diffusion and that the config is its own; what a config leaves out has "
            "upstream's default"
        )
        raise InputError(f"the tensors are not those of the config: {'; '.join(problems)} ({hint})")


def check_finite(non_finite: Sequence[str], dtype: DTypeLike | None) -> None:
    """Raise InputError that lists the tensors that are not finite, if there are any."""
    if non_finite:
        cast = "" if dtype is None else f" as {np.dtype(dtype)}"
        raise InputError(
            f"infinities or NaN in {len(non_finite)} tensors{cast} ({listed(non_finite)}); if they are meant, convert "
            "it with `convert_checkpoint(..., allow_non_finite=True)`"
        )


def _check_dtypes(dtypes: Mapping[str, np.dtype], dtype: DTypeLike | None) -> None:
    double = np.dtype(np.float64)
    others = [f"{name} {kind}" for name, kind in dtypes.items() if kind not in (*PARAMETER_DTYPES, double)]
    if others:
        raise InputError(
            f"{len(others)} tensors are not floating point: {listed(others)}; dequantise the checkpoint first"
        )
    doubles = [name for name, kind in dtypes.items() if kind == double]
    if doubles and dtype is None:
        raise InputError(
            f"{len(doubles)} tensors are float64, which JAX does not keep: {listed(doubles)}; convert it with "
            "`convert_checkpoint(..., dtype='float32')`, or read it with `param_dtype='float32'`"
        )


def _on_devices(
    parameter: Parameter, tensor: StoredTensor, dtype: DTypeLike | None, sharding: Sharding | None
) -> tuple[jax.Array, bool]:
    """The parameter on its devices, and whether it is finite. XLA moves the axes during the transfer."""
    view = tensor.view().transpose(parameter.order).reshape(parameter.shape)
    dtype = view.dtype if dtype is None else dtype
    parts: dict[str, np.ndarray] = {}
    extremes, shards = [], []
    indices = {None: ()} if sharding is None else sharding.addressable_devices_indices_map(parameter.shape)
    for device, index in indices.items():
        # Devices with the same part share one read.
        if str(index) not in parts:
            part = np.asarray(view[index])
            with np.errstate(all="ignore"):
                # Minimum and maximum are NaN if any value is, and the cast keeps their order. They need no temporary.
                extremes += [part.min(initial=0).astype(dtype), part.max(initial=0).astype(dtype)]
                parts[str(index)] = part.astype(dtype, copy=False)
        shards.append(jax.device_put(parts[str(index)], device, may_alias=False))
    array = shards[0] if sharding is None else jax.make_array_from_single_device_arrays(view.shape, sharding, shards)
    return array.block_until_ready(), bool(np.isfinite(extremes).all())
