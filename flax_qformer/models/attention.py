"""Attention: the plain algorithm. `kernels` has faster forms for some platforms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_qformer.models import kernels
from flax_qformer.models.layers import Dense

# Upstream's bias on the self-attention scores of a masked position.
SELF_ATTENTION_MASK = -10000.0
# Upstream's bias in cross-attention: the lowest number of the scores' dtype.
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
    """`softmax(query @ key.T + bias) @ value`, and the softmax. Under `jax.jit`, an unused softmax costs nothing.

    Args:
      query: (batch, queries, heads, head_dim), scaled.
      key, value: (batch, keys, heads, head_dim), or (batch, keys, head_dim) if all heads share them.
      bias: added to the scores, broadcast to (batch, heads, queries, keys).
      head_mask: factor on the weights, broadcast to the same shape; it is not in the returned weights.
      dropout: applied to the weights before their product with the values.

    Returns:
      context (batch, queries, heads, head_dim), and weights (batch, heads, queries, keys), both in the query's dtype.
    """

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = "bkhd" if key.ndim == 4 else "bkd"
        scores = jnp.einsum(f"bqhd,{keys}->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            scores += bias
        weights = jax.nn.softmax(scores).astype(query.dtype)
        used = weights if dropout is None else dropout(weights)
        if head_mask is not None:
            used *= head_mask.astype(used.dtype)
        return jnp.einsum(f"bhqk,{keys}->bqhd", used, value), weights

    context, weights = attend(query, key, value)
    if bias is None and head_mask is None and dropout is None and key.ndim == 4:
        context = kernels.attend(query, key, value, plain=lambda *arrays: attend(*arrays)[0])
    return context, weights


def attention_without_keys(
    query: jax.Array, context: jax.Array, to_key: Dense, to_value: Dense, *, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`dot_product_attention` to a context, without computing the context's keys and values.

    The keys' kernel projects the queries to the context's width; the values' kernel projects the attended context to
    the heads. For few queries this is less work. The keys' bias adds the same number to all scores of a query, so the
    softmax cancels it. The weights sum to one, so the values' bias passes through.

    Args:
      query: (batch, queries, heads, head_dim), scaled.
      context: (batch, keys, width)
      to_key, to_value: width to (heads, head_dim).
    """
    dtype, accumulate = query.dtype, {"preferred_element_type": jnp.float32}
    context, key_kernel, value_kernel = (
        x.astype(dtype) for x in (context, to_key.whole_kernel(), to_value.whole_kernel())
    )
    # The products put batch axes first, so this order needs no copy.
    query = jnp.einsum("bqhd,whd->hbqw", query, key_kernel, **accumulate).astype(dtype).transpose(1, 2, 0, 3)
    found, weights = dot_product_attention(query, context, context, bias=bias)
    attended = jnp.einsum("bqhw,whd->hbqd", found, value_kernel, **accumulate).transpose(1, 2, 0, 3)
    return (attended + to_value.bias).astype(dtype), weights


def mask_bias(mask: jax.Array, masked: float) -> jax.Array:
    """The bias on attention scores for a mask of ones (attend) and zeros (mask out).

    mask: (batch, keys) or (batch, queries, keys) -> (batch, 1, 1 or queries, keys), float32.
    """
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None, :, :]
    return (1.0 - mask.astype(jnp.float32)) * masked
