"""Faster forms of plain functions, one for each platform that needs it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

SCORES_AT_ONCE = 9 * 2**18
"""Attention scores computed at once on a CPU: those of two images of 257 tokens and 16 heads."""


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, plain: Callable[..., jax.Array]) -> jax.Array:
    """Attention without bias, masks and dropout, in the fastest form for the platform.

    Args:
      query, key, value: (batch, tokens, heads, head_dim), the query scaled.
      plain: computes the same on any platform.

    Returns:
      (batch, queries, heads, head_dim) in the query's dtype.
    """
    forms: dict[str, Callable[..., jax.Array]] = {"cpu": partial(_some_images_at_a_time, plain)}
    if _cudnn_takes(query):
        forms["cuda"] = _cudnn
    return jax.lax.platform_dependent(query, key, value, **forms, default=plain)


def _some_images_at_a_time(plain: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Attention whose scores stay in the caches; the gradient computes them again."""
    batch, num_queries, heads, _ = arrays[0].shape
    images = max(1, SCORES_AT_ONCE // (heads * num_queries * arrays[1].shape[1]))
    if batch <= images or jax.sharding.get_abstract_mesh().size > 1:
        return plain(*arrays)
    one = jax.checkpoint(lambda image: plain(*(x[None] for x in image))[0])
    return jax.lax.map(one, arrays, batch_size=images)


def _cudnn_takes(query: jax.Array) -> bool:
    """Whether cuDNN's attention supports these queries: half precision, on NVIDIA GPUs since Ampere."""
    device, head_dim = jax.devices()[0], query.shape[-1]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind or float(device.compute_capability) < 8:
        return False
    return query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


@jax.custom_vjp
def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")


def _cudnn_with_gradient(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`_cudnn` for gradients. cuDNN has them for even lengths only, so odd lengths are padded and passed along."""
    lengths: dict[str, Any] = {}
    batch, num_queries, num_keys = *query.shape[:2], key.shape[1]
    if num_queries % 2 or num_keys % 2:
        query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
        counts = {"query_seq_lengths": num_queries, "key_value_seq_lengths": num_keys}
        lengths = {name: jnp.full(batch, count, jnp.int32) for name, count in counts.items()}
    context = jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn", **lengths)
    return context[:, :num_queries]


_cudnn.defvjp(partial(jax.vjp, _cudnn_with_gradient), lambda pullback, gradient: pullback(gradient))
