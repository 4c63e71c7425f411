"""Faster forms of plain functions, one for each platform that needs it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

SCORES_AT_ONCE = 9 * 2**18
"""Attention scores computed at once on a CPU: those of two images of 257 tokens and 16 heads."""

FLASH_TOKENS = 1024
"""The fewest queries and keys for which a TPU uses a flash kernel, so that the scores stay on the chip."""

LANES = 128
"""Lanes of a TPU's vector register: the kernel's widths and lengths must be multiples of it."""


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, plain: Callable[..., jax.Array]) -> jax.Array:
    """Attention without bias, masks and dropout, in the fastest form for the platform.

    Args:
      query, key, value: (batch, tokens, heads, head_dim), the query scaled.
      plain: computes the same on any platform.

    Returns:
      (batch, queries, heads, head_dim) in the query's dtype.
    """
    forms: dict[str, Callable[..., jax.Array]] = {"cpu": partial(_some_scores_at_a_time, plain)}
    if min(query.shape[1], key.shape[1]) >= FLASH_TOKENS:
        forms["tpu"] = _flash_on_mesh
    if _cudnn_takes(query):
        forms["cuda"] = _cudnn
    return jax.lax.platform_dependent(query, key, value, **forms, default=plain)


def _some_scores_at_a_time(
    plain: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    """Attention whose scores stay in the caches; the gradient computes them again."""
    batch, num_queries, heads, _ = query.shape
    rows = SCORES_AT_ONCE // max(1, heads * key.shape[1]) or 1
    if batch * num_queries <= rows or jax.sharding.get_abstract_mesh().size > 1:
        return plain(query, key, value)
    if rows < num_queries:

        def one_image(arrays: tuple[jax.Array, ...]) -> jax.Array:
            query, key, value = arrays
            one_query = jax.checkpoint(lambda row: plain(row[None, None], key[None], value[None])[0, 0])
            return jax.lax.map(one_query, query, batch_size=rows)

        return jax.lax.map(one_image, (query, key, value))
    one = jax.checkpoint(lambda image: plain(*(x[None] for x in image))[0])
    return jax.lax.map(one, (query, key, value), batch_size=max(1, rows // num_queries))


def _flash_on_mesh(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`_flash`; on a mesh, each device runs it on its examples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return _flash(query, key, value)
    batch_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()
    batch, heads = query.shape[0], query.shape[2]
    for axis in mesh.auto_axes:
        size = mesh.shape[axis]
        if axis == "tensor" and heads % size == 0:
            head_axes = (axis,)
        elif axis != "tensor" and batch % size == 0:
            batch_axes, batch = (*batch_axes, axis), batch // size
    spec = PartitionSpec(batch_axes, None, head_axes)
    sharded = jax.shard_map(
        _flash, in_specs=(spec, spec, spec), out_specs=spec, axis_names=set(mesh.auto_axes), check_vma=False
    )
    return sharded(query, key, value)


def _flash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """JAX's own flash kernel for TPUs: its arrays are (batch, heads, tokens, head_dim), padded to whole lanes."""
    from jax.experimental.pallas.ops.tpu import flash_attention

    batch, num_queries, _, head_dim = query.shape
    num_keys = key.shape[1]

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, -head_dim % LANES)))

    query, key, value = map(padded, (query, key, value))
    segments = None
    if key.shape[2] > num_keys:
        # Queries attend to the keys of their own segment only.
        positions = jnp.broadcast_to(jnp.arange(key.shape[2]), (batch, key.shape[2]))
        segments = flash_attention.SegmentIds(
            jnp.zeros((batch, query.shape[2]), jnp.int32), (positions >= num_keys).astype(jnp.int32)
        )
    context = flash_attention.flash_attention(
        query, key, value, segment_ids=segments, block_sizes=_flash_blocks(query.shape[2], key.shape[2], query.shape[3])
    )
    return context[:, :, :num_queries, :head_dim].swapaxes(1, 2)


def _flash_blocks(num_queries: int, num_keys: int, width: int) -> Any:
    """Block sizes that fit into the 16 MB of a TPU's vector memory that a kernel may use.

    With all keys in one block, the kernel needs no running maximum. 4,096 keys of 128 lanes fit.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention

    def block(length: int, most: int) -> int:
        return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)

    keys = block(num_keys, 4096 * LANES // width)
    few_queries, few_keys = block(num_queries, 512), block(num_keys, 512 * LANES // width)
    return flash_attention.BlockSizes(
        block_q=block(num_queries, 256),
        block_k_major=keys,
        block_k=keys,
        block_b=1,
        block_q_major_dkv=few_queries,
        block_k_major_dkv=few_keys,
        block_q_dkv=few_queries,
        block_k_dkv=few_keys,
        block_q_dq=few_queries,
        block_k_major_dq=few_keys,
        block_k_dq=few_keys,
    )


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
