"""Partition rules: which axis of a parameter is sharded over which axis of the mesh."""

import re
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_qformer.parallel.mesh import check_axes

Tree = TypeVar("Tree")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"self_attn/qkv/kernel", ("fsdp", None, "tensor", None)),
    (r"self_attn/qkv/bias", (None, "tensor", None)),
    (r"attention/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias", ("tensor", None)),
    (r"(self_attn/projection|(cross)?attention/output/dense)/kernel", ("tensor", None, "fsdp")),
    (r"(fc1|intermediate(_query)?/dense|proj_layer/dense1)/kernel", ("fsdp", "tensor")),
    (r"(fc1|intermediate(_query)?/dense|proj_layer/dense1)/bias", ("tensor",)),
    (r"(fc2|output(_query)?/dense|proj_layer/dense2)/kernel", ("tensor", "fsdp")),
    (r"(word|position)_embeddings/embedding", (None, "fsdp")),
    (r"patch_embedding/kernel", (None, None, None, "fsdp")),
    (r"position_embedding", (None, None, "fsdp")),
    (r"(vision_proj|text_proj|itm_head|lm_head/.*)/kernel", ("fsdp", None)),
    (r"(to_[qkv]|[qkv]_proj)/kernel", ("fsdp", "tensor", None)),
    (r"(to_[qkv]|[qkv]_proj)/bias", ("tensor", None)),
    (r"(to_out_0|out_proj)/kernel", ("tensor", None, "fsdp")),
    (r"(ff/net_0/proj|ff/net_2|time_emb_proj|linear_[12])/kernel", ("fsdp", None)),
    (r"(conv\w*|proj_in|proj_out|quant_conv|post_quant_conv)/kernel", (None, None, None, "fsdp")),
    (r"token_embedding/embedding", (None, "fsdp")),
)
"""Pattern of a path's end -> mesh axis of each axis of the parameter. The first match applies, also to optimizer state.
Parameters without a match (biases of the width, LayerNorms) are replicated."""


def shard_params(params: Tree, mesh: Mesh) -> Tree:
    """Shard a tree of parameters, or a tree that contains their paths, over a mesh."""
    if jax.process_count() == 1:
        return jax.device_put(params, shardings(params, mesh))

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # Each process has the whole array and places its own shards.
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, params, shardings(params, mesh))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a tree; see `sharding_of`."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        return sharding_of(jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf), mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of an array by the first match in `RULES`. An axis is sharded only if its size divides."""
    check_axes(mesh)
    axes = next((axes for pattern, axes in RULES if re.search(f"(^|/){pattern}$", path)), ())
    if len(axes) > len(shape):  # state of a factored optimizer
        axes = ()
    # Stacked layers have a leading depth axis.
    axes = (None,) * (len(shape) - len(axes)) + axes
    dividing = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*dividing))


def held_bytes(params: Any) -> tuple[int, int]:
    """Bytes of a tree on this process's devices, with replicas counted once, and bytes of the whole tree."""
    leaves = jax.tree.leaves(params)
    parts = ({str(part.index): part.data.nbytes for part in leaf.addressable_shards} for leaf in leaves)
    return sum(sum(sizes.values()) for sizes in parts), sum(leaf.nbytes for leaf in leaves)
