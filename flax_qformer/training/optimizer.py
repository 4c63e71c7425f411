"""Optimizer, weight decay and learning rates, built from optax."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from flax_qformer.errors import InputError
from flax_qformer.models.config import Blip2Config
from flax_qformer.models.selection import GROUPS, labels_of, matching

Rate: TypeAlias = float | optax.Schedule
"""A learning rate: a number, or an optax schedule (a function of the step)."""

OptimizerName = Literal["adamw", "lion", "adafactor", "sgd"]

WEIGHT_DECAY, B1, B2, CLIP_NORM = 0.05, 0.9, 0.98, 1.0
"""Defaults of training; weight decay and the betas of AdamW are those of BLIP-2."""


def make_schedule(learning_rate: float, steps: int, warmup: int, final_fraction: float = 0.1) -> optax.Schedule:
    """Linear warm-up from 0 in `warmup` steps, then a cosine down to `final_fraction` of the learning rate."""
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps), max(steps, min(warmup, steps) + 1), learning_rate * final_fraction
    )


def make_optimizer(
    config: Blip2Config,
    learning_rate: Rate | Mapping[str, Rate],
    *,
    optimizer: OptimizerName = "adamw",
    labels: Mapping[str, Any] | Callable[[str], str] | None = None,
    weight_decay: float = WEIGHT_DECAY,
    b1: float = B1,
    b2: float = B2,
    clip_norm: float = CLIP_NORM,
    layer_decay: float = 1.0,
    accumulation: int = 1,
) -> optax.GradientTransformation:
    """AdamW with BLIP-2's settings, or another optimizer, for the tree of trained parameters.

    Args:
      config: the model's config; `layer_decay` depends on the depth of its towers.
      learning_rate: a number or an optax schedule; or a mapping of groups or regular expressions to these, such as
        `{"vision": 1e-5, "crossattention": 2e-4, "all": 1e-4}`, whose first match applies to a parameter.
      optimizer: "adamw", "lion", "adafactor" or "sgd", with `b1` as its momentum.
      labels: with several learning rates, the name of each parameter's learning rate, as a tree or as a function of the
        path; then names in `learning_rate` are labels, not groups or regular expressions.
      weight_decay: decoupled; biases, LayerNorms, the class token and the temperature have none.
      clip_norm: largest global norm of the gradient; 0 for no clipping.
      layer_decay: learning rate of a layer, as a multiple of that of the layer above.
      accumulation: batches whose gradients are averaged for one step.

    Raises:
      InputError: the optimizer is unknown. The returned optimizer's `init` raises it if a parameter has no learning
        rate, or if a regular expression or label matches no parameter; a group may match none.
    """
    rates = learning_rate if isinstance(learning_rate, Mapping) else None
    if labels is not None and rates is None:
        raise InputError("`labels` choose among several learning rates; give `learning_rate` as a mapping of them")
    steps = [
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        _core(optimizer, learning_rate if rates is None else 1.0, weight_decay, b1, b2),
    ]
    if layer_decay != 1.0:
        steps.append(_scale(lambda path, leaf: layer_decay ** _height(path, leaf, config)))
    if rates is not None:
        steps.append(
            optax.multi_transform(
                {name: optax.scale_by_schedule(r) if callable(r) else optax.scale(r) for name, r in rates.items()},
                lambda params: _rate_names(params, list(rates), labels),
            )
        )
    chain = optax.chain(*steps)
    return optax.MultiSteps(chain, accumulation).gradient_transformation() if accumulation > 1 else chain


def _core(name: str, learning_rate: Any, weight_decay: float, b1: float, b2: float) -> optax.GradientTransformation:
    def mask(params: Any) -> Any:
        return path_aware_map(lambda path, _: _decays(path), params)

    if name == "adamw":
        return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    if name == "lion":
        return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    decay = optax.add_decayed_weights(weight_decay, mask)
    if name == "adafactor":
        # optax's adafactor negates its updates.
        core = optax.chain(optax.adafactor(None, multiply_by_parameter_scale=False), optax.scale(-1.0))
        return optax.chain(core, decay, optax.scale_by_learning_rate(learning_rate))
    if name == "sgd":
        return optax.chain(optax.trace(b1), decay, optax.scale_by_learning_rate(learning_rate))
    raise InputError(f"`optimizer` is {name!r}; it must be adamw, lion, adafactor or sgd")


def _rate_names(params: Any, names: list[str], labels: Mapping[str, Any] | Callable[[str], str] | None) -> Any:
    """The name of each parameter's learning rate, as a tree."""
    paths = list(flatten_dict(params, sep="/"))
    if labels is None:
        named = {path: name for name in reversed(names) for path in matching(paths, name)}
    else:
        named = {path: labels(path) for path in paths} if callable(labels) else labels_of(paths, labels)
    without = [path for path in paths if named.get(path) not in names]
    if without:
        raise InputError(
            f"{len(without)} trained parameters have no learning rate, such as {without[0]}; add one for them, or "
            "for all"
        )
    # A group may be frozen, but a pattern or label that matches nothing is a mistake.
    unused = [name for name in names if name not in GROUPS and name not in named.values()]
    if unused:
        raise InputError(f"the learning rate of {unused[0]} matches no trained parameter; leave it out, or train more")
    return unflatten_dict(named, sep="/")


def _decays(path: tuple[Any, ...]) -> bool:
    return path[-1] not in ("bias", "scale", "temp", "class_embedding")


def _height(path: tuple[str, ...], leaf: jax.Array, config: Blip2Config) -> int | jax.Array:
    """Layers above a parameter: 0 for the heads. For stacked layers, an array with a height per layer."""
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
