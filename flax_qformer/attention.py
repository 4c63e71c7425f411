"""Attention, in the form that is fastest where it runs."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .layers import Dense

SCORES_AT_ONCE = 9 * 2**18
"""Attention scores of a product on a CPU, those of two images of 257 tokens and 16 heads."""

FEWEST_DIVISORS = 4096
"""XLA's CPU compiler turns a division by fewer into a product with their inverses, which it computes first."""

LEAST_PIECES = 2 if jax.__version_info__ < (0, 11) else 1
"""The fewest pieces of an image's queries: JAX 0.10 computes each product of attention on one core."""

# What upstream adds to the self-attention scores of a masked position.
SELF_ATTENTION_MASK = -10000.0
# What it adds in cross-attention: the lowest number of the dtype that the scores are in.
CROSS_ATTENTION_MASK = float(jnp.finfo(jnp.float32).min)


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
        powers, total = _softmax(scores)
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


def _softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The powers, and their sums (..., 1): divided at the end, so that XLA makes attention one loop, on CPU too.

    scores: (..., keys).
    """
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return powers, powers.sum(axis=-1, keepdims=True)


def _in_parts(at_once: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Attend for some images, and of them for some queries, at a time.

    The scores of many are more memory than a C library keeps, and to get it anew from the system, page by page, takes
    longer than the attention. In the backward pass each part is computed again.

    Args:
      at_once: how to attend where there is little to do, or a mesh.
      arrays: query, key, value, each (batch, tokens, heads, head_dim).
    """
    batch, num_queries, heads, _ = arrays[0].shape
    scores = heads * num_queries * arrays[1].shape[1]  # of an image
    if batch * scores < SCORES_AT_ONCE // 4 or jax.sharding.get_abstract_mesh().size > 1:
        return at_once(*arrays)
    # As many as fit with their queries in halves.
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * scores <= 2 * SCORES_AT_ONCE))
    pieces = min(num_queries, max(LEAST_PIECES, math.ceil(images * scores / SCORES_AT_ONCE)))

    def part(_: None, arrays: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        query, key, value = arrays
        if key.dtype == jnp.float32:
            # Head by head, and then turned: at once XLA's CPU compiler reads them across 12 KiB for every number.
            key = jnp.stack([key[:, :, head] for head in range(heads)], axis=1).swapaxes(1, 2)
        query, key, value = (x.swapaxes(1, 2).reshape(images * heads, *x.shape[1::2]) for x in (query, key, value))

        def piece(query: jax.Array) -> jax.Array:
            context = jax.checkpoint(_of_heads)(query, key, value)
            return context.reshape(images, heads, *context.shape[1:]).swapaxes(1, 2)

        return None, jnp.concatenate([piece(some) for some in jnp.array_split(query, pieces, axis=1)], axis=1)

    # XLA runs a loop's rounds one after the other, and what is in one round side by side.
    parts = tuple(x.reshape(-1, images, *x.shape[1:]) for x in arrays)
    _, context = jax.lax.scan(part, None, parts, unroll=4)
    return context.reshape(arrays[0].shape)


def _of_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention over one axis of heads and images: of two, one of length 1 would keep XLA from making it one loop.

    query: (n, queries, head_dim), key, value: (n, keys, head_dim) -> the shape of the query.
    """
    scores = jnp.einsum("nqd,nkd->nqk", query, key, preferred_element_type=jnp.float32)
    powers, total = _softmax(scores)
    context = jnp.einsum("nqk,nkd->nqd", powers.astype(query.dtype), value, preferred_element_type=jnp.float32)
    # As many divisors as numbers are divided in the loop (an infinite one becomes NaN).
    divisor = total + 0 * context if total.size < FEWEST_DIVISORS else total
    return (context / divisor).astype(query.dtype)


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
    context, key_kernel, value_kernel = (
        x.astype(dtype) for x in (context, to_key.whole_kernel(), to_value.whole_kernel())
    )
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
