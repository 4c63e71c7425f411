"""Memory is kept between runs of a program, and returned to the system at the end."""

import os
import subprocess
import sys

import pytest

# The fewest page faults of eight runs, each with a result of 256 MiB: under load, a run may start before the previous
# result is freed.
# Then the MiB that are returned.
PROGRAM = """
import contextlib
import resource
import time
from pathlib import Path
from flax_qformer.compilation import kept_memory, share_heap

{first}
import jax
import jax.numpy as jnp

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

run = jax.jit(lambda x: x @ x.T)
faults = []
with {block}:
    for i in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run(jnp.ones((8192, 2))).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # The last result may be freed a little later.
    time.sleep(1)
    before = resident()
print(min(faults), before - resident())
"""


def run(first: str, block: str) -> list[float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    program = [sys.executable, "-c", PROGRAM.format(first=first, block=block)]
    answer = subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(number) for number in answer.split()]


@pytest.mark.slow
@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_freed_memory_is_kept_until_the_block_ends() -> None:
    faults, _ = run("", "contextlib.nullcontext()")
    assert faults > 10_000
    faults, returned = run("share_heap()", "kept_memory()")
    assert faults < 1_000
    assert returned > 200
