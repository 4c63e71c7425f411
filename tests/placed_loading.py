"""Load a model placed on the mesh of a job of two processes: `python placed_loading.py MODEL FOLDER`.

Prints the bytes that this process read from its own folder, as the system counts them. Checks each value.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import flax_qformer as fq
from flax_qformer.parallel.partition_rules import held_bytes
from flax_qformer.parallel.processes import join_processes


def main(path: str, folder: str) -> None:
    join_processes()
    mesh = fq.make_mesh(data=1, fsdp=-1)
    model, params = fq.from_pretrained(path, mesh=mesh)
    here, whole = held_bytes(params)
    assert here < 0.6 * whole
    fq.save_pretrained(folder, model, params)
    before = read()
    _, again = fq.from_pretrained(folder, mesh=mesh)
    print(f"read {read() - before} bytes for {here} of {whole}", flush=True)
    expected = fq.from_pretrained(path)[1]
    for tree in (params, again):
        jax.tree.map(np.testing.assert_array_equal, process_allgather(tree, tiled=True), jax.device_get(expected))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), params, again)


def read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
