"""Memory is kept between runs of a program, and returned to the system on request."""

import os
import subprocess
import sys

import pytest

# The fewest page faults of eight runs, each with a result of 256 MiB: under load, a run may start before the previous
# result is freed.
# Then the MiB that are returned.
PROGRAM = """
import resource
import time
from pathlib import Path
from flax_qformer.compilation import give_back, keep_memory, share_heap

{first}
import jax
import jax.numpy as jnp

run = jax.jit(lambda x: x @ x.T)
faults = []
for i in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(jnp.ones((8192, 2))).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    {then}

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

# The last result, too, may be freed a little later.
before, end = resident(), time.monotonic() + 3
while before - resident() < 200 and time.monotonic() < end:
    give_back()
    time.sleep(0.05)
print(min(faults), before - resident())
"""


def run(first: str, then: str) -> list[float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    program = [sys.executable, "-c", PROGRAM.format(first=first, then=then)]
    answer = subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(number) for number in answer.split()]


@pytest.mark.slow
@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    faults, _ = run("", "")
    assert faults > 10_000
    faults, given_back = run("share_heap()", "keep_memory()")
    assert faults < 1_000
    assert given_back > 200
