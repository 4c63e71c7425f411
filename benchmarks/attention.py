"""Alternative implementations of attention, at the sizes of the published geometry.

    python benchmarks/attention.py

Runs all layers of a tower, each with the previous result as its queries. Prints medians in milliseconds.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flax_qformer.models.attention import attention_without_keys, dot_product_attention
from flax_qformer.models.config import BLIP_DIFFUSION
from flax_qformer.models.layers import Dense
from side_by_side import in_turn, seconds

VISION, QFORMER = BLIP_DIFFUSION.vision_config, BLIP_DIFFUSION.qformer_config
Way = Callable[..., jax.Array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| dtype, batch | " + " | ".join([*CROSS, *SELF]) + " |")
    print("| --- " * (1 + len(CROSS) + len(SELF)) + "|")
    for dtype in options.dtypes:
        for size in options.batch_sizes:
            runs = compiled(CROSS, cross_inputs(size, dtype)) | compiled(SELF, self_inputs(size, dtype))
            figures = in_turn(options.rounds, {name: partial(seconds, run, 2) for name, run in runs.items()})
            medians = " | ".join(f"{1e3 * statistics.median(figures[name]):.0f}" for name in runs)
            print(f"| {dtype}, {size} | {medians} |", flush=True)


def compiled(ways: dict[str, Way], inputs: tuple[jax.Array, ...]) -> dict[str, Callable[[], jax.Array]]:
    return {name: partial(jax.jit(way).lower(*inputs).compile(), *inputs) for name, way in ways.items()}


def drawn(dtype: str, *shape: int) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(0), shape, dtype)


def cross_inputs(size: int, dtype: str) -> tuple[jax.Array, ...]:
    """Queries (batch, queries, heads, head_dim), context (batch, keys, width), kernels of all layers."""
    heads = (QFORMER.num_attention_heads, QFORMER.head_dim)
    kernels = drawn(dtype, QFORMER.num_hidden_layers, VISION.hidden_size, *heads)
    context = drawn(dtype, size, VISION.num_positions, VISION.hidden_size)
    return drawn(dtype, size, BLIP_DIFFUSION.num_query_tokens, *heads), context, kernels, 2 * kernels


def without_keys(query: jax.Array, context: jax.Array, to_keys: jax.Array, to_values: jax.Array) -> jax.Array:
    heads = query.shape[-2:]
    dense = Dense(context.shape[-1:], heads, dtype=query.dtype, param_dtype=query.dtype)
    for kernels in zip(to_keys, to_values, strict=True):
        to = (dense.bind({"params": {"kernel": kernel, "bias": jnp.zeros(heads, query.dtype)}}) for kernel in kernels)
        query, _ = attention_without_keys(query, context, *to)
    return query


def layer_by_layer(query: jax.Array, context: jax.Array, to_keys: jax.Array, to_values: jax.Array) -> jax.Array:
    project = partial(jnp.einsum, "bkw,whd->bkhd", context)
    for to_key, to_value in zip(to_keys, to_values, strict=True):
        query, _ = dot_product_attention(query, project(to_key), project(to_value))
    return query


def one_product(query: jax.Array, context: jax.Array, to_keys: jax.Array, to_values: jax.Array) -> jax.Array:
    both = jnp.concatenate([to_keys, to_values]).transpose(1, 0, 2, 3)
    keys, values = jnp.split(jnp.einsum("bkw,wlhd->lbkhd", context, both), 2)
    for key, value in zip(keys, values, strict=True):
        query, _ = dot_product_attention(query, key, value)
    return query


def self_inputs(size: int, dtype: str) -> tuple[jax.Array, ...]:
    """Queries, keys and values of a tower in one array, (batch, positions, 3, heads, head_dim)."""
    heads = VISION.num_attention_heads
    return (drawn(dtype, size, VISION.num_positions, 3, heads, VISION.hidden_size // heads),)


def in_layers(attend: Way) -> Way:
    def run(qkv: jax.Array) -> jax.Array:
        for _ in range(VISION.num_hidden_layers):
            qkv = qkv.at[:, :, 0].set(attend(*jnp.moveaxis(qkv, 2, 0)))
        return qkv

    return run


def at_once(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """As `dot_product_attention` on a CPU, for all heads and images at once."""
    scores = jnp.einsum("bhqd,bkhd->bhqk", query.swapaxes(1, 2), key, preferred_element_type=jnp.float32)
    powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    context = jnp.einsum("bhqk,bkhd->bhqd", powers.astype(query.dtype), value, preferred_element_type=jnp.float32)
    return (context / powers.sum(axis=-1, keepdims=True)).astype(query.dtype).swapaxes(1, 2)


def softmax_first(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    scores = jnp.einsum("bhqd,bkhd->bhqk", query.swapaxes(1, 2), key, preferred_element_type=jnp.float32)
    context = jnp.einsum("bhqk,bkhd->bhqd", jax.nn.softmax(scores).astype(query.dtype), value)
    return context.swapaxes(1, 2)


CROSS: dict[str, Way] = {
    "cross: without keys": without_keys,
    "keys layer by layer": layer_by_layer,
    "all keys in one product": one_product,
}
SELF: dict[str, Way] = {
    "self: in parts": in_layers(lambda *qkv: dot_product_attention(*qkv)[0]),
    "all heads and images at once": in_layers(at_once),
    "softmax, then product": in_layers(softmax_first),
    "jax.nn.dot_product_attention": in_layers(partial(jax.nn.dot_product_attention, scale=1.0)),
}


if __name__ == "__main__":
    main()
