"""Options of XLA's compiler and of the C library's heap for the machine that runs the program.

glibc returns large freed blocks, such as the temporaries of a training step, to the system. Getting them again page by
page takes a tenth of a step and more. Other C libraries keep their defaults.
"""

import ctypes
import functools

import jax


def compiler_options() -> dict[str, str | bool]:
    """Compiler options for `jax.jit`, by the default backend.

    On a CPU: an order of operations that needs a third to a sixth of the temporaries, and less time. It is not used in
    a job of several processes, where that order differs and collectives would not match. On a GPU: only the products
    of the GPU's libraries, which fuse bias and residual and are faster than XLA's own.
    """
    if jax.default_backend() == "gpu":
        return {"xla_gpu_enable_triton_gemm": False}
    if is_on_cpu() and jax.process_count() == 1:
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return {}


def is_on_cpu() -> bool:
    """Whether programs run on a CPU, which cannot compute while the host works."""
    return jax.default_backend() == "cpu"


def rounds_at_once(length: int) -> int:
    """How many iterations of a loop to unroll, as `unroll` of `jax.lax.scan`: by default one.

    In a job of several processes on CPUs all, so that no loop remains. XLA's CPU runtime treats a loop as done when it
    has started, so a collective after the loop can run between its iterations. Processes in which this differs would
    wait for each other in different collectives forever.
    """
    return length if is_on_cpu() and jax.process_count() > 1 else 1


# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def share_heap() -> None:
    """Make all threads share one heap, the only one where glibc keeps large blocks. Call it before threads start."""
    _call("mallopt", M_ARENA_MAX, 1)


@functools.cache
def keep_memory() -> None:
    """Keep blocks freed from now on in the heap of `share_heap`. Call it after the first of the repeated runs.

    In the first run, blocks above 32 MiB are outside of the heap. Inside it, small lasting blocks would follow a large
    one directly. glibc (2.36) adds a few bytes to align a block and loses them when it is freed, so the gap would be
    too small for the next block of that size, which would need a second gap.
    """
    _call("mallopt", M_MMAP_MAX, 0)
    _call("mallopt", M_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Return free memory to the system, such as compiling or an evaluation leaves.

    Call it after other work between the repeated runs: other allocations fragment the memory that `keep_memory` keeps.
    """
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    """Call a function of glibc, if the C library has it."""
    function_of_glibc = getattr(ctypes.CDLL(None), function, None)
    if function_of_glibc is not None:
        function_of_glibc(*arguments)
