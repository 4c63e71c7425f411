"""The parts of a drawing pipeline beside the Q-Former, each in its own folder: read one, and name its tensors.

A converted part is a Flax folder: upstream's `config.json` and the orbax checkpoint `params`. The config's `_converted`
records what an export needs to write the same tensors again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_qformer.checkpoints.model_files import PARAMS, AnyModelName, ModelFiles, download_weights, locate
from flax_qformer.checkpoints.reading import Place, as_dtype, read_params, stored_params
from flax_qformer.convert import check_shapes
from flax_qformer.convert.axes import Parameter
from flax_qformer.convert.files import open_tensors
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.convert.tables.text_encoder import POSITION_IDS, position_ids
from flax_qformer.convert.tables.vae import has_old_names, old_name
from flax_qformer.convert.tensors import StoredTensor, merged
from flax_qformer.convert.trees import convert_rows, export_rows
from flax_qformer.diffusion.autoencoder import AutoencoderConfig, AutoencoderKL
from flax_qformer.diffusion.config import PartConfig
from flax_qformer.diffusion.controlnet import ControlNetConfig, ControlNetModel
from flax_qformer.diffusion.text_encoder import CLIPTextConfig, ContextCLIPTextModel
from flax_qformer.diffusion.unet import UNet2DConditionConfig, UNet2DConditionModel
from flax_qformer.errors import InputError, first_line
from flax_qformer.parallel.partition_rules import sharding_of

CONVERTED = "_converted"
"""Field of a converted part's config. An export reads and removes it."""


def _unet_inputs(c: Any) -> tuple[Any, ...]:
    side = 2 ** len(c.block_out_channels)
    return _zeros(1, side, side, c.in_channels), _zeros(1), _zeros(1, 1, c.cross_attention_dim)


def _controlnet_inputs(c: Any) -> tuple[Any, ...]:
    sample, timestep, states = _unet_inputs(c)
    side = sample.shape[1] * 2 ** (len(c.conditioning_embedding_out_channels) - 1)
    return sample, timestep, states, _zeros(1, side, side, c.conditioning_channels)


def _vae_inputs(c: Any) -> tuple[Any, ...]:
    return (_zeros(1, 2 * c.downscale, 2 * c.downscale, c.in_channels),)


def _text_encoder_inputs(c: Any) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


def _zeros(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclass(frozen=True)
class DrawingPart:
    """A kind of part of a pipeline.

    Attributes:
      name: of its folder.
      model_class, config_class: the module and its config.
      class_names: what upstream calls the class, in any release.
      weights: the name of its checkpoint file, without the suffix.
      inputs: from a config to the shapes of small inputs.
    """

    name: str
    model_class: Any
    config_class: type[PartConfig]
    class_names: tuple[str, ...]
    weights: str
    inputs: Callable[[Any], tuple[Any, ...]]

    def config_values(self, config: PartConfig) -> dict[str, Any]:
        """The contents of a `config.json`, as upstream writes it."""
        name = self.class_names[0]
        named = {"architectures": [name]} if self is TEXT_ENCODER else {"_class_name": name}
        return {**named, **config.to_dict()}


DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"

UNET = DrawingPart(
    "unet",
    UNet2DConditionModel,
    UNet2DConditionConfig,
    ("UNet2DConditionModel",),
    DIFFUSERS_WEIGHTS,
    _unet_inputs,
)
VAE = DrawingPart("vae", AutoencoderKL, AutoencoderConfig, ("AutoencoderKL",), DIFFUSERS_WEIGHTS, _vae_inputs)
TEXT_ENCODER = DrawingPart(
    "text_encoder",
    ContextCLIPTextModel,
    CLIPTextConfig,
    ("ContextCLIPTextModel", "CtxCLIPTextModel", "CLIPTextModel"),
    "model",
    _text_encoder_inputs,
)
CONTROLNET = DrawingPart(
    "controlnet", ControlNetModel, ControlNetConfig, ("ControlNetModel",), DIFFUSERS_WEIGHTS, _controlnet_inputs
)
DRAWING_PARTS = {part.name: part for part in (UNET, VAE, TEXT_ENCODER, CONTROLNET)}


@dataclass(frozen=True)
class LoadedPart:
    """A part in memory.

    Attributes:
      part: its kind.
      values: the contents of its `config.json`, as upstream wrote it.
      config: what they say.
      params: the tree of parameters.
      old_names: whether its tensors have the names of diffusers before 0.18.
      has_position_ids: whether a text encoder's file has the constant that is left out here, as upstream's has.
    """

    part: DrawingPart
    values: Mapping[str, Any]
    config: PartConfig
    params: dict[str, Any]
    old_names: bool = False
    has_position_ids: bool = True

    def module(self, dtype: jnp.dtype, param_dtype: jnp.dtype | None) -> Any:
        return self.part.model_class(self.config, dtype=dtype, param_dtype=param_dtype or jnp.float32)

    def converted_values(self) -> dict[str, Any]:
        """The config for a Flax folder."""
        record: dict[str, Any] = {"old_names": True} if self.old_names else {}
        if self.part is TEXT_ENCODER and not self.has_position_ids:
            record["has_position_ids"] = False
        return {**self.values, CONVERTED: record} if record else dict(self.values)

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors that upstream's file holds."""
        rows = part_rows(self.part, self.config, self.old_names)
        tensors = export_rows(flatten_dict(self.params, sep="/"), rows)
        if self.has_position_ids and isinstance(self.config, CLIPTextConfig):
            tensors[POSITION_IDS] = position_ids(self.config.max_position_embeddings)
        return tensors


def drawing_part(files: ModelFiles) -> DrawingPart | None:
    """The kind of part that a config names; None for the Q-Former's classes, other classes and folders without one."""
    name = _class_name(files.config_values)
    return next((part for part in DRAWING_PARTS.values() if name in part.class_names), None)


def load_part(
    name: AnyModelName,
    part: DrawingPart | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    allow_non_finite: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Load one part; arguments and errors as in `from_pretrained`.

    Args:
      name: the part's folder, Flax or PyTorch, its checkpoint file, or a hub id.
      part: the kind that it must be; by default the kind that its config names.

    Returns:
      The module, and its parameters as nested dictionaries of arrays.
    """
    compute, kept = as_dtype(dtype), None if param_dtype is None else as_dtype(param_dtype)
    files = download_weights(locate(name))
    part = part or drawing_part(files)
    if part is None:
        raise InputError(f"{files.name} is no part of a pipeline by its config.json; its classes are {_class_names()}")
    place = None if mesh is None else partial(sharding_of, mesh=mesh)
    loaded = read_part(files, part, kept, allow_non_finite, place)
    return loaded.module(compute, kept), loaded.params


def read_part(
    files: ModelFiles,
    part: DrawingPart,
    dtype: jnp.dtype | None = None,
    allow_non_finite: bool = False,
    place: Place | None = None,
    values: Mapping[str, Any] | None = None,
) -> LoadedPart:
    """Read a part from a Flax or a PyTorch folder. Every tensor is accounted for.

    Args:
      files: of the part.
      part: its kind.
      dtype: cast the parameters; by default each keeps its dtype.
      allow_non_finite: accept infinities and NaN in a PyTorch checkpoint, and those that a cast creates.
      place: from path and shape to a sharding.
      values: the contents of its config, if it has none.

    Raises:
      InputError: the part is not of this kind, or does not fit its config.
    """
    values = values if files.config is None else files.config_values
    if values is None:
        raise InputError(f"{files.name} has no config.json; put the {part.class_names[0]}'s there")
    if not (files.params or files.weights):
        raise InputError(f"{files.name} holds no checkpoint: no {PARAMS}, {part.weights}.safetensors or .bin")
    values = dict(values)
    record = values.pop(CONVERTED, None)
    record = record if isinstance(record, dict) else {}
    config = part_config(part, values, str(files.config or files.name))
    try:
        if files.params:
            rows = part_rows(part, config)
            stored = stored_params(files.params)
            check_shapes({path: leaf.shape for path, leaf in stored.items()}, {row.path: row.shape for row in rows})
            params = read_params(files.params, stored, dtype, allow_non_finite, place)
            has_position_ids = record.get("has_position_ids") is not False
            return LoadedPart(part, values, config, params, record.get("old_names") is True, has_position_ids)
        tensors = merged(map(open_tensors, files.weights))
        return convert_part(tensors, part, values, config, dtype, allow_non_finite, place)
    except InputError as error:
        raise InputError(f"{files.name}: {error}") from None


def convert_part(
    tensors: Mapping[str, StoredTensor],
    part: DrawingPart,
    values: Mapping[str, Any],
    config: PartConfig,
    dtype: jnp.dtype | None = None,
    allow_non_finite: bool = False,
    place: Place | None = None,
) -> LoadedPart:
    """Turn a part's tensors into parameters; arguments and errors as in `read_part`."""
    kept = {name: tensor for name, tensor in tensors.items() if name != POSITION_IDS}
    old_names = part is VAE and has_old_names(kept)
    rows = part_rows(part, config, old_names)
    params = convert_rows(kept, rows, dtype=dtype, allow_non_finite=allow_non_finite, place=place)
    return LoadedPart(part, values, config, params, old_names, len(kept) < len(tensors))


def part_config(part: DrawingPart, values: Mapping[str, Any], name: str) -> PartConfig:
    """The config of a part from the contents of its file; errors name the file `name`.

    Raises:
      InputError: the config is of another class, or a field is not supported.
    """
    stated = _class_name(values)
    if stated is not None and stated not in part.class_names:
        raise InputError(f"{name} is the config of a {stated:.60}; the {part.name} must be a {part.class_names[0]}")
    if values.get("addition_embed_type") == "text_time":
        raise InputError(
            f"{name} is the config of Stable Diffusion XL (addition_embed_type is 'text_time'), whose text encoders "
            "cannot read BLIP-Diffusion's vectors; take one of Stable Diffusion 1.x"
        )
    try:
        return part.config_class.from_dict(values)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def part_rows(part: DrawingPart, config: PartConfig, old_names: bool = False) -> list[Parameter]:
    """Every parameter of a part, with its name in upstream's file."""
    rows = [parameter_at(path, shape) for path, shape in _shapes(part, config)]
    return [replace(row, name=old_name(row.name)) for row in rows] if old_names else rows


@lru_cache(maxsize=8)
def _shapes(part: DrawingPart, config: PartConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Path and shape of every parameter; tracing a full-size UNet takes seconds."""
    model = part.model_class(config)
    try:
        tree = jax.eval_shape(model.init, jax.random.key(0), *part.inputs(config))["params"]
    except (TypeError, OverflowError) as error:  # JAX's, of numbers beyond its integers
        raise InputError(f"the {part.name}'s config describes no model ({first_line(error)}); fetch it again") from None
    return [(path, leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()]


def _class_name(values: Mapping[str, Any]) -> str | None:
    names = values.get("architectures")
    name = values.get("_class_name") or (names[0] if isinstance(names, list) and names else None)
    return None if name is None else str(name)


def _class_names() -> str:
    return ", ".join(part.class_names[0] for part in DRAWING_PARTS.values())
