"""What is trained, and how: selections of parameters, decay, schedule. All of it is optax."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from flax_qformer.config import Blip2Config
from flax_qformer.errors import InputError
from flax_qformer.pretraining.model import Blip2ForPreTraining

Selection: TypeAlias = str | Iterable[str] | Callable[[str], Any] | Mapping[str, Any]
"""Which parameters are meant.

- A group: "vision" is the tower with its LayerNorms, "heads" what only the stage-1 losses read, "qformer" the rest, and
  "all" everything. `proj_layer` belongs to "qformer" in a tree without heads; beside heads it has to be named.
- A regular expression, searched in paths such as `encoder/layer_0/crossattention/attention/query/kernel`.
- Several of these.
- A function of the path that returns whether a parameter is meant.
- A tree of labels with the structure of the parameters or of their upper levels; False, None and "frozen" leave out.
"""

Rate: TypeAlias = float | optax.Schedule
"""A learning rate: a number, or an optax schedule, which is a function of the step."""

OptimizerName = Literal["adamw", "lion", "adafactor", "sgd"]

GROUPS = ("vision", "qformer", "heads", "all")
FROZEN = (False, None, "frozen")


def select(params: Mapping[str, Any], selection: Selection) -> set[str]:
    """The paths of the parameters that a selection means, joined by slashes.

    Raises:
      InputError: the selection is empty, a part of it fits no parameter, or labels are missing.
    """
    paths = list(flatten_dict(dict(params), sep="/"))
    if callable(selection):
        selected = {path for path in paths if selection(path)}
    elif isinstance(selection, Mapping):
        selected = {path for path, label in _labels(paths, selection).items() if label not in FROZEN}
    else:
        names = [selection] if isinstance(selection, str) else list(selection)
        selected = {path for name in names for path in _matching(paths, name)}
    # LAVIS's checkpoints hold this parameter, and no model reads it.
    selected -= {path for path in selected if path.endswith("/bert_bias")}
    if not selected:
        raise InputError("nothing is selected; name vision, qformer, heads or all, or a part of a parameter's path")
    return selected


def partition(
    params: Mapping[str, Any], train: Selection = ("qformer", "heads")
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a parameter tree into what is trained and what is frozen: no gradient, no optimizer state.

    Args:
      train: what is trained, see `Selection`.

    Returns:
      Two trees, which `merge` joins again.
    """
    selected = select(params, train)
    flat = flatten_dict(dict(params), sep="/")
    trained = {path: leaf for path, leaf in flat.items() if path in selected}
    frozen = {path: leaf for path, leaf in flat.items() if path not in selected}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


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
    learning_rate: Rate | Mapping[str, Rate],
    *,
    optimizer: OptimizerName = "adamw",
    labels: Mapping[str, Any] | Callable[[str], str] | None = None,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.98,
    clip_norm: float = 1.0,
    layer_decay: float = 1.0,
    accumulation: int = 1,
) -> optax.GradientTransformation:
    """AdamW as BLIP-2 trains with it, or another optimizer, for the tree of what is trained.

    Args:
      config: the model's, which has the depth of its towers.
      learning_rate: a number or an optax schedule; or one for each group or regular expression, of which the first that
        fits a parameter holds, as in `{"vision": 1e-5, "crossattention": 2e-4, "all": 1e-4}`.
      optimizer: "adamw", "lion", "adafactor" or "sgd", with `b1` as its momentum.
      labels: with several learning rates, which of them each parameter has: a tree of their names, or a function of the
        path, in place of groups and regular expressions.
      weight_decay: not on biases, LayerNorms, the class token and the temperature.
      clip_norm: of the whole gradient; 0 switches clipping off.
      layer_decay: the rate of each layer is that of the one above it times this.
      accumulation: batches whose gradients are averaged for one step.

    Raises:
      InputError: there is no such optimizer; a parameter has no learning rate, or a learning rate no parameter (when
        the optimizer meets the parameters).
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
        # optax's adafactor ends with a change of sign.
        core = optax.chain(optax.adafactor(None, multiply_by_parameter_scale=False), optax.scale(-1.0))
        return optax.chain(core, decay, optax.scale_by_learning_rate(learning_rate))
    if name == "sgd":
        return optax.chain(optax.trace(b1), decay, optax.scale_by_learning_rate(learning_rate))
    raise InputError(f"`optimizer` is {name!r}; it must be adamw, lion, adafactor or sgd")


def _rate_names(params: Any, names: list[str], labels: Mapping[str, Any] | Callable[[str], str] | None) -> Any:
    """The tree of names of learning rates."""
    paths = list(flatten_dict(params, sep="/"))
    if labels is None:
        named = {path: name for name in reversed(names) for path in _matching(paths, name)}
    else:
        named = {path: labels(path) for path in paths} if callable(labels) else _labels(paths, labels)
    without = [path for path in paths if named.get(path) not in names]
    if without:
        raise InputError(
            f"{len(without)} trained parameters have no learning rate, {without[0]} among them; add one for them, or "
            "for all"
        )
    unused = [name for name in names if name != "all" and name not in named.values()]
    if unused:
        raise InputError(f"the learning rate of {unused[0]} is for no trained parameter; leave it out, or train more")
    return unflatten_dict(named, sep="/")


def _matching(paths: Iterable[str], name: str) -> list[str]:
    """The paths that a group or a regular expression means."""
    paths = list(paths)
    if name in GROUPS:
        has_heads = any(_top(path) in Blip2ForPreTraining.parts for path in paths)
        return [path for path in paths if name in ("all", _group(path, has_heads))]
    try:
        found = [path for path in paths if re.search(name, path)]
    except (re.error, TypeError) as error:
        raise InputError(f"{name!r} is no regular expression ({error})") from None
    if not found:
        raise InputError(
            f"{name!r} fits no parameter; name vision, qformer, heads or all, or a part of a path such as {paths[0]}"
        )
    return found


def _group(path: str, has_heads: bool) -> str:
    top = _top(path)
    if top == "proj_layer" and has_heads:
        return top
    return "vision" if top == "visual_encoder" else "heads" if top in Blip2ForPreTraining.parts else "qformer"


def _top(path: str) -> str:
    return path.partition("/")[0]


def _labels(paths: Iterable[str], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Each path's label, its own or that of the level above it."""
    labels = {}
    for path in paths:
        label: Any = tree
        for name in path.split("/"):
            if isinstance(label, Mapping):
                if name not in label:
                    raise InputError(f"the tree of labels has none for {path}; add it")
                label = label[name]
        labels[path] = label
    return labels


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
