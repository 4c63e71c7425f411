"""Jobs of several processes, each with its own devices: join, synchronise, gather."""

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_qformer.errors import InputError, first_line

VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
"""Arguments of `jax.distributed.initialize`, and the environment variables that set them if JAX detects no cluster."""

SHUTDOWN_TIMEOUT = 7 * 24 * 3600
"""Seconds that a finished process waits for the others; JAX detects a dead process much sooner."""


def join_processes() -> None:
    """Join the job's other processes. Call this before any other function of JAX.

    Raises:
      InputError: no address of the other processes is known, or they do not answer.
    """
    values: dict[str, Any] = {name: os.environ[key] for name, key in VARIABLES.items() if key in os.environ}
    try:
        values |= {name: int(values[name]) for name in ("num_processes", "process_id") if name in values}
        if ":" not in values.get("coordinator_address", ":"):
            raise ValueError(f"{values['coordinator_address']} has no port")
        jax.distributed.initialize(**values, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the job's other processes cannot be found ({first_line(error)}); JAX finds them on Cloud TPU, GKE and "
            "Slurm; elsewhere set JAX_COORDINATOR_ADDRESS to HOST:PORT of the first, JAX_NUM_PROCESSES, and "
            "JAX_PROCESS_ID, which counts from 0"
        ) from None
    if not is_first():
        logging.getLogger("flax_qformer").setLevel(logging.ERROR)


def is_lost_process_error(error: Exception) -> bool:
    """Whether an error may mean that another process of the job has ended."""
    is_own = str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED"))
    return jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError) and not is_own


def is_first() -> bool:
    """Whether this is the first process, which writes files and logs for all."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process. All processes must call this together."""
    return bool(any_process_async(flag))


def any_process_async(flag: bool) -> Any:
    """As `any_process`, without waiting: a bool, or a device scalar that resolves after queued work."""
    if jax.process_count() == 1:
        return flag
    mesh = Mesh(np.array(jax.devices()), "device")
    flags = np.full(jax.local_device_count(), flag)
    placed = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("device")), flags)
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))(placed)


def wait_for_all(name: str) -> None:
    """Wait until all processes call this with the same name."""
    multihost_utils.sync_global_devices(name)


def all_gather(numbers: dict[str, int]) -> list[dict[str, int]]:
    """The numbers of each process, in the order of the processes."""
    if jax.process_count() == 1:
        return [numbers]
    # As 32-bit halves: JAX truncates 64-bit integers.
    halves = multihost_utils.process_allgather(np.array(list(numbers.values()), np.int64).view(np.uint32))
    rows = np.ascontiguousarray(halves).view(np.int64)
    return [dict(zip(numbers, row.tolist(), strict=True)) for row in rows]


def from_first(text: str) -> str:
    """Broadcast the first process's text, such as a path, to all processes."""
    if jax.process_count() == 1:
        return text
    padded = np.zeros(1 << 16, np.uint8)
    encoded = np.frombuffer(os.fsencode(text), np.uint8)
    padded[: len(encoded)] = encoded
    return os.fsdecode(multihost_utils.broadcast_one_to_all(padded).tobytes().rstrip(b"\0"))
