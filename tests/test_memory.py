"""Memory is kept from one run of a program to the next."""

import os
import subprocess
import sys

import pytest

# The least page faults of eight runs, each with a result of 256 MiB: under load one may begin before the last is freed.
PROGRAM = """
import resource
from flax_qformer.memory import keep_memory, share_heap

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
print(min(faults))
"""


def page_faults(first: str, then: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    program = [sys.executable, "-c", PROGRAM.format(first=first, then=then)]
    return int(subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="it is glibc that is told")
def test_what_is_freed_is_kept() -> None:
    assert page_faults("", "") > 10_000
    assert page_faults("share_heap()", "keep_memory()") < 1_000
