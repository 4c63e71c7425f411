"""A model on disk and on the hub.

A folder of ours holds `config.json` as upstream writes it, the orbax checkpoint `params`, and, where a processor was
saved along, the tokenizer's files and `preprocessor_config.json`.
"""

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from flax_qformer.checkpoints.atomic import check_absent, check_apart, check_space, new_folder
from flax_qformer.checkpoints.lora_files import load_lora
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL, PARAMS, TOKENIZER_FILES, ModelFiles, locate
from flax_qformer.convert import check_finite, check_shapes, convert, export, layout_of, parts_of
from flax_qformer.convert.files import open_tensors
from flax_qformer.convert.tables.qformer import BERT_BIAS, PARTS, Layout, parameters
from flax_qformer.convert.tensors import StoredTensor, merged
from flax_qformer.errors import InputError, first_line
from flax_qformer.models.config import BLIP2_VIT_L, BLIP_DIFFUSION, Blip2Config, read_json
from flax_qformer.models.pretraining import TEMPERATURE, Blip2ForPreTraining
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.models.surgery import check_merged, stack_layers, unstack_layers
from flax_qformer.parallel.mesh import held_bytes, shard_params, sharding_of
from flax_qformer.parallel.processes import from_first, is_first, tells_of_lost_process, wait_for_all
from flax_qformer.processing.processor import ImageProcessor, Processor, image_settings_file, tokenizer_of

DTYPES = ("float32", "bfloat16", "float16")

CHUNK_BYTES = 1 << 20
"""Of what is written as one piece, and so is read as one: a chip's part of a parameter needs few more."""

WRITE_BYTES = 1 << 27
"""Of what is copied on its way to disk, held at once, unless one parameter is more."""

LAVIS_TOWER = "clip_vit_L.pth"
"""LAVIS's file of the frozen tower, by the name that it downloads it under."""

AnyModel = Blip2QFormerModel | Blip2ForPreTraining
Place: TypeAlias = Callable[[str, tuple[int, ...]], Sharding]
"""From a parameter's path and shape to where it goes."""
Model = TypeVar("Model", Blip2QFormerModel, Blip2ForPreTraining)

CLASSES: dict[str, type[AnyModel]] = {c.__name__: c for c in (Blip2QFormerModel, Blip2ForPreTraining)}

KINDS = {"proj_layer": "identity", "temp": f"constant {TEMPERATURE}"}
"""How modules are initialised that a checkpoint lacks; all others are "randomly initialised"."""

log = logging.getLogger(__name__)


@overload
def from_pretrained(
    path_or_hub_id: str | os.PathLike[str] = ...,
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike | None = ...,
    *,
    model_class: type[Model],
    config: str | os.PathLike[str] | Blip2Config | None = ...,
    allow_non_finite: bool = ...,
    mesh: Mesh | None = ...,
    lora: str | os.PathLike[str] | None = ...,
) -> tuple[Model, dict[str, Any]]: ...


@overload
def from_pretrained(
    path_or_hub_id: str | os.PathLike[str] = ...,
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike | None = ...,
    *,
    model_class: None = ...,
    config: str | os.PathLike[str] | Blip2Config | None = ...,
    allow_non_finite: bool = ...,
    mesh: Mesh | None = ...,
    lora: str | os.PathLike[str] | None = ...,
) -> tuple[AnyModel, dict[str, Any]]: ...


def from_pretrained(
    path_or_hub_id: str | os.PathLike[str] = DEFAULT_MODEL,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    *,
    model_class: Any = None,
    config: str | os.PathLike[str] | Blip2Config | None = None,
    allow_non_finite: bool = False,
    mesh: Mesh | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> tuple[AnyModel, dict[str, Any]]:
    """Load a model, from a Flax or a PyTorch checkpoint alike.

    Args:
      path_or_hub_id: a folder of ours, upstream's `qformer` folder or its parent, LAVIS's folder, a single checkpoint
        file, the `*.index.json` of a sharded one, or a hub id; by default the small model inside the package.
      dtype: what the model computes in: float32, bfloat16 or float16.
      param_dtype: what the parameters are kept in; by default each as it is stored.
      model_class: `Blip2QFormerModel` or `Blip2ForPreTraining`; by default what the checkpoint is. Modules that the
        class reads and the checkpoint lacks are newly initialised, heads randomly and `proj_layer` to the identity; the
        log and `model.config.newly_initialised` name them. Modules that only the other class reads are in the tree too.
      config: a `config.json`, or the config itself, where the checkpoint brings none or a wrong one.
      allow_non_finite: accept infinities and NaN in a PyTorch checkpoint, and those that a cast makes.
      mesh: spread the parameters over it, as `shard_params` would. Each process reads what goes to its own devices; of
        several, all call this together.
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
    loaded = _load(_located(path_or_hub_id, config), model_class, config, kept, allow_non_finite, place)
    besides = sorted(set(map(_rule, loaded.left_out)) - {POSITIONS, TIED_DECODER})
    if besides:
        log.info("%s: left out %s, which are other parts of BLIP-Diffusion or CLIP", path_or_hub_id, ", ".join(besides))
    if mesh is not None:
        here, whole = held_bytes(loaded.params)
        log.info("the devices here hold %.1f of %.1f MB of parameters", here / 1e6, whole / 1e6)
    if loaded.config.newly_initialised:
        log.warning("%s: %s", path_or_hub_id, loaded.initialised())
    model = loaded.model_class(loaded.config, dtype=compute, param_dtype=kept or jnp.float32)
    params = loaded.params if lora is None else load_lora(lora, loaded.params)
    if not loaded.config.scan_layers:
        return model, params
    stacked = stack_layers(params)
    return model, stacked if mesh is None else shard_params(stacked, mesh)


def initialise(
    config: str | os.PathLike[str] | Blip2Config,
    model_class: type[Model],
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Model, dict[str, Any]]:
    """A model with all its parameters initialised, in float32; arguments and result as of `from_pretrained`."""
    config = config if isinstance(config, Blip2Config) else Blip2Config.from_json(Path(config))
    place = None if mesh is None else partial(sharding_of, mesh=mesh)
    params = _initial(model_class, config, seed=seed, place=place)
    return model_class(_with_new(config, params), dtype=as_dtype(dtype)), params


def read_config(path_or_hub_id: str | os.PathLike[str]) -> Blip2Config:
    """The config of a checkpoint, or of a `config.json` by itself; weights are not looked for."""
    if Path(path_or_hub_id).suffix == ".json":
        return _config(ModelFiles(str(path_or_hub_id)), path_or_hub_id)
    return _config(locate(path_or_hub_id, weights=False), None)


def save_pretrained(
    path: str | os.PathLike[str],
    model: AnyModel,
    params: Mapping[str, Any],
    processor: Processor | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model to a folder, in the dtypes that its parameters have. The folder is whole or absent.

    Modules that `model` does not read but the tree holds are written too. Modules that training has changed are no
    longer recorded as newly initialised. Of several processes, all call this together.

    Raises:
      InputError: the folder exists and may not be replaced, or the parameters are not those of the model
        or have LoRA weights.
    """
    check_merged(params)
    params = unstack_layers(params)
    shapes = {path: np.shape(value) for path, value in flatten_dict(params, sep="/").items()}
    _check(shapes, model.config, type(model))
    config = _with_trained(model.config, params)
    with new_folder(Path(path), overwrite) if is_first() else contextlib.nullcontext("") as folder:
        folder = Path(from_first(str(folder)))
        if is_first():
            _write_files(folder, {"config.json": _config_file(config, type(model))})
            if processor is not None:
                processor.save_pretrained(folder)
        _write_params(folder, params)
    wait_for_all("saved")


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    config: str | os.PathLike[str] | Blip2Config | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> str:
    """Write a checkpoint as a folder of ours; `flax-qformer convert`.

    Args:
      source: anything that `from_pretrained` takes.
      destination: the folder to make, whole or not at all.
      dtype: cast the parameters; by default each keeps its own.
      config: a `config.json`, where the checkpoint brings none; LAVIS's default to the published geometry.
      tokenizer: folder or hub id, where the checkpoint brings none; defaults to `bert-base-uncased`.
      overwrite: replace an existing folder.
      allow_non_finite: accept infinities and NaN.

    Returns:
      A line on what was done.

    Raises:
      InputError: the source cannot be used, or the destination exists.
    """
    check_absent(Path(destination), overwrite)
    check_apart(Path(source), Path(destination))
    found = _located(source, config)
    loaded = _load(found, None, config, None if dtype is None else as_dtype(dtype), allow_non_finite)
    settings, notes = _settings(found, loaded, tokenizer)
    with new_folder(Path(destination), overwrite) as folder:
        _write_files(folder, settings)
        _write_params(folder, loaded.params)
    return f"{loaded.summary()}; wrote {destination}{notes}"


def export_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> str:
    """Write a folder with a PyTorch checkpoint; `flax-qformer export`.

    Args:
      source: anything that `from_pretrained` takes.
      destination: the folder to make, whole or not at all.
      layout: by whose names. "diffusers", the default, is for upstream's `Blip2QFormerModel.from_pretrained`; a stage-1
        model without a `proj_layer` gets one that is the identity, and keeps its heads, which upstream ignores.
        "lavis", the default for a stage-1 model, is for the `load_state_dict` of LAVIS's.
      overwrite: replace an existing folder.

    Returns:
      A line on what was done.

    Raises:
      InputError: the source cannot be used, or the destination exists.
    """
    check_absent(Path(destination), overwrite)
    check_apart(Path(source), Path(destination))
    found = _located(source, None)
    loaded = _load(found, None, None, None, allow_non_finite=True)
    if layout is None:
        layout = "lavis" if loaded.model_class is Blip2ForPreTraining else "diffusers"
    if layout == "diffusers":
        loaded = _completed(replace(loaded, model_class=Blip2QFormerModel), loaded.params["query_tokens"].dtype)
    settings, notes = _settings(found, loaded, None)
    tensors = export(loaded.params, loaded.config, layout)
    with new_folder(Path(destination), overwrite) as folder:
        _write_files(folder, settings)
        with _saving(folder, tensors.values()):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        # safetensors lets nobody else read what it writes.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return f"{loaded.summary()}; wrote {destination}{notes}"


def check_heads(config: Blip2Config, name: str, *heads: str) -> None:
    """Raise InputError where one of these heads comes from no checkpoint and was not trained; it names all such heads.

    Args:
      name: of the model, for the message.
    """
    missing = [part for part, _ in config.newly_initialised if part in Blip2ForPreTraining.parts]
    if not set(heads).isdisjoint(missing):
        raise InputError(
            f"{name} has no trained {', '.join(missing)}; train them (flax-qformer train), or name a stage-1 model"
        )


def as_dtype(name: DTypeLike) -> jnp.dtype:
    """A dtype that models run in; InputError for another."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise InputError(f"the dtype {name} is none that models run in; take {', '.join(DTYPES)}")
    return dtype


@dataclass(frozen=True)
class _Loaded:
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
        kinds = sorted(set(map(_rule, self.left_out)))
        named = f" ({', '.join(kinds)})" if kinds else ""
        return (
            f"read {len(leaves)} tensors, {size:,} parameters in {' and '.join(dtypes)} ({self.layout} names); "
            f"{len(self.left_out)} tensors left out by rule{named}"
        ) + (f"; {self.initialised()}" if self.config.newly_initialised else "")

    def initialised(self) -> str:
        """The modules that no checkpoint held and no training has changed, each with how it was initialised."""
        return "newly initialised: " + ", ".join(map(": ".join, self.config.newly_initialised))


POSITIONS, TIED_DECODER = "position_ids", "tied decoder.weight"


def _rule(name: str) -> str:
    """What a tensor is that a rule leaves out: a constant, a copy, or another part of BLIP-Diffusion or CLIP."""
    if name.endswith("position_ids"):
        return POSITIONS
    return TIED_DECODER if name.endswith("decoder.weight") else name.removeprefix("blip.").split(".")[0]


def _load(
    source: ModelFiles,
    model_class: type[AnyModel] | None,
    config: str | os.PathLike[str] | Blip2Config | None,
    dtype: jnp.dtype | None,
    allow_non_finite: bool,
    place: Place | None = None,
) -> _Loaded:
    """Read a checkpoint as a class: the one asked for, else what it says it is, else what its tensors make it."""
    if source.params:
        loaded = _load_ours(source, model_class, _config(source, config), dtype, allow_non_finite, place)
    elif source.weights:
        loaded = _load_pytorch(source, model_class, config, dtype, allow_non_finite, place)
    else:
        raise InputError(f"{source.name} holds no checkpoint: no {PARAMS}, model.safetensors or pytorch_model.bin")
    return _completed(loaded, dtype, place)


def _completed(loaded: _Loaded, dtype: jnp.dtype | None = None, place: Place | None = None) -> _Loaded:
    """With the modules that the class reads and the checkpoint lacks, newly initialised."""
    stored = flatten_dict(loaded.params, sep="/")
    missing = [part for part in loaded.model_class.parts if part not in _parts(stored)]
    if not missing:
        return loaded
    initial = flatten_dict(_initial(loaded.model_class, loaded.config, missing, dtype, place=place), sep="/")
    config, made = _with_new(loaded.config, missing), loaded.initial.union(missing)
    return replace(loaded, config=config, params=unflatten_dict(stored | initial, sep="/"), initial=made)


def _parts(paths: Iterable[str]) -> set[str]:
    """The modules of `PARTS` of which a tree has a parameter that a model reads."""
    return {path.split("/")[0] for path in paths if path != BERT_BIAS.path} & PARTS.keys()


def _with_new(config: Blip2Config, names: Iterable[str]) -> Blip2Config:
    """The config with these modules recorded as newly initialised."""
    new = {name: KINDS.get(name, "randomly initialised") for name in names}
    return replace(config, newly_initialised=tuple((dict(config.newly_initialised) | new).items()))


def _with_trained(config: Blip2Config, params: Mapping[str, Any]) -> Blip2Config:
    """The config, in which modules that have left their initial values are no longer recorded as newly initialised."""
    trained = set()
    for model_class in CLASSES.values():
        names = [name for name, _ in config.newly_initialised if name in model_class.parts and name in params]
        initial = _initial(model_class, config, names) if names else {}
        for name in names:
            pairs = zip(jax.tree.leaves(params[name]), jax.tree.leaves(initial[name]), strict=True)
            if not all(_is_close(leaf, np.asarray(first)) for leaf, first in pairs):
                trained.add(name)
    return replace(config, newly_initialised=tuple(pair for pair in config.newly_initialised if pair[0] not in trained))


def _is_close(leaf: Any, first: np.ndarray) -> bool:
    """Whether a parameter has its initial value, up to the rounding of its dtype."""
    error = jnp.abs(leaf.astype(jnp.float32) - first)
    return bool((error <= 1e-8 + 4 * jnp.finfo(leaf.dtype).eps * np.abs(first)).all())


def _located(name: str | os.PathLike[str], config: object) -> ModelFiles:
    """The files of a model. Before weights are downloaded, its config shows whether it is one of these models."""
    if config is None:
        _check_architecture(locate(name, weights=False))
    return locate(name)


def _check_architecture(source: ModelFiles) -> None:
    """Raise InputError where the config is of another class: transformers writes BLIP-2 models with similar configs."""
    values = read_json(source.config) if source.config else {}
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    # Of the name that diffusers' model has, transformers has the Q-Former without its vision tower.
    is_without_tower = values.get("model_type") == "blip_2_qformer"
    if is_without_tower or (name is not None and name not in CLASSES):
        found = "transformers' Q-Former without a vision tower" if is_without_tower else f"a {name}"
        raise InputError(
            f"{source.name} is {found} by its config.json; take a checkpoint of {' or '.join(CLASSES)}, or LAVIS's"
        )


def _class_of(source: ModelFiles) -> type[AnyModel] | None:
    names = read_json(source.config).get("architectures") if source.config else None
    return CLASSES.get(names[0]) if isinstance(names, list) and names else None


def _load_pytorch(
    source: ModelFiles,
    model_class: type[AnyModel] | None,
    config: str | os.PathLike[str] | Blip2Config | None,
    dtype: jnp.dtype | None,
    allow_non_finite: bool,
    place: Place | None,
) -> _Loaded:
    tensors = merged(_open(path) for path in source.weights)
    layout, parts = layout_of(tensors), parts_of(tensors)
    is_stage_1 = bool(parts) and "proj_layer" not in parts
    model_class = model_class or _class_of(source) or (Blip2ForPreTraining if is_stage_1 else Blip2QFormerModel)
    assumed = config is None and source.config is None and layout == "lavis"
    used = (BLIP2_VIT_L if is_stage_1 else BLIP_DIFFUSION) if assumed else _config(source, config)
    # A module that is missing as a whole is initialised later; a checkpoint without any is not one of these models.
    wanted = [] if parts else model_class.parts
    beside: list[str] = []
    if layout == "lavis" and not any("visual_encoder." in name for name in tensors):
        tower, beside = _lavis_tower(source, used)
        tensors |= tower
    try:
        params, left_out = convert(tensors, used, wanted, dtype=dtype, allow_non_finite=allow_non_finite, place=place)
    except InputError as error:
        about = "; the published geometry is assumed; `config=FILE` takes another"
        raise InputError(f"{source.name}: {error}{about if assumed else ''}") from None
    return _Loaded(model_class, used, params, layout, left_out + beside)


def _initial(
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


def _open(path: Path) -> dict[str, StoredTensor]:
    tensors = open_tensors(path)
    # LAVIS's folder keeps proj_layer in a file of its own, without the prefix.
    return {f"proj_layer.{name}": t for name, t in tensors.items()} if path.parent.name == "proj_layer" else tensors


def _lavis_tower(source: ModelFiles, config: Blip2Config) -> tuple[dict[str, StoredTensor], list[str]]:
    """The vision tower, from LAVIS's own file of it: its checkpoints leave out what was frozen.

    Returns:
      The tower's tensors, and the names of the others: CLIP's last block and projection.
    """
    file = source.weights[0].with_name(LAVIS_TOWER)
    if not file.is_file():
        raise InputError(
            f"{source.name} has no vision tower, which LAVIS leaves out where it was frozen; put LAVIS's {LAVIS_TOWER} "
            "beside it"
        )
    wanted = {parameter.name for parameter in parameters(config, "lavis", [])}
    tower = {f"visual_encoder.{name}": tensor for name, tensor in open_tensors(file).items()}
    used = {name: tensor for name, tensor in tower.items() if name in wanted}
    return used, [f"{LAVIS_TOWER.removesuffix('.pth')}.{name}" for name in tower.keys() - used.keys()]


def _config(source: ModelFiles, config: str | os.PathLike[str] | Blip2Config | None) -> Blip2Config:
    if isinstance(config, Blip2Config):
        return config
    if isinstance(config, Mapping):
        return Blip2Config.from_dict(config)
    path = source.config if config is None else Path(config)
    if path is None:
        raise InputError(f"{source.name} has no config.json; put one there, or give `config=FILE`")
    if not os.path.isfile(path):
        raise InputError(f"there is no config {path}; check the name")
    return Blip2Config.from_json(path)


def _check(shapes: Mapping[str, tuple[int, ...]], config: Blip2Config, model_class: type[AnyModel]) -> None:
    """Check that a tree is whole: all that its class reads, and of the other class's modules all or nothing."""
    found = {path: shape for path, shape in shapes.items() if path != BERT_BIAS.path}
    parts = sorted({*model_class.parts, *_parts(found)})
    check_shapes(found, {p.path: p.shape for p in parameters(config, "diffusers", parts)})


def _load_ours(
    source: ModelFiles,
    model_class: type[AnyModel] | None,
    config: Blip2Config,
    dtype: jnp.dtype | None,
    allow_non_finite: bool,
    place: Place | None,
) -> _Loaded:
    import orbax.checkpoint.experimental.v1 as ocp

    assert source.params
    folder, path = source.params, source.params.absolute()  # orbax takes no other
    with _reading(folder):
        stored = flatten_dict(ocp.metadata(path).metadata, sep="/")
        shapes = {name: leaf.shape for name, leaf in stored.items()}
    stored_class = _class_of(source) or (Blip2ForPreTraining if "temp" in stored else Blip2QFormerModel)
    _check(shapes, config, stored_class)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # orbax asks for one
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, dtype or leaf.dtype, sharding=here if place is None else place(name, leaf.shape)
        )
        for name, leaf in stored.items()
    }
    with _reading(folder):
        params = ocp.load(path, unflatten_dict(wanted, sep="/"))
    if dtype is not None and not allow_non_finite:
        finite = jax.device_get({path: _all_finite(leaf) for path, leaf in flatten_dict(params, sep="/").items()})
        check_finite([path for path, is_finite in finite.items() if not is_finite], dtype)
    return _Loaded(model_class or stored_class, config, params, "flax")


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Tell damage in a line; orbax warns of what it then raises, and quotes TensorStore at length."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{folder} is damaged or no orbax checkpoint ({first_line(error)}); convert or save it again"
        ) from None
    finally:
        absl.setLevel(level)


def _config_file(config: Blip2Config, model_class: type[AnyModel]) -> bytes:
    values = {"architectures": [model_class.__name__], **config.to_dict()}
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _write_params(folder: Path, params: Mapping[str, Any]) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    # Uncompressed, since floats hardly compress. Orbax copies what it cuts into chunks: not all at once, and it refuses
    # an array as large as the limit. Of host arrays it would make one copy more.
    arrays = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), dict(params))
    leaves = jax.tree.leaves(arrays)
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.write_concurrent_bytes = max(WRITE_BYTES, *(leaf.nbytes + 1 for leaf in leaves))
    context.memory.deepcopy_host_arrays = False
    with _saving(folder, leaves), context:
        ocp.save(folder / PARAMS, arrays)


@contextlib.contextmanager
def _saving(folder: Path, arrays: Iterable[Any]) -> Iterator[None]:
    """Raise OSError where arrays cannot be written; orbax and safetensors report that in types of their own."""
    check_space(folder, sum(array.nbytes for array in arrays))
    try:
        yield
    except Exception as error:
        if tells_of_lost_process(error):
            raise
        raise OSError(str(error)) from error


def _settings(
    source: ModelFiles, loaded: _Loaded, tokenizer: str | os.PathLike[str] | None
) -> tuple[dict[str, bytes], str]:
    """The files of a folder but for the parameters, and what the caller should know of them."""
    image_processor = ImageProcessor.from_source(source, loaded.config.vision_config.image_size)
    files = {
        "config.json": _config_file(loaded.config, loaded.model_class),
        "preprocessor_config.json": image_settings_file(image_processor),
    }
    try:
        folder = tokenizer_of(source, loaded.config, tokenizer)
    except InputError as error:
        if tokenizer is not None:
            raise
        return files, f" without a tokenizer ({error}): `convert_checkpoint(..., tokenizer=DIR)` adds one"
    for name in TOKENIZER_FILES:
        try:
            files[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror})") from None
    return files, ""


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
