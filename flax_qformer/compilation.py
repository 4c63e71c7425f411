"""How XLA compiles, and how the C library keeps memory, on the machine that runs the program.

glibc returns a large block to the system when it is freed, such as the temporaries of a training step, and gets it
again page by page, which takes a tenth of a step and more. Other C libraries behave as they do by default.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


def compiler_options() -> dict[str, str | bool]:
    """Compiler options for `jax.jit` on the default backend.

    On a CPU the memory-optimized schedule needs a third to a sixth of the temporaries, and less time. In a job of
    several processes it is off: each process could then wait in another collective. On a GPU, Triton's products are
    off: those of the GPU's libraries fuse bias and residual and are faster.
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
    """The `unroll` of `jax.lax.scan`: 1, but the whole length in a CPU job of several processes.

    XLA's CPU runtime treats a loop as finished once it has started, so a collective after the loop can run between its
    iterations. Processes that differ in this order wait for each other in different collectives, forever.
    """
    return length if is_on_cpu() and jax.process_count() > 1 else 1


# From glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65536


def share_heap() -> None:
    """Give all threads one heap, the only one in which glibc keeps large blocks. Call it before threads start."""
    _call("mallopt", M_ARENA_MAX, 1)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep memory that is freed within the block for the next step, and return it to the system at the end.

    It works in a program that has called `share_heap`, as `flax-qformer` does. Enter it when all arrays of a run are
    loaded: what loading frees is not kept.
    """
    _call("mallopt", M_MMAP_MAX, 0)
    _call("mallopt", M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _call("mallopt", M_MMAP_MAX, DEFAULT_MMAP_MAX)
        _call("mallopt", M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
        _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    """Call a function of glibc, if the C library has it."""
    function_of_glibc = getattr(ctypes.CDLL(None), function, None)
    if function_of_glibc is not None:
        function_of_glibc(*arguments)


def keep_programs() -> None:
    """Cache compiled programs in the user's cache folder, unless JAX's own variables name a folder or disable that."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    # Without a home or a writable folder, nothing is cached.
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_qformer"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            settings.update("jax_compilation_cache_dir", str(folder))
