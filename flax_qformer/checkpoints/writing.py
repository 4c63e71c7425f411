"""Write parameters and small files into a folder."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from flax_qformer.checkpoints.atomic import check_space
from flax_qformer.checkpoints.model_files import PARAMS
from flax_qformer.parallel.processes import is_lost_process_error

CHUNK_BYTES = 1 << 20
"""Bytes per orbax chunk: the unit in which a shard is read."""

WRITE_BYTES = 1 << 27
"""Bytes of copies that a write holds at once, unless one parameter is larger."""


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Write a parameter tree as an orbax checkpoint into a folder; all processes of a job call this together."""
    import orbax.checkpoint.experimental.v1 as ocp

    # Uncompressed, since floats hardly compress. Orbax copies arrays to cut them into chunks: the limit bounds these
    # copies, and must exceed the largest array. By default it would copy host arrays once more.
    arrays = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), dict(params))
    leaves = jax.tree.leaves(arrays)
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.write_concurrent_bytes = max(WRITE_BYTES, *(leaf.nbytes + 1 for leaf in leaves))
    context.memory.deepcopy_host_arrays = False
    with _saving(folder, leaves), context:
        ocp.save(folder / PARAMS, arrays)


@contextlib.contextmanager
def _saving(folder: Path, arrays: Iterable[Any]) -> Iterator[None]:
    """Raise OSError if arrays cannot be written; orbax and safetensors raise their own types."""
    check_space(folder, sum(array.nbytes for array in arrays))
    try:
        yield
    except Exception as error:
        if is_lost_process_error(error):
            raise
        raise OSError(str(error)) from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file that upstream reads, readable as the other files of its folder."""
    with _saving(path.parent, tensors.values()):
        save_file(dict(tensors), path, metadata={"format": "pt"})
    # safetensors makes its files readable for their owner only.
    path.chmod(0o666 & path.parent.stat().st_mode)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files, by name, into a folder, which is created if it is absent."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
