"""Attention: the plain algorithm. `kernels` has faster forms for some platforms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_qformer.models import kernels
from flax_qformer.models.layers import Dense

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
        powers, total = kernels.softmax_parts(scores)
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
        context = kernels.attend(query, key, value, plain=context_alone)
    return context, weights


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
