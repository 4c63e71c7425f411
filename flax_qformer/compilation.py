"""How XLA compiles, and how the C library keeps memory, on the machine that runs the program.

glibc returns a large block to the system when it is freed, such as the temporaries of a training step, and gets it
again page by page, which takes a tenth of a step and more. Other C libraries behave as they do by default.
"""

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import jax


def compiler_options() -> dict[str, str | bool]:
    """For `jax.jit`, by the default backend.

    On a CPU an order of operations that needs a third to a sixth of the temporaries, and less time; not in a job of
    several processes, which in that order would meet in different collectives. On a GPU the products of its libraries
    alone, which take in bias and residual and are faster than XLA's own.
    """
    if jax.default_backend() == "gpu":
        return {"xla_gpu_enable_triton_gemm": False}
    if is_on_cpu() and jax.process_count() == 1:
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return {}


def is_on_cpu() -> bool:
    """Whether programs run on a CPU, where nothing runs while the host waits."""
    return jax.default_backend() == "cpu"


def rounds_at_once(length: int) -> int:
    """How many of a loop's rounds to write out, as `unroll` of `jax.lax.scan`: one, where XLA keeps the loop's order.

    In a job of several processes on CPU all, so that no loop is left: XLA's CPU runtime takes a loop for done when it
    has begun, and the collective after it runs before or between the rounds, as threads will. Processes that differ in
    that wait for each other in different collectives, for ever.
    """
    return length if is_on_cpu() and jax.process_count() > 1 else 1


# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def share_heap() -> None:
    """Give all threads one heap, the only one in which glibc keeps large blocks; call it before there are threads."""
    _call("mallopt", M_ARENA_MAX, 1)


@functools.cache
def keep_memory() -> None:
    """Keep what is freed from now on, in the heap of `share_heap`; call it when what repeats has run once.

    In that first run blocks above 32 MiB lie outside the heap. Inside it, small ones that stay would come to lie right
    behind a large one. glibc (2.36) asks for a few bytes more to align a block and does not put them back when it is
    freed, so that its place would be too small for the next of that size, which would take a second one.
    """
    _call("mallopt", M_MMAP_MAX, 0)
    _call("mallopt", M_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Give back what is free, such as compiling or an evaluation leaves.

    Call it after what comes between the runs of what repeats: that takes of the places that `keep_memory` keeps, and
    what of it stays makes them too small.
    """
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    """Call a function that glibc has, and others need not."""
    function_of_glibc = getattr(ctypes.CDLL(None), function, None)
    if function_of_glibc is not None:
        function_of_glibc(*arguments)


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX's own variables say where, or not at all."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    # Without a home or a place to write, programs are compiled each time.
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_qformer"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            settings.update("jax_compilation_cache_dir", str(folder))
