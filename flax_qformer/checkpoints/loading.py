"""Load a model from disk or from the hub.

A Flax folder holds `config.json` as upstream writes it, the orbax checkpoint `params`, and, if a processor was saved
too, the tokenizer's files and `preprocessor_config.json`.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_qformer.checkpoints.lora_files import load_lora
from flax_qformer.checkpoints.model_files import (
    DEFAULT_MODEL,
    PARAMS,
    AnyModelName,
    ModelFiles,
    download_weights,
    locate,
)
from flax_qformer.checkpoints.parts import drawing_part, load_part
from flax_qformer.checkpoints.reading import Place, as_dtype, read_params, stored_params
from flax_qformer.convert import check_shapes, convert, layout_of, parts_of
from flax_qformer.convert.files import open_tensors
from flax_qformer.convert.tables.qformer import BERT_BIAS, PARTS, parameters
from flax_qformer.convert.tensors import StoredTensor, merged
from flax_qformer.errors import InputError
from flax_qformer.models.config import BLIP2_VIT_L, BLIP_DIFFUSION, Blip2Config
from flax_qformer.models.pretraining import TEMPERATURE, Blip2ForPreTraining
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.models.surgery import stack_layers
from flax_qformer.parallel.partition_rules import held_bytes, shard_params, sharding_of

LAVIS_TOWER = "clip_vit_L.pth"
"""Name of the file with the frozen vision tower, as LAVIS downloads it."""

AnyModel = Blip2QFormerModel | Blip2ForPreTraining
AnyConfig: TypeAlias = str | os.PathLike[str] | Blip2Config
"""A `config.json`, or the config itself."""

Model = TypeVar("Model", Blip2QFormerModel, Blip2ForPreTraining)

CLASSES: dict[str, type[AnyModel]] = {c.__name__: c for c in (Blip2QFormerModel, Blip2ForPreTraining)}

KINDS = {"proj_layer": "identity", "temp": f"constant {TEMPERATURE}"}
"""How modules that a checkpoint lacks are initialised; all others are "randomly initialised"."""

log = logging.getLogger(__name__)


@overload
def from_pretrained(
    path_or_hub_id: AnyModelName = ...,
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike | None = ...,
    *,
    model_class: type[Model],
    config: AnyConfig | None = ...,
    allow_non_finite: bool = ...,
    mesh: Mesh | None = ...,
    lora: str | os.PathLike[str] | None = ...,
) -> tuple[Model, dict[str, Any]]: ...


@overload
def from_pretrained(
    path_or_hub_id: AnyModelName = ...,
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike | None = ...,
    *,
    model_class: None = ...,
    config: AnyConfig | None = ...,
    allow_non_finite: bool = ...,
    mesh: Mesh | None = ...,
    lora: str | os.PathLike[str] | None = ...,
) -> tuple[AnyModel, dict[str, Any]]: ...


def from_pretrained(
    path_or_hub_id: AnyModelName = DEFAULT_MODEL,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    *,
    model_class: Any = None,
    config: AnyConfig | None = None,
    allow_non_finite: bool = False,
    mesh: Mesh | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> tuple[AnyModel, dict[str, Any]]:
    """Load a model from a Flax or a PyTorch checkpoint.

    Args:
      path_or_hub_id: a Flax folder, upstream's `qformer` folder or its parent, LAVIS's folder, a single checkpoint
        file, the `*.index.json` of a sharded one, or a hub id; by default the small model inside the package. The
        folder of a pipeline's UNet, autoencoder, text encoder or ControlNet gives that module.
      dtype: the dtype of the computation: float32, bfloat16 or float16.
      param_dtype: the dtype of the parameters; by default each keeps its stored dtype.
      model_class: `Blip2QFormerModel` or `Blip2ForPreTraining`; by default the checkpoint's class. Modules that the
        class reads and the checkpoint lacks are newly initialised, heads randomly and `proj_layer` to the identity; the
        log and `model.config.newly_initialised` name them. Modules that only the other class reads are in the tree too.
      config: a `config.json`, or the config itself, if the checkpoint has none or a wrong one.
      allow_non_finite: accept infinities and NaN in a PyTorch checkpoint, and those that a cast creates.
      mesh: shard the parameters over it, as `shard_params` does. Each process reads what its devices need; all
        processes call this together.
      lora: a file of `training.save_lora`, whose LoRA weights are added to the tree.

    Returns:
      The model, and its parameters as nested dictionaries of arrays, which `model.apply` takes.

    Raises:
      InputError: there is no such checkpoint, it does not fit its config, or the LoRA file does not fit it.
    """
    if model_class not in (None, *CLASSES.values()):
        raise InputError(f"`model_class` is {model_class!r:.80}; it must be {' or '.join(CLASSES)}")
    compute, kept = as_dtype(dtype), None if param_dtype is None else as_dtype(param_dtype)
    place = None if mesh is None else partial(sharding_of, mesh=mesh)
    files = locate(path_or_hub_id)
    part = drawing_part(files) if model_class is None and config is None else None
    if part is not None:
        if lora is not None:
            raise InputError(f"`lora` is for the Q-Former, and {files.name} is a {part.class_names[0]}; leave it out")
        return load_part(files, part, dtype, param_dtype, mesh=mesh, allow_non_finite=allow_non_finite)
    files = locate_checkpoint(files, config)
    loaded = load(files, model_class, config, kept, allow_non_finite, place)
    others = sorted(set(map(_kind_left_out, loaded.left_out)) - {POSITIONS, TIED_DECODER})
    if others:
        log.info("%s: left out %s, which are other parts of BLIP-Diffusion or CLIP", files.name, ", ".join(others))
    if mesh is not None:
        here, whole = held_bytes(loaded.params)
        log.info("the devices here hold %.1f of %.1f MB of parameters", here / 1e6, whole / 1e6)
    if loaded.config.newly_initialised:
        log.warning("%s: %s", files.name, loaded.initialised())
    model = loaded.model_class(loaded.config, dtype=compute, param_dtype=kept or jnp.float32)
    params = loaded.params if lora is None else load_lora(lora, loaded.params)
    if not loaded.config.scan_layers:
        return model, params
    stacked = stack_layers(params)
    return model, stacked if mesh is None else shard_params(stacked, mesh)


def initialise(
    config: AnyConfig,
    model_class: type[Model],
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Model, dict[str, Any]]:
    """A model with all its parameters initialised, in float32; arguments and result as of `from_pretrained`."""
    config = config if isinstance(config, Blip2Config) else Blip2Config.from_json(Path(config))
    place = None if mesh is None else partial(sharding_of, mesh=mesh)
    params = initial_params(model_class, config, seed=seed, place=place)
    return model_class(_with_initialised(config, params), dtype=as_dtype(dtype)), params


def read_config(name: AnyModelName) -> Blip2Config:
    """The config of a checkpoint, or of a single `config.json`; weights are not needed."""
    if not isinstance(name, ModelFiles) and Path(name).suffix == ".json":
        return _resolve_config(ModelFiles(str(name)), name)
    return _resolve_config(locate(name), None)


def check_heads(config: Blip2Config, name: str, *heads: str) -> None:
    """Raise InputError if one of these heads is in no checkpoint and untrained; it names all such heads.

    Args:
      name: the model's name in the message.
    """
    missing = [part for part, _ in config.newly_initialised if part in Blip2ForPreTraining.parts]
    if not set(heads).isdisjoint(missing):
        raise InputError(
            f"{name} has no trained {', '.join(missing)}; train them (flax-qformer train), or name a stage-1 model"
        )


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    model_class: type[AnyModel]
    config: Blip2Config
    params: dict[str, Any]
    layout: str
    left_out: Sequence[str] = ()
    initial: frozenset[str] = frozenset()
    """Modules that the checkpoint did not hold."""

    def summary(self) -> str:
        leaves = jax.tree.leaves({name: tree for name, tree in self.params.items() if name not in self.initial})
        dtypes = Counter(leaf.dtype.name for leaf in leaves)
        size = sum(leaf.size for leaf in leaves)
        kinds = sorted(set(map(_kind_left_out, self.left_out)))
        named = f" ({', '.join(kinds)})" if kinds else ""
        return (
            f"read {len(leaves)} tensors, {size:,} parameters in {' and '.join(dtypes)} ({self.layout} names); "
            f"{len(self.left_out)} tensors left out by rule{named}"
        ) + (f"; {self.initialised()}" if self.config.newly_initialised else "")

    def initialised(self) -> str:
        """The modules that no checkpoint held and no training has changed, each with how it was initialised."""
        return "newly initialised: " + ", ".join(map(": ".join, self.config.newly_initialised))


POSITIONS, TIED_DECODER = "position_ids", "tied decoder.weight"


def _kind_left_out(name: str) -> str:
    """The kind of a tensor that is left out: a constant, a copy, or another part of BLIP-Diffusion or CLIP."""
    if name.endswith("position_ids"):
        return POSITIONS
    return TIED_DECODER if name.endswith("decoder.weight") else name.removeprefix("blip.").split(".")[0]


def load(
    files: ModelFiles,
    model_class: type[AnyModel] | None,
    config: AnyConfig | None,
    dtype: jnp.dtype | None,
    allow_non_finite: bool,
    place: Place | None = None,
) -> Loaded:
    """Read a checkpoint as `model_class`, else as the class that its config names, else as its tensors suggest."""
    if config is None:
        check_architecture(files)
    if not (files.params or files.weights):
        raise InputError(f"{files.name} holds no checkpoint: no {PARAMS}, model.safetensors or pytorch_model.bin")
    read = _load_flax if files.params else _load_pytorch
    return completed(read(files, model_class, config, dtype, allow_non_finite, place), dtype, place)


def completed(loaded: Loaded, dtype: jnp.dtype | None = None, place: Place | None = None) -> Loaded:
    """Initialise the modules that the class reads and the checkpoint lacks."""
    stored = flatten_dict(loaded.params, sep="/")
    missing = [part for part in loaded.model_class.parts if part not in _modules_in(stored)]
    if not missing:
        return loaded
    initial = flatten_dict(initial_params(loaded.model_class, loaded.config, missing, dtype, place=place), sep="/")
    config, made = _with_initialised(loaded.config, missing), loaded.initial.union(missing)
    return replace(loaded, config=config, params=unflatten_dict(stored | initial, sep="/"), initial=made)


def _modules_in(paths: Iterable[str]) -> set[str]:
    """The modules of `PARTS` of which a tree has a parameter that a model reads."""
    return {path.split("/")[0] for path in paths if path != BERT_BIAS.path} & PARTS.keys()


def _with_initialised(config: Blip2Config, names: Iterable[str]) -> Blip2Config:
    """The config with these modules recorded as newly initialised."""
    new = {name: KINDS.get(name, "randomly initialised") for name in names}
    return replace(config, newly_initialised=tuple((dict(config.newly_initialised) | new).items()))


def locate_checkpoint(name: AnyModelName, config: object = None) -> ModelFiles:
    """The files of a model with its parameters, which are downloaded for a hub id, after a check of its config.

    Args:
      name: as for `from_pretrained`; located files are returned as they are.
      config: a config in place of the checkpoint's own, which is then not checked.

    Raises:
      InputError: there is no such model, it cannot be downloaded, or it is one of another class.
    """
    files = locate(name)
    if config is None and files.hub_id:
        check_architecture(files)
    return download_weights(files)


def check_architecture(files: ModelFiles) -> None:
    """Raise InputError if the config is of another class: transformers has BLIP-2 models with similar configs."""
    values = files.config_values
    name = _architecture(values)
    # transformers gives the name of diffusers' model to a Q-Former without a vision tower.
    is_without_tower = values.get("model_type") == "blip_2_qformer"
    if is_without_tower or (name is not None and name not in CLASSES):
        kind = "transformers' Q-Former without a vision tower" if is_without_tower else f"a {name}"
        raise InputError(
            f"{files.name} is {kind} by its config.json; take a checkpoint of {' or '.join(CLASSES)}, or LAVIS's"
        )


def _architecture(values: Mapping[str, Any]) -> str | None:
    """The class that a `config.json` names, or None."""
    names = values.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is, by its `config.json` and the names of its tensors.

    Attributes:
      config: of the model.
      model_class: the class that the config names, else the one that the tensors suggest.
      layout: whose names the tensors have: "flax", "diffusers" or "lavis".
      is_assumed: whether the config is the published geometry, since LAVIS's checkpoints have none.
    """

    config: Blip2Config
    model_class: type[AnyModel]
    layout: str
    is_assumed: bool


def _identify(files: ModelFiles, config: AnyConfig | None, layout: str, is_stage_1: bool) -> Identity:
    named_class = CLASSES.get(_architecture(files.config_values) or "")
    model_class = named_class or (Blip2ForPreTraining if is_stage_1 else Blip2QFormerModel)
    is_assumed = config is None and files.config is None and layout == "lavis"
    published = BLIP2_VIT_L if is_stage_1 else BLIP_DIFFUSION
    return Identity(published if is_assumed else _resolve_config(files, config), model_class, layout, is_assumed)


def _resolve_config(files: ModelFiles, config: AnyConfig | None) -> Blip2Config:
    """The config that the caller gave, as a path, a mapping or itself; else the checkpoint's."""
    if isinstance(config, Blip2Config):
        return config
    if isinstance(config, Mapping):
        return Blip2Config.from_dict(config)
    path = files.config if config is None else Path(config)
    if path is None:
        raise InputError(f"{files.name} has no config.json; put one there, or give `config=FILE`")
    if not os.path.isfile(path):
        raise InputError(f"there is no config {path}; check the name")
    return Blip2Config.from_json(path)


def _load_pytorch(
    files: ModelFiles,
    model_class: type[AnyModel] | None,
    config: AnyConfig | None,
    dtype: jnp.dtype | None,
    allow_non_finite: bool,
    place: Place | None,
) -> Loaded:
    tensors = merged(_open_weights(path) for path in files.weights)
    parts = parts_of(tensors)
    identity = _identify(files, config, layout_of(tensors), bool(parts) and "proj_layer" not in parts)
    model_class = model_class or identity.model_class
    # Missing modules are initialised later. A checkpoint without any of them is not one of these models.
    wanted = [] if parts else model_class.parts
    unused: list[str] = []
    if identity.layout == "lavis" and not any("visual_encoder." in name for name in tensors):
        tower, unused = _lavis_tower(files, identity.config)
        tensors |= tower
    try:
        params, left_out = convert(
            tensors, identity.config, wanted, dtype=dtype, allow_non_finite=allow_non_finite, place=place
        )
    except InputError as error:
        about = "; the published geometry is assumed; `config=FILE` takes another"
        raise InputError(f"{files.name}: {error}{about if identity.is_assumed else ''}") from None
    return Loaded(model_class, identity.config, params, identity.layout, left_out + unused)


def initial_params(
    model_class: type[AnyModel],
    config: Blip2Config,
    names: Iterable[str] | None = None,
    dtype: jnp.dtype | None = None,
    seed: int = 0,
    place: Place | None = None,
) -> dict[str, Any]:
    """Initial parameters, all or those of some modules."""
    model, size = model_class(config, param_dtype=dtype or jnp.float32), config.vision_config.image_size

    def draw(key: jax.Array) -> dict[str, Any]:
        tree = model.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), int))["params"]
        return {name: tree[name] for name in (tree if names is None else names)}

    shapes = flatten_dict(jax.eval_shape(draw, jax.random.key(seed)), sep="/")
    places = place and unflatten_dict({path: place(path, leaf.shape) for path, leaf in shapes.items()}, sep="/")
    return jax.jit(draw, out_shardings=places)(jax.random.key(seed))


def _open_weights(path: Path) -> dict[str, StoredTensor]:
    tensors = open_tensors(path)
    # LAVIS's folder keeps proj_layer in a separate file, without the prefix.
    return {f"proj_layer.{name}": t for name, t in tensors.items()} if path.parent.name == "proj_layer" else tensors


def _lavis_tower(files: ModelFiles, config: Blip2Config) -> tuple[dict[str, StoredTensor], list[str]]:
    """Open the vision tower in LAVIS's separate file: its checkpoints leave out frozen modules.

    Returns:
      The tower's tensors, and the names of unused ones: CLIP's last block and projection.
    """
    file = files.weights[0].with_name(LAVIS_TOWER)
    if not file.is_file():
        raise InputError(
            f"{files.name} has no vision tower, which LAVIS leaves out where it was frozen; put LAVIS's {LAVIS_TOWER} "
            "beside it"
        )
    wanted = {parameter.name for parameter in parameters(config, "lavis", [])}
    tower = {f"visual_encoder.{name}": tensor for name, tensor in open_tensors(file).items()}
    used = {name: tensor for name, tensor in tower.items() if name in wanted}
    return used, [f"{LAVIS_TOWER.removesuffix('.pth')}.{name}" for name in tower.keys() - used.keys()]


def check_tree(shapes: Mapping[str, tuple[int, ...]], config: Blip2Config, model_class: type[AnyModel]) -> None:
    """Check that a tree has all that its class reads, and all or nothing of each module of the other class."""
    known = {path: shape for path, shape in shapes.items() if path != BERT_BIAS.path}
    parts = sorted({*model_class.parts, *_modules_in(known)})
    check_shapes(known, {p.path: p.shape for p in parameters(config, "diffusers", parts)})


def _load_flax(
    files: ModelFiles,
    model_class: type[AnyModel] | None,
    config: AnyConfig | None,
    dtype: jnp.dtype | None,
    allow_non_finite: bool,
    place: Place | None,
) -> Loaded:
    assert files.params
    stored = stored_params(files.params)
    identity = _identify(files, config, "flax", "temp" in stored)
    check_tree({path: leaf.shape for path, leaf in stored.items()}, identity.config, identity.model_class)
    params = read_params(files.params, stored, dtype, allow_non_finite, place)
    return Loaded(model_class or identity.model_class, identity.config, params, identity.layout)
