"""Select parameters by group, path, function or label, and split a tree by the selection."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from flax.traverse_util import flatten_dict, unflatten_dict

from flax_qformer.errors import InputError
from flax_qformer.models.pretraining import Blip2ForPreTraining

Selection: TypeAlias = str | Iterable[str] | Callable[[str], Any] | Mapping[str, Any]
"""Which parameters to select.

- A group: "vision" is the tower with its LayerNorms, "heads" what only the stage-1 losses read, "qformer" the rest, and
  "all" everything. `proj_layer` belongs to "qformer" in a tree without heads; in a tree with heads it must be named.
- A regular expression, searched in paths such as `encoder/layer_0/crossattention/attention/query/kernel`.
- Several of these.
- A function of the path that returns whether to select a parameter.
- A tree of labels with the structure of the parameters or of their upper levels; False, None and "frozen" exclude.
"""

GROUPS = ("vision", "qformer", "heads", "all")
FROZEN = (False, None, "frozen")


def select(params: Mapping[str, Any], selection: Selection) -> set[str]:
    """The paths of the selected parameters, with slashes between names.

    Raises:
      InputError: the selection is empty, a part of it matches no parameter, or labels are missing.
    """
    paths = list(flatten_dict(dict(params), sep="/"))
    if callable(selection):
        selected = {path for path in paths if selection(path)}
    elif isinstance(selection, Mapping):
        selected = {path for path, label in labels_of(paths, selection).items() if label not in FROZEN}
    else:
        names = [selection] if isinstance(selection, str) else list(selection)
        selected = {path for name in names for path in matching(paths, name)}
    # LAVIS's checkpoints hold this parameter, and no model reads it.
    selected -= {path for path in selected if path.endswith("/bert_bias")}
    if not selected:
        raise InputError("nothing is selected; name vision, qformer, heads or all, or a part of a parameter's path")
    return selected


def partition(
    params: Mapping[str, Any], train: Selection = ("qformer", "heads")
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a parameter tree into a trained part and a frozen part without gradient and optimizer state.

    Args:
      train: what is trained, see `Selection`.

    Returns:
      The trained and the frozen tree, which `merge` joins.
    """
    selected = select(params, train)
    flat = flatten_dict(dict(params), sep="/")
    trained = {path: leaf for path, leaf in flat.items() if path in selected}
    frozen = {path: leaf for path, leaf in flat.items() if path not in selected}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def merge(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Join the two trees of `partition`."""
    return unflatten_dict(flatten_dict(dict(trained)) | flatten_dict(dict(frozen)))


def matching(paths: Iterable[str], name: str) -> list[str]:
    """The paths that a group or a regular expression matches."""
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


def labels_of(paths: Iterable[str], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The label of each path, its own or that of a level above it."""
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
