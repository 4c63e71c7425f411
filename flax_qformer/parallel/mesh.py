"""The device mesh, and how batches and activations are sharded over it.

Three axes: `data` shards the batch and replicates the parameters, `fsdp` shards both, `tensor` shards heads and inner
widths. The program is written for one device: XLA inserts the collectives, and the losses see the global batch.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_qformer.compilation import rounds_at_once
from flax_qformer.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

TOKENS_AT_ONCE = 16
"""Tokens of each image that are gathered across devices per step of `pick_rows`."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices; one of the sizes may be -1, which takes the remaining devices.

    Raises:
      InputError: the product of the sizes is not the number of devices.
    """
    return _build(dict(zip(AXES, (data, fsdp, tensor), strict=True)), jax.devices())


def named_mesh(text: str, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the devices with sizes such as `data=-1,fsdp=4,tensor=2`."""
    return _build(parse_mesh(text), devices)


def _build(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    fitting = _fit_mesh(sizes, len(devices))
    # Unlike `jax.make_mesh`, this allows splitting physical axes on every TPU version.
    placed = mesh_utils.create_device_mesh(fitting, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """The arguments of `make_mesh` from a text such as `data=-1,fsdp=4,tensor=2`; missing sizes are 1."""
    parts = [part for part in text.split(",") if part]
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in parts)}
    except ValueError:
        sizes = {"": 0}
    if not sizes.keys() <= set(AXES) or len(sizes) < len(parts):
        raise InputError(f"the mesh is {text!r}; write it as data=-1,fsdp=4,tensor=2; sizes of 1 can be left out")
    return dict.fromkeys(AXES, 1) | sizes


def mesh_context(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """A context for tracing, in which functions such as `keep_batch` shard activations over the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shard a batch over the mesh; each process of a job passes its own part.

    Raises:
      InputError: the batch does not divide among the devices, or the mesh has other axes.
    """
    check_axes(mesh)
    sharding, (_, count) = NamedSharding(mesh, BATCH), batch_part(mesh)
    lengths = {name: np.shape(array)[:1] for name, array in batch.items()}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        described = ", ".join(f"{name} {length[0] if length else 'none'}" for name, length in lengths.items())
        raise InputError(f"the arrays of a batch must have equally many rows; these have: {described}")
    for name, (length,) in lengths.items():
        check_divides(length * count, mesh, name)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(array)) for name, array in batch.items()}


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """The index of this process's part of a batch, and the number of parts.

    Processes that share rows along `tensor` have the same part.

    Raises:
      InputError: parts overlap or have different sizes.
    """
    held: dict[int, set[int]] = {}
    number = mesh.shape["data"] * mesh.shape["fsdp"]
    device_rows: dict[Any, tuple[slice, ...]] = dict(NamedSharding(mesh, BATCH).devices_indices_map((number,)))
    for device, (rows,) in device_rows.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != number or len(set(map(len, parts))) > 1:
        raise InputError("the mesh gives processes unequal parts of a batch; let tensor divide a process's devices")
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def check_divides(size: int, mesh: Mesh, name: str) -> None:
    """Raise InputError with the nearest size that fits if a batch does not divide among the devices."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        nearest = max(1, round(size / parts)) * parts
        raise InputError(f"{name}: {size} does not divide into {parts} parts (data x fsdp); {nearest} does")


def keep_batch(x: jax.Array) -> jax.Array:
    """Keep the first axis sharded over the current mesh: otherwise XLA may shard widths, which needs an all-reduce."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH[0] if axis in mesh.auto_axes)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)))


def is_batch_split() -> bool:
    """Whether there is a current mesh that shards the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in BATCH[0] if axis in mesh.auto_axes)


def pick_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]`; on a mesh `TOKENS_AT_ONCE` tokens at a time, because each device gathers them for the whole batch.

    x: (batch, tokens, width), index: (batch,) -> (batch, tokens, width).
    """
    if not is_batch_split():
        return x[index]
    batch, tokens, width = x.shape
    pieces = math.ceil(tokens / TOKENS_AT_ONCE)
    x = jnp.pad(x, ((0, 0), (0, pieces * TOKENS_AT_ONCE - tokens), (0, 0)))
    x = x.reshape(batch, pieces, TOKENS_AT_ONCE, width).swapaxes(0, 1)

    def choose(_: None, piece: jax.Array) -> tuple[None, jax.Array]:
        return None, keep_batch(keep_batch(piece)[index])

    _, chosen = jax.lax.scan(choose, None, x, unroll=rounds_at_once(pieces))
    return chosen.swapaxes(0, 1).reshape(batch, -1, width)[:, :tokens]


def interleaved(*arrays: jax.Array) -> jax.Array:
    """N arrays of (batch, ...) -> (N * batch, ...), row by row; each row stays on its device."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def replicated(x: jax.Array) -> jax.Array:
    """Replicate a parameter on all devices of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if mesh.auto_axes else x


def check_axes(mesh: Mesh) -> None:
    """Raise InputError if a mesh was not made by `make_mesh`."""
    if mesh.axis_names != AXES:
        raise InputError(f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}; make it with fq.make_mesh")


def _fit_mesh(sizes: dict[str, int], count: int) -> tuple[int, ...]:
    if not all(isinstance(size, int | np.integer) for size in sizes.values()):
        raise InputError(f"a mesh has whole numbers of devices along data, fsdp and tensor, not {[*sizes.values()]}")
    rest = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) == 1 and known > 0 and count % known == 0:
        sizes = sizes | {rest[0]: count // known}
    elif rest or known != count or min(sizes.values()) < 1:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(
            f"a mesh of {text} does not fit {count} devices; their product must be {count}, and one of them may be -1"
        )
    return tuple(sizes.values())
