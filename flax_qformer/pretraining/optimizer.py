"""What is trained, and how: groups of parameters, decay, schedule. All of it is optax."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from flax_qformer.config import Blip2Config
from flax_qformer.errors import InputError

Group = Literal["vision", "qformer", "heads", "all"]
HEADS = ("vision_proj", "text_proj", "itm_head", "lm_head", "temp")


def partition(
    params: Mapping[str, Any], train: Iterable[Group] = ("qformer", "heads")
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a parameter tree into what is trained and what is frozen: no gradient, no optimizer state.

    Args:
      train: "vision" is the tower with its LayerNorms, "heads" what only the losses need, "qformer" the rest.

    Returns:
      Two trees, which `merge` joins again.
    """
    train = set(train)
    unknown = train - {"vision", "qformer", "heads", "all"}
    if unknown or not train:
        raise InputError(f"cannot train {', '.join(sorted(unknown)) or 'nothing'}; name vision, qformer, heads or all")
    flat = flatten_dict(dict(params))
    trained = {path: leaf for path, leaf in flat.items() if _is_trained(path, train)}
    return unflatten_dict(trained), unflatten_dict({path: flat[path] for path in flat.keys() - trained.keys()})


def merge(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that `partition` split."""
    return unflatten_dict(flatten_dict(dict(trained)) | flatten_dict(dict(frozen)))


def make_schedule(learning_rate: float, steps: int, warmup: int, final_fraction: float = 0.1) -> optax.Schedule:
    """From 0 up to the rate in `warmup` steps, then along a cosine down to a fraction of it."""
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps), max(steps, min(warmup, steps) + 1), learning_rate * final_fraction
    )


def make_optimizer(
    config: Blip2Config,
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.98,
    clip_norm: float = 1.0,
    layer_decay: float = 1.0,
    accumulation: int = 1,
) -> optax.GradientTransformation:
    """AdamW as BLIP-2 trains with it, for the tree of what is trained.

    Args:
      config: the model's, which has the depth of its towers.
      weight_decay: not on biases, LayerNorms, the class token and the temperature.
      clip_norm: of the whole gradient; 0 switches clipping off.
      layer_decay: the rate of each layer is that of the one above it times this.
      accumulation: batches whose gradients are averaged for one step.
    """
    steps = [
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.adamw(
            learning_rate,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: path_aware_map(lambda path, _: _decays(path), params),
        ),
    ]
    if layer_decay != 1.0:
        steps.append(_scale(lambda path, leaf: layer_decay ** _height(path, leaf, config)))
    optimizer = optax.chain(*steps)
    return optax.MultiSteps(optimizer, accumulation).gradient_transformation() if accumulation > 1 else optimizer


def _is_trained(path: tuple[str, ...], train: set[Group]) -> bool:
    # Nothing reads the one parameter that LAVIS's checkpoints carry along.
    if path[-1] == "bert_bias":
        return False
    group = {"visual_encoder": "vision", **dict.fromkeys(HEADS, "heads")}.get(path[0], "qformer")
    return "all" in train or group in train


def _decays(path: tuple[Any, ...]) -> bool:
    return path[-1] not in ("bias", "scale", "temp", "class_embedding")


def _height(path: tuple[str, ...], leaf: jax.Array, config: Blip2Config) -> int | jax.Array:
    """Layers from a parameter up to its tower's end, the heads being above it; of stacked layers, of each of them."""
    name = "/".join(path)
    depth = (config.vision_config if path[0] == "visual_encoder" else config.qformer_config).num_hidden_layers
    layer = re.search(r"encoder/(layers/)?layers?_(\d+)/", name)
    if layer and layer[1]:
        first = jnp.arange(0, depth, depth // len(leaf)).reshape(-1, *[1] * (leaf.ndim - 1))
        return depth - (first + int(layer[2]))
    if layer:
        return depth - int(layer[2])
    below = re.match(r"(visual_encoder/)?embeddings/|visual_encoder/pre_layernorm/|query_tokens", name)
    return depth + 1 if below else 0


def _scale(factor: Any) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda update, scale: update * scale, updates, path_aware_map(factor, updates))
    )
