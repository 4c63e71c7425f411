"""What every tower shares: the dtype policy, dense layers, LayerNorm, attention.

The policy: parameters live in `param_dtype`, products run in `dtype` and accumulate in float32, LayerNorm statistics
and softmax are float32 whatever the dtype.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from .compiler import rounds_at_once
from .errors import InputError
from .sharding import BATCH

INITIALIZER = nn.initializers.normal(0.02)
"""BERT's and ViT's, for the queries too, as in LAVIS: upstream's are zero, and would stay equal to one another."""

SCORES_AT_ONCE = 9 * 2**18
"""Attention scores of a product on a CPU, those of two images of 257 tokens and 16 heads."""

LEAST_PIECES = 2 if jax.__version_info__ < (0, 11) else 1
"""The fewest pieces of an image's queries: JAX 0.10 computes each product of attention on one core."""

TOKENS_AT_ONCE = 16
"""Image tokens of the whole batch that a chip holds at once, to take those of other chips' images."""

# What upstream adds to the self-attention scores of a masked position.
SELF_ATTENTION_MASK = -10000.0
# What it adds in cross-attention: the lowest number of the dtype that the scores are in.
CROSS_ATTENTION_MASK = float(jnp.finfo(jnp.float32).min)


class Block(nn.Module, kw_only=True):
    """A module under the dtype policy, which its dense layers and LayerNorms inherit."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def policy(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def dense(self, name: str | None, in_shape: tuple[int, ...], out_shape: tuple[int, ...], **details: Any) -> "Dense":
        return Dense(in_shape, out_shape, name=name, **details, **self.policy)

    @nn.nowrap
    def layer_norm(self, name: str, eps: float) -> "LayerNorm":
        return LayerNorm(eps, name=name, **self.policy)

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **details: Any) -> Any:
        """As Flax's, which traces the initializer, whose first argument is the shape, to check that of what is there.

        That takes more than half of a call of a small model without `jax.jit`; here Flax does it where shapes differ.
        """
        if not self.is_initializing():
            value: Any = self.get_variable("params", name)
            if value is not None and init_args[:1] == (np.shape(value),):
                return value
        return super().param(name, init_fn, *init_args, **details)


class Dense(Block):
    """`x @ kernel + bias` over the last axes of x, where each side may have several axes. Source: `nn.Linear`.

    kernel: (*in_shape, *out_shape); bias: out_shape. Accumulates in float32, also in half precision, and what follows,
    bias and activation, is float32 too: on CPU a chain of half-precision operations rounds after each.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use_bias: bool = True
    activation: Callable[[jax.Array], jax.Array] = lambda y: y
    kernel_init: nn.initializers.Initializer = INITIALIZER

    def setup(self) -> None:
        self.kernel = self.param("kernel", self.kernel_init, self.in_shape + self.out_shape, self.param_dtype)
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.out_shape, self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., *in_shape) -> (..., *out_shape) in `dtype`."""
        # A GPU's libraries add the bias within the product, if both are of its dtype.
        result = self.dtype if jax.default_backend() == "gpu" else jnp.float32
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        y = _product(x, kernel, len(self.in_shape), result)
        if self.use_bias:
            y += self.bias.astype(result)
        return keep_batch(self.activation(y.astype(jnp.float32)).astype(self.dtype))


class LayerNorm(Block):
    """Normalisation over the last axis, then scale and bias, by `Block.param`, which Flax's would not use.

    Source: PyTorch's `nn.LayerNorm`; arXiv 1607.06450.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., width) -> the same shape in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        # Not from the mean of squares, which cancels at eps 1e-12.
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias).astype(self.dtype)


def _product(x: jax.Array, kernel: jax.Array, axes: int, result: DTypeLike) -> jax.Array:
    """The product over the last axes of x and the first of a kernel, as many of each."""
    before, out_shape = x.shape[: x.ndim - axes], kernel.shape[axes:]
    if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        # XLA's CPU compiler turns gradients of kernels with more axes wherever it reads them; a TPU copies the kernels.
        width = math.prod(kernel.shape[:axes])
        x, kernel, axes = x.reshape(*before, width), kernel.reshape(width, math.prod(out_shape)), 1
    contracted = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    y = jax.lax.dot_general(x, kernel, (contracted, ((), ())), preferred_element_type=result)
    return y.reshape(*before, *out_shape)


def keep_batch(x: jax.Array) -> jax.Array:
    """Keep the first axis split over the mesh that is set: XLA may else split widths, and sum over the wire."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH[0] if axis in mesh.auto_axes)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)))


def is_batch_split() -> bool:
    """Whether the mesh that is set, if any, gives each chip a part of the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in BATCH[0] if axis in mesh.auto_axes)


def rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]`; on a mesh a few tokens at a time, since every chip gets them of the whole batch to choose from.

    x: (batch, tokens, width), index: (batch,).
    """
    if not is_batch_split():
        return x[index]
    batch, tokens, width = x.shape
    pieces = math.ceil(tokens / TOKENS_AT_ONCE)
    x = jnp.pad(x, ((0, 0), (0, pieces * TOKENS_AT_ONCE - tokens), (0, 0)))
    x = x.reshape(batch, pieces, TOKENS_AT_ONCE, width).swapaxes(0, 1)

    def choose(_: None, piece: jax.Array) -> tuple[None, jax.Array]:
        return None, keep_batch(keep_batch(piece)[index])

    _, chosen = jax.lax.scan(choose, None, x, unroll=rounds_at_once(pieces))
    return chosen.swapaxes(0, 1).reshape(batch, -1, width)[:, :tokens]


def interleaved(*arrays: jax.Array) -> jax.Array:
    """N arrays of (batch, ...) to (N * batch, ...), row by row; each row stays on its chip."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def whole(x: jax.Array) -> jax.Array:
    """Bring all of a parameter to every chip of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if mesh.auto_axes else x


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


def check_stacked(encoder: Block, is_scanned: bool) -> None:
    """Raise InputError where an encoder's parameters are stacked and it runs no loop, or the other way round."""
    names = encoder.variables.get("params", {})
    if names and ("layers" in names) != is_scanned:
        form, remedy = ("apart", "fq.stack_layers") if is_scanned else ("stacked", "fq.unstack_layers")
        raise InputError(f"the parameters' layers are {form}, and scan_layers is {is_scanned}; take {remedy}(params)")


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


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    head_mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Dot-product attention that also returns its weights; under jit they cost nothing where nobody looks at them.

    Args:
      query: (batch, queries, heads, head_dim), scaled.
      key, value: (batch, keys, heads, head_dim), or (batch, keys, head_dim) where all heads share them.
      bias: added to the scores, broadcast to (batch, heads, queries, keys).
      head_mask: factor on the weights, broadcast to the same shape; the returned weights are without it.
      dropout: applied to the weights that reach the values.

    Returns:
      context (batch, queries, heads, head_dim), and weights (batch, heads, queries, keys), both in the query's dtype.
    """

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype, keys = query.dtype, "bkhd" if key.ndim == 4 else "bkd"
        scores = jnp.einsum(f"bhqd,{keys}->bhqk", query.swapaxes(1, 2), key, preferred_element_type=jnp.float32)
        if bias is not None:
            scores += bias
        # The softmax is divided by its sum at the end: XLA then makes all of this one loop over blocks, on CPU too.
        powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        total = powers.sum(axis=-1, keepdims=True)
        used = powers.astype(dtype)
        if dropout is not None:
            used = dropout(used)
        if head_mask is not None:
            used *= head_mask.astype(dtype)
        context = jnp.einsum(f"bhqk,{keys}->bhqd", used, value, preferred_element_type=jnp.float32) / total
        return context.astype(dtype).swapaxes(1, 2), (powers / total).astype(dtype)

    def context_alone(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value)[0]

    context, weights = attend(query, key, value)
    if bias is None and head_mask is None and dropout is None and key.ndim == 4:
        # From the arguments anew, so that no gradient goes the other way.
        ways: dict[str, Callable[..., jax.Array]] = {"cpu": partial(_in_parts, context_alone)}
        if _cudnn_takes(query):
            ways["cuda"] = _cudnn
        context = jax.lax.platform_dependent(query, key, value, **ways, default=context_alone)
    return context, weights


def _in_parts(attend: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Attend for some images, and of them for some queries, at a time.

    The scores of many are more memory than a C library keeps, and to get it anew from the system, page by page, takes
    longer than the attention. In the backward pass each part is computed again.

    arrays: query, key, value, each (batch, tokens, heads, head_dim).
    """
    batch, num_queries, heads, _ = arrays[0].shape
    scores = heads * num_queries * arrays[1].shape[1]  # of an image
    if batch * scores < SCORES_AT_ONCE // 4 or jax.sharding.get_abstract_mesh().size > 1:
        return attend(*arrays)
    # As many as fit with their queries in halves.
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * scores <= 2 * SCORES_AT_ONCE))
    pieces = min(num_queries, max(LEAST_PIECES, math.ceil(images * scores / SCORES_AT_ONCE)))

    def part(_: None, arrays: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        query, key, value = arrays
        if key.dtype == jnp.float32:
            # First head by head, and then turned: at once XLA's CPU compiler reads them across 12 KiB for every number.
            key = jnp.stack([key[:, :, head] for head in range(heads)], axis=1).swapaxes(1, 2)
        queries = jnp.array_split(query, pieces, axis=1)
        return None, jnp.concatenate([jax.checkpoint(attend)(piece, key, value) for piece in queries], axis=1)

    # XLA runs a loop's rounds one after the other, and what is in one round side by side.
    parts = tuple(x.reshape(-1, images, *x.shape[1:]) for x in arrays)
    _, context = jax.lax.scan(part, None, parts, unroll=4)
    return context.reshape(arrays[0].shape)


def _cudnn_takes(query: jax.Array) -> bool:
    """Whether cuDNN's attention is there, and made for such queries: half precision, GPUs of NVIDIA since Ampere."""
    device, head_dim = jax.devices()[0], query.shape[-1]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind or float(device.compute_capability) < 8:
        return False
    return query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


@jax.custom_vjp
def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")


def _cudnn_with_gradient(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The same where a gradient is wanted, which cuDNN has for even lengths: odd ones are padded and told."""
    lengths: dict[str, Any] = {}
    batch, num_queries, num_keys = *query.shape[:2], key.shape[1]
    if num_queries % 2 or num_keys % 2:
        query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
        counts = {"query_seq_lengths": num_queries, "key_value_seq_lengths": num_keys}
        lengths = {name: jnp.full(batch, count, jnp.int32) for name, count in counts.items()}
    context = jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn", **lengths)
    return context[:, :num_queries]


_cudnn.defvjp(partial(jax.vjp, _cudnn_with_gradient), lambda pullback, gradient: pullback(gradient))


def attention_without_keys(
    query: jax.Array, context: jax.Array, to_key: Dense, to_value: Dense, *, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What `dot_product_attention` returns for the keys and values of a context, without making them.

    The queries are brought to the context by the keys' kernel, and what they find there to the heads by the values'.
    That is less work where queries are few. The keys' bias adds the same to all scores of a query, which the softmax
    does not see, and weights sum to one, so that the values' bias passes through.

    Args:
      query: (batch, queries, heads, head_dim), scaled.
      context: (batch, keys, width)
      to_key, to_value: width to (heads, head_dim).
    """
    dtype, accumulate = query.dtype, {"preferred_element_type": jnp.float32}
    context, key_kernel, value_kernel = (x.astype(dtype) for x in (context, to_key.kernel, to_value.kernel))
    # Batch axes first, as the products give them: nothing has to be copied.
    query = jnp.einsum("bqhd,whd->hbqw", query, key_kernel, **accumulate).astype(dtype).transpose(1, 2, 0, 3)
    found, weights = dot_product_attention(query, context, context, bias=bias)
    attended = jnp.einsum("bqhw,whd->hbqd", found, value_kernel, **accumulate).transpose(1, 2, 0, 3)
    return (attended + to_value.bias).astype(dtype), weights


def mask_bias(mask: jax.Array, masked: float) -> jax.Array:
    """Turn a mask of ones (keep) and zeros (leave out) into what is added to attention scores.

    mask: (batch, keys) or (batch, queries, keys) -> (batch, 1, 1 or queries, keys), float32.
    """
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None, :, :]
    return (1.0 - mask.astype(jnp.float32)) * masked
