"""How an encoder runs its layers: equal layers traced once, recomputed for the gradient, or scanned."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError

from flax_qformer.compilation import rounds_at_once
from flax_qformer.errors import InputError
from flax_qformer.models.layers import Block


def check_stacked(encoder: Block, is_scanned: bool) -> None:
    """Raise InputError if parameters are stacked without `scan_layers`, or not stacked with it."""
    names = encoder.variables.get("params", {})
    if names and ("layers" in names) != is_scanned:
        form, remedy = ("apart", "fq.stack_layers") if is_scanned else ("stacked", "fq.unstack_layers")
        raise InputError(f"the parameters' layers are {form}, and `scan_layers` is {is_scanned}; take {remedy}(params)")


def layer_runner(recompute: bool) -> Callable[..., Any]:
    """Make a function that runs an encoder's layers: (layer, activations, rest) -> the layer's outputs.

    Under `jax.jit`, equal layers are traced once. `nn.intercept_methods` and profiles then lose layer names, and see
    only the first of equal layers. Each call of an encoder makes a new function, so calls share no cache. Without
    `jax.jit`, also under `jax.grad`, layers run directly, since each call would compile the function.

    `nn.jit` is not used: it counts dropouts by a hash of the module. A later module at the same place in memory can
    have the same hash, and would draw a wrong mask.

    A layer with a mutable collection (`init`, `capture_intermediates`) runs directly, with other dropout masks.

    Args:
      recompute: see `recomputed`.
    """

    def apply(layer: Block, activations: tuple, rest: tuple, params: Any, rngs: dict[str, jax.Array]) -> Any:
        return layer.apply({"params": params}, *activations, *rest, rngs=rngs)

    # Only under jit are constants traced.
    function = jax.jit(apply, static_argnums=0) if isinstance(jnp.zeros(()), jax.core.Tracer) else apply
    if recompute:
        function = recomputed(function)

    def run(layer: Block, activations: tuple, rest: tuple = ()) -> Any:
        assert layer.scope is not None
        if not layer.scope.mutable:
            # One key for each run. Flax counts them, and uses the stream `params` if there is no `dropout`.
            is_drawn = layer.has_rng("dropout") or layer.has_rng("params")
            rngs = {"dropout": layer.make_rng("dropout")} if is_drawn else {}
            params = layer.variables.get("params", {})
            # If a parameter is missing or misshapen, run the layer itself: its error names the layer.
            with suppress(ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError):
                return function(layer.clone(parent=None, name=None), activations, rest, params, rngs)
        return layer(*activations, *rest)

    return run


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Recompute a function in the backward pass instead of keeping its intermediate values.

    Unlike `jax.checkpoint`, it also saves memory on a CPU: XLA's CPU compiler drops the barrier of `jax.checkpoint` and
    merges the two runs. Here the second run starts from the activations plus a zero computed from the gradient, so no
    compiler can merge it with the first. There is no forward-mode derivative.

    Args:
      function: (static, activations, *trees of arrays) -> a tuple whose first item is an array. Activations are a tuple
        of arrays or None.
    """

    def forward(static: Any, *arguments: Any) -> tuple[Any, Any]:
        return function(static, *arguments), arguments

    def backward(static: Any, arguments: Any, gradients: Any) -> Any:
        activations, *others = arguments
        zero = jnp.minimum(jnp.abs(gradients[0][:, :1, :1]), 0)  # per image, so that no collective is needed
        activations = jax.tree.map(lambda x: x + zero[:: len(zero) // len(x)].astype(x.dtype), activations)
        return jax.vjp(partial(function, static), activations, *others)[1](gradients)

    again = jax.custom_vjp(function, nondiff_argnums=(0,))
    again.defvjp(forward, backward)
    return again


def scanned(encoder: Block, length: int, x: jax.Array, each: Any, run: Callable[[Any, jax.Array, Any], tuple]) -> tuple:
    """Run a short encoder `length` times, each time with its own parameters. XLA compiles it once.

    Args:
      encoder: its parameters get a leading axis of that length, under its name.
      each: a tree of arrays with that leading axis, one row for each run.
      run: (encoder, x, row) -> the next x, and a tree of further outputs.

    Returns:
      The last x, and the trees with a leading axis. XLA drops unused outputs.
    """
    scan = nn.scan(
        run,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        unroll=rounds_at_once(length),
    )
    return scan(encoder, x, each)
