"""Faster forms of the same functions, one for each platform that needs it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SCORES_AT_ONCE = 9 * 2**18
"""Attention scores computed at once on a CPU: those of two images of 257 tokens and 16 heads."""

FEWEST_DIVISORS = 4096
"""With fewer divisors XLA's CPU compiler does not fuse the division: it multiplies by precomputed inverses."""

LEAST_PIECES = 2 if jax.__version_info__ < (0, 11) else 1
"""Minimum number of pieces of an image's queries. JAX 0.10 computes each attention product on one core."""


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, plain: Callable[..., jax.Array]) -> jax.Array:
    """Attention without bias, masks and dropout, in the fastest form for the platform.

    Args:
      query, key, value: (batch, tokens, heads, head_dim), the query scaled.
      plain: computes the same on any platform.

    Returns:
      (batch, queries, heads, head_dim) in the query's dtype.
    """
    forms: dict[str, Callable[..., jax.Array]] = {"cpu": partial(_in_parts, plain)}
    if _cudnn_takes(query):
        forms["cuda"] = _cudnn
    return jax.lax.platform_dependent(query, key, value, **forms, default=plain)


def product_dtype(dtype: DTypeLike) -> DTypeLike:
    """Dtype of a product's result: float32; on a GPU `dtype`, so that the GPU's libraries fuse the bias."""
    return dtype if jax.default_backend() == "gpu" else jnp.float32


def product(x: jax.Array, kernel: jax.Array, axes: int, result: DTypeLike) -> jax.Array:
    """Product over the last `axes` axes of x and the first `axes` axes of a kernel, in the dtype `result`."""
    before, out_shape = x.shape[: x.ndim - axes], kernel.shape[axes:]
    if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        # As matrices: with more axes XLA's CPU compiler transposes the kernel's gradient and its inputs. On a TPU the
        # reshape would copy the kernels.
        width = math.prod(kernel.shape[:axes])
        x, kernel, axes = x.reshape(math.prod(before), width), kernel.reshape(width, math.prod(out_shape)), 1
    contracted = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    y = jax.lax.dot_general(x, kernel, (contracted, ((), ())), preferred_element_type=result)
    return y.reshape(*before, *out_shape)


def softmax_parts(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unnormalised softmax weights and their row sums (..., 1); dividing last lets XLA fuse.

    scores: (..., keys).
    """
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return powers, powers.sum(axis=-1, keepdims=True)


def _in_parts(at_once: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Attention in parts: some images, and some of their queries, at a time.

    All scores at once need more memory than the C library keeps, and getting it from the system page by page takes
    longer than the attention. The backward pass recomputes each part.

    Args:
      at_once: attention in one piece, for small inputs and on a mesh.
      arrays: query, key, value, each (batch, tokens, heads, head_dim).
    """
    batch, num_queries, heads, _ = arrays[0].shape
    scores = heads * num_queries * arrays[1].shape[1]  # per image
    if batch * scores < SCORES_AT_ONCE // 4 or jax.sharding.get_abstract_mesh().size > 1:
        return at_once(*arrays)
    # Largest divisor of the batch whose scores fit.
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * scores <= 2 * SCORES_AT_ONCE))
    pieces = min(num_queries, max(LEAST_PIECES, math.ceil(images * scores / SCORES_AT_ONCE)))

    def part(_: None, arrays: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        query, key, value = arrays
        if key.dtype == jnp.float32:
            # Transposing per head avoids strided reads.
            key = jnp.stack([key[:, :, head] for head in range(heads)], axis=1).swapaxes(1, 2)
        query, key, value = (x.swapaxes(1, 2).reshape(images * heads, *x.shape[1::2]) for x in (query, key, value))

        def piece(query: jax.Array) -> jax.Array:
            context = jax.checkpoint(_of_heads)(query, key, value)
            return context.reshape(images, heads, *context.shape[1:]).swapaxes(1, 2)

        return None, jnp.concatenate([piece(some) for some in jnp.array_split(query, pieces, axis=1)], axis=1)

    # XLA runs a loop's iterations in sequence, and the operations of one iteration in parallel.
    parts = tuple(x.reshape(-1, images, *x.shape[1:]) for x in arrays)
    _, context = jax.lax.scan(part, None, parts, unroll=4)
    return context.reshape(arrays[0].shape)


def _of_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention with heads and images as one axis. With two axes, XLA does not fuse it if one has length 1.

    query: (n, queries, head_dim), key, value: (n, keys, head_dim) -> the shape of the query.
    """
    scores = jnp.einsum("nqd,nkd->nqk", query, key, preferred_element_type=jnp.float32)
    powers, total = softmax_parts(scores)
    context = jnp.einsum("nqk,nkd->nqd", powers.astype(query.dtype), value, preferred_element_type=jnp.float32)
    # One divisor for each number, so that XLA fuses the division (an infinite divisor becomes NaN).
    divisor = total + 0 * context if total.size < FEWEST_DIVISORS else total
    return (context / divisor).astype(query.dtype)


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
