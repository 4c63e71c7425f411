"""How an encoder runs its layers: those that are alike traced once, computed again for the gradient, or in a loop."""

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
    """Raise InputError where an encoder's parameters are stacked and it runs no loop, or the other way round."""
    names = encoder.variables.get("params", {})
    if names and ("layers" in names) != is_scanned:
        form, remedy = ("apart", "fq.stack_layers") if is_scanned else ("stacked", "fq.unstack_layers")
        raise InputError(f"the parameters' layers are {form}, and `scan_layers` is {is_scanned}; take {remedy}(params)")


def layer_runner(recompute: bool) -> Callable[..., Any]:
    """Make what runs an encoder's layers, as functions of arrays: (layer, activations, rest) -> what the layer returns.

    Under `jax.jit`, layers that are alike are traced once. What looks on meanwhile (`nn.intercept_methods`, names in a
    profile) sees layers without their name and place, and there only the first of those that are alike. The function
    is made anew for each call of an encoder, so that nothing is left of what others called for. Without `jax.jit` each
    call would compile it, under `jax.grad` too.

    Not by `nn.jit`, which counts dropouts under a hash of the module: a later class may have it too, where it comes to
    the same place in memory, and would then drop something else than it should.

    A layer with a mutable collection (`init`, `capture_intermediates`) runs as it is, and draws other dropout.

    Args:
      recompute: see `recomputed`.
    """

    def apply(layer: Block, activations: tuple, rest: tuple, params: Any, rngs: dict[str, jax.Array]) -> Any:
        return layer.apply({"params": params}, *activations, *rest, rngs=rngs)

    # Under jit, and only there, even what depends on no argument is traced.
    function = jax.jit(apply, static_argnums=0) if isinstance(jnp.zeros(()), jax.core.Tracer) else apply
    if recompute:
        function = recomputed(function)

    def run(layer: Block, activations: tuple, rest: tuple = ()) -> Any:
        assert layer.scope is not None
        if not layer.scope.mutable:
            # Each run has a key of its own: Flax counts them, and takes the stream `params` for want of `dropout`.
            is_drawn = layer.has_rng("dropout") or layer.has_rng("params")
            rngs = {"dropout": layer.make_rng("dropout")} if is_drawn else {}
            params = layer.variables.get("params", {})
            # Where a parameter is missing or misshapen, the layer itself says in which layer.
            with suppress(ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError):
                return function(layer.clone(parent=None, name=None), activations, rest, params, rngs)
        return layer(*activations, *rest)

    return run


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """In the backward pass, run a function again instead of keeping what it computed.

    This is `jax.checkpoint`, but it saves memory on CPU too: XLA's CPU compiler drops the barrier that should keep the
    two runs apart and merges them. Here the second run starts from the activations plus a zero that comes from the
    gradient, so that no compiler can tell it for the first. Forward-mode differentiation is not defined.

    Args:
      function: of something static, activations (a tuple of arrays or None), and further trees of arrays. Of what it
        returns, the first part is an array.
    """

    def forward(static: Any, *arguments: Any) -> tuple[Any, Any]:
        return function(static, *arguments), arguments

    def backward(static: Any, arguments: Any, gradients: Any) -> Any:
        activations, *others = arguments
        zero = jnp.minimum(jnp.abs(gradients[0][:, :1, :1]), 0)  # of each image, lest chips exchange it
        activations = jax.tree.map(lambda x: x + zero[:: len(zero) // len(x)].astype(x.dtype), activations)
        return jax.vjp(partial(function, static), activations, *others)[1](gradients)

    again = jax.custom_vjp(function, nondiff_argnums=(0,))
    again.defvjp(forward, backward)
    return again


def scanned(encoder: Block, length: int, x: jax.Array, each: Any, run: Callable[[Any, jax.Array, Any], tuple]) -> tuple:
    """Run a short encoder `length` times over, each time with parameters of its own: XLA compiles it once.

    Args:
      encoder: whose parameters get a leading axis of that length, under its name.
      each: a tree of arrays with that leading axis, one row for each run.
      run: (encoder, x, row) -> the next x, and a tree of what else comes out.

    Returns:
      The last x, and the trees with a leading axis. What of them nobody uses, XLA leaves out.
    """
    scan = nn.scan(
        run,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        unroll=rounds_at_once(length),
    )
    return scan(encoder, x, each)
