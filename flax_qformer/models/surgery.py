"""Functions that change a model's parameters: prune heads, change the vocabulary or the image size, stack layers.

They return new trees, which share unchanged arrays with the given ones.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_qformer.errors import InputError
from flax_qformer.models.config import Blip2Config
from flax_qformer.models.layers import INITIALIZER, LORA

Params = Mapping[str, Any]

_EMBEDDING = "embeddings/word_embeddings/embedding"
_LM_BIAS = "lm_head/bias"
_POSITIONS = "visual_encoder/embeddings/position_embedding"
_HEADS_AXIS = {
    "attention/query/kernel": 1,
    "attention/key/kernel": 1,
    "attention/value/kernel": 1,
    "attention/query/bias": 0,
    "attention/key/bias": 0,
    "attention/value/bias": 0,
    "output/dense/kernel": 0,
}


def _flat(params: Params) -> dict[str, Any]:
    flat = flatten_dict(dict(params), sep="/")
    if _EMBEDDING not in flat:
        raise InputError('these are not the parameters of a Q-Former; give the tree below "params"')
    return flat


def check_merged(params: Params) -> None:
    """Raise InputError if a tree has LoRA weights."""
    if any(path[-1] in LORA for path in flatten_dict(dict(params))):
        raise InputError(
            "the parameters have LoRA weights; merge them with `training.merge_lora`, or save them alone with "
            "`training.save_lora`"
        )


def prune_heads(
    config: Blip2Config, params: Params, heads: Mapping[int, Iterable[int]]
) -> tuple[Blip2Config, dict[str, Any]]:
    """Remove self-attention heads of the Q-Former. Source: diffusers `Blip2QFormerModel._prune_heads`.

    Args:
      heads: for each layer the heads to remove, numbered as in the unpruned model; already removed ones are skipped.

    Returns:
      The smaller config and tree, which `type(model)(config)` runs.

    Raises:
      InputError: there is no such layer or head, or the tree has LoRA weights.
    """
    before = dict(config.pruned_heads)
    merged = {layer: {*before.get(layer, ()), *heads.get(layer, ())} for layer in {*before, *heads}}
    flat = _flat(params)
    if config.scan_layers or any(path.startswith("encoder/layers/") for path in flat):
        raise InputError(
            "the layers are stacked, and pruned ones differ; take fq.unstack_layers(params), and a config without "
            "scan_layers"
        )
    check_merged(params)
    pruned = dataclasses.replace(config, pruned_heads=tuple((layer, tuple(gone)) for layer, gone in merged.items()))
    for layer in heads:
        kept = pruned.kept_heads(layer)
        places = jnp.array([place for place, head in enumerate(config.kept_heads(layer)) if head in kept], int)
        for name, axis in _HEADS_AXIS.items():
            path = f"encoder/layer_{layer}/attention/{name}"
            flat[path] = jnp.take(flat[path], places, axis=axis)
    return pruned, unflatten_dict(flat, sep="/")


def get_input_embeddings(params: Params) -> jax.Array:
    """The word embeddings, (vocab_size, width)."""
    return _flat(params)[_EMBEDDING]


def set_input_embeddings(config: Blip2Config, params: Params, value: jax.Array) -> tuple[Blip2Config, dict[str, Any]]:
    """Replace the word embeddings with a table (words, width) of any length, and set the config's vocab_size.

    Raises:
      InputError: the width is not the model's, or the table lacks [DEC] of a stage-1 model.
    """
    width = config.qformer_config.hidden_size
    if value.ndim != 2 or value.shape[1] != width or not len(value):
        raise InputError(f"word embeddings have shape {value.shape}; this model takes (words, {width})")
    qformer, start = config.qformer_config, config.qformer_config.start_token_id
    flat = _flat(params)
    flat[_EMBEDDING] = value
    if _LM_BIAS in flat:
        if start >= len(value):
            raise InputError(f"{len(value)} words are without [DEC], number {start}, which begins captions; keep it")
        # [DEC] keeps its id; by default it would be the last word.
        qformer = dataclasses.replace(qformer, bos_token_id=start)
        bias = flat[_LM_BIAS][: len(value)]
        flat[_LM_BIAS] = jnp.pad(bias, (0, len(value) - len(bias)))
    qformer = dataclasses.replace(qformer, vocab_size=len(value))
    return dataclasses.replace(config, qformer_config=qformer), unflatten_dict(flat, sep="/")


def resize_token_embeddings(
    config: Blip2Config, params: Params, vocab_size: int, rng: jax.Array
) -> tuple[Blip2Config, dict[str, Any]]:
    """Grow or cut the vocabulary. New words are randomly initialised as in a new model, in the dtype of the table.

    Source: transformers `PreTrainedModel.resize_token_embeddings`.

    Raises:
      InputError: the vocabulary would have no words, or a stage-1 model's would lose [DEC].
    """
    if vocab_size < 1:
        raise InputError(f"`vocab_size` is {vocab_size}; it must be a whole number above 0")
    table = get_input_embeddings(params)
    if vocab_size > len(table):
        new = INITIALIZER(rng, (vocab_size - len(table), table.shape[1]), table.dtype)
        table = jnp.concatenate([table, new])
    return set_input_embeddings(config, params, table[:vocab_size])


def interpolate_positions(config: Blip2Config, params: Params, image_size: int) -> tuple[Blip2Config, dict[str, Any]]:
    """Fit the vision tower to another image size: its positions are interpolated (bicubic).

    Source: transformers `Blip2VisionEmbeddings.interpolate_pos_encoding`.

    Raises:
      InputError: an image of this size has no patch.
    """
    vision = dataclasses.replace(config.vision_config, image_size=image_size)
    flat = _flat(params)
    old, new = config.vision_config.grid_size, vision.grid_size
    if new != old:
        table, mixing = flat[_POSITIONS], _bicubic(old, new)
        patches = table[0, 1:].astype(jnp.float32).reshape(old, old, -1)
        patches = jnp.einsum("yi,xj,ijw->yxw", mixing, mixing, patches, precision="highest").reshape(new**2, -1)
        flat[_POSITIONS] = jnp.concatenate([table[:, :1], patches[None].astype(table.dtype)], axis=1)
    return dataclasses.replace(config, vision_config=vision), unflatten_dict(flat, sep="/")


def _bicubic(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of bicubic interpolation from `old` to `new` points on a line, as PyTorch's `interpolate`.

    It uses Keys' kernel with a = -0.75, half-pixel centres, a repeated border and no antialiasing.
    """
    points = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(points).astype(int) - 1
    mixing = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(points - (first + tap))
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(mixing, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return mixing.astype(np.float32)


def stack_layers(params: Params) -> dict[str, Any]:
    """The tree for a config with `scan_layers`: each tower's layers become one, `layers`, with a leading axis of depth.

    The Q-Former stacks groups of `cross_attention_frequency` layers: with a frequency of 2, `layers` holds a `layer_0`
    with cross-attention and a `layer_1` without. A stacked tree is returned unchanged.
    """

    def stack(encoder: Params, prefix: str, size: int) -> dict[str, Any]:
        groups = [
            {f"{prefix}{k}": encoder[f"{prefix}{first + k}"] for k in range(size)}
            for first in range(0, len(encoder), size)
        ]
        if len({str(jax.tree.map(jnp.shape, group)) for group in groups}) > 1:
            raise InputError(
                "the layers differ (pruned heads, or LoRA weights on some layers only), so they cannot be stacked; run "
                "the model without scan_layers"
            )
        return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)}

    def change(encoder: Params, prefix: str) -> Params:
        if "layers" in encoder:
            return encoder
        looking = [i for i in range(len(encoder)) if "crossattention" in encoder[f"{prefix}{i}"]]
        size = 1 if prefix == "layers_" else looking[1] - looking[0] if len(looking) > 1 else len(encoder)
        if len(encoder) % size:
            raise InputError(f"{len(encoder)} layers are no groups of {size}, so they cannot be stacked")
        return stack(encoder, prefix, size)

    return _with_encoders(params, change)


def unstack_layers(params: Params) -> dict[str, Any]:
    """The inverse of `stack_layers`: the form on disk, which all other functions take."""

    def change(encoder: Params, prefix: str) -> Params:
        if "layers" not in encoder:
            return encoder
        group = encoder["layers"]
        depth = len(jax.tree.leaves(group)[0])
        return {
            f"{prefix}{i * len(group) + k}": jax.tree.map(lambda leaf, i=i: leaf[i], group[f"{prefix}{k}"])
            for i in range(depth)
            for k in range(len(group))
        }

    return _with_encoders(params, change)


def _with_encoders(params: Params, change: Callable[[Params, str], Params]) -> dict[str, Any]:
    tree = dict(params)
    if not tree.keys() & {"encoder", "visual_encoder"}:
        found = ", ".join(tree) or "nothing"
        raise InputError(f'no model\'s parameters, which have an encoder, but {found}; give the tree below "params"')
    if tree.get("encoder"):
        tree["encoder"] = change(tree["encoder"], "layer_")
    tower = tree.get("visual_encoder", {})
    if tower.get("encoder"):  # a tower without layers has no encoder
        tree["visual_encoder"] = {**tower, "encoder": change(tower["encoder"], "layers_")}
    return tree
