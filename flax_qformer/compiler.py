"""How XLA is told to compile."""

import jax


def compiler_options() -> dict[str, str | bool]:
    """For `jax.jit`, by the default backend.

    On a CPU an order of operations that needs a third to a sixth of the temporaries, and less time; not in a job of
    several processes, which in that order would meet in different collectives. On a GPU the products of its libraries
    alone, which take in bias and residual and are faster than XLA's own.
    """
    if jax.default_backend() == "gpu":
        return {"xla_gpu_enable_triton_gemm": False}
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return {}


def rounds_at_once(length: int) -> int:
    """How many of a loop's rounds to write out, as `unroll` of `jax.lax.scan`: one, where XLA keeps the loop's order.

    In a job of several processes on CPU all, so that no loop is left: XLA's CPU runtime takes a loop for done when it
    has begun, and the collective after it runs before or between the rounds, as threads will. Processes that differ in
    that wait for each other in different collectives, for ever.
    """
    return length if jax.default_backend() == "cpu" and jax.process_count() > 1 else 1
