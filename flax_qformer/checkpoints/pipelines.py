"""A drawing pipeline on disk and on the hub: a folder for each part, and `model_index.json`.

It reads the folders that upstream publishes, their converted form, and LAVIS's unpacked tar, which has no configs.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_qformer.checkpoints.loading import Loaded, from_pretrained, load
from flax_qformer.checkpoints.model_files import (
    DEFAULT_MODEL,
    DEFAULT_PIPELINE,
    PARAMS,
    AnyModelName,
    ModelFiles,
    download,
    files_in,
    is_hub_id,
    locate,
)
from flax_qformer.checkpoints.parts import (
    CONTROLNET,
    DRAWING_PARTS,
    TEXT_ENCODER,
    UNET,
    VAE,
    DrawingPart,
    LoadedPart,
    convert_part,
    load_part,
    part_config,
    read_part,
)
from flax_qformer.checkpoints.reading import Place, as_dtype
from flax_qformer.convert.files import open_tensors
from flax_qformer.diffusion.schedulers import scheduler_from_config
from flax_qformer.errors import InputError, first_line, listed
from flax_qformer.json_files import read_json
from flax_qformer.parallel.partition_rules import sharding_of
from flax_qformer.processing.processor import Processor

INDEX = "model_index.json"
PIPELINE, CONTROLNET_PIPELINE = "BlipDiffusionPipeline", "BlipDiffusionControlNetPipeline"
"""Upstream's classes, by the names in a `model_index.json`."""

QFORMER_CLASS = "Blip2QFormerModel"

CLIP = "openai/clip-vit-large-patch14"
"""The tokenizer of Stable Diffusion 1.x, for LAVIS's folder, which has none."""

CLIP_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

_SD_1_5_LEVELS = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
SD_1_5: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        **_SD_1_5_LEVELS,
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "sample_size": 512,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        "architectures": ["ContextCLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}
"""The configs of LAVIS's parts, those of Stable Diffusion 1.5; other fields have upstream's defaults."""

LAVIS_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


@dataclass(frozen=True)
class PipelineFiles:
    """The files of a pipeline.

    Attributes:
      name: the name that the caller gave.
      index: the contents of `model_index.json`.
      parts: the files of each drawing part, by its folder's name.
      qformer: the files of the Q-Former.
      scheduler: the contents of `scheduler_config.json`.
      tokenizer: the folder of CLIP's tokenizer.
      image_processor: `image_processor/preprocessor_config.json`, if there is one.
      is_lavis: whether the parts have no configs.
    """

    name: str
    index: Mapping[str, Any]
    parts: Mapping[str, ModelFiles]
    qformer: ModelFiles
    scheduler: Mapping[str, Any]
    tokenizer: Path
    image_processor: Path | None
    is_lavis: bool = False

    @property
    def ctx_begin_pos(self) -> int:
        """The position of the subject vectors among the prompt's tokens."""
        value = self.index.get("ctx_begin_pos", 2)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(
                f"{self.name}/{INDEX}: ctx_begin_pos is {value!r:.40}; it must be a whole number, upstream's is 2"
            )
        return value

    def read(
        self,
        part: DrawingPart,
        dtype: jnp.dtype | None = None,
        allow_non_finite: bool = False,
        place: Place | None = None,
    ) -> LoadedPart:
        """Read a drawing part."""
        values = SD_1_5[part.name] if self.is_lavis else None
        return read_part(self.parts[part.name], part, dtype, allow_non_finite, place, values)

    def read_qformer(self, dtype: jnp.dtype | None = None, allow_non_finite: bool = False) -> Loaded:
        return load(self.qformer, None, None, dtype, allow_non_finite)


@dataclass(frozen=True)
class PipelineParts:
    """A pipeline in memory.

    Attributes:
      components: the Flax modules unet, vae, text_encoder, qformer, and controlnet if there is one; several ControlNets
        are a tuple.
      params: the tree of parameters of each.
      scheduler: the scheduler of the folder.
      tokenizer: transformers' `CLIPTokenizer`.
      processor: the Q-Former's `Processor`.
      index: the contents of `model_index.json`.
      ctx_begin_pos: the position of the subject vectors among the prompt's tokens.
      subject_embeddings: (Q, D), the vectors in a file of LAVIS's fine-tuning, or None.
    """

    components: dict[str, Any]
    params: dict[str, Any]
    scheduler: Any
    tokenizer: Any
    processor: Processor
    index: Mapping[str, Any]
    ctx_begin_pos: int
    subject_embeddings: Any = None


def load_pipeline_parts(
    path_or_hub_id: AnyModelName | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    with_controlnet: bool | None = None,
    controlnet: AnyModelName | Sequence[AnyModelName] | None = None,
    subject: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> PipelineParts:
    """Load all parts of a pipeline.

    Args:
      path_or_hub_id: the folder that upstream publishes, a converted one, or LAVIS's; or a hub id. By default the tiny
        pipeline inside the package.
      dtype, param_dtype, mesh: as in `from_pretrained`.
      with_controlnet: load the folder's ControlNet; by default if the pipeline's class has one.
      controlnet: a ControlNet, or several, instead of the folder's own.
      subject: a file of LAVIS's fine-tuning, which replaces the UNet and brings the subject's vectors.
      tokenizer: folder or hub id of CLIP's tokenizer, if the pipeline has none.

    Raises:
      InputError: there is no such pipeline, a part is missing, or one does not fit its config.
    """
    compute, kept = as_dtype(dtype), None if param_dtype is None else as_dtype(param_dtype)
    place = None if mesh is None else partial(sharding_of, mesh=mesh)
    files = locate_pipeline(path_or_hub_id, with_controlnet if controlnet is None else False, tokenizer)
    components: dict[str, Any] = {}
    params: dict[str, Any] = {}
    vectors = None
    for name in files.parts:
        part = DRAWING_PARTS[name]
        if part is UNET and subject is not None:
            loaded, vectors = read_subject(subject, files, kept, place)
        else:
            loaded = files.read(part, kept, place=place)
        components[name], params[name] = loaded.module(compute, kept), loaded.params
    if controlnet is not None:
        several: Any = controlnet if isinstance(controlnet, list | tuple) else [controlnet]
        pairs = [load_part(one, CONTROLNET, dtype, param_dtype, mesh=mesh) for one in several]
        modules, trees = zip(*pairs, strict=True)
        is_one = len(pairs) == 1
        components["controlnet"], params["controlnet"] = (modules[0], trees[0]) if is_one else (modules, trees)
    components["qformer"], params["qformer"] = from_pretrained(files.qformer, dtype, param_dtype, mesh=mesh)
    check_widths(files.name, components)
    processor = Processor.from_pretrained(files.qformer, config=components["qformer"].config)
    return PipelineParts(
        components=components,
        params=params,
        scheduler=scheduler_from_config(files.scheduler),
        tokenizer=load_clip_tokenizer(files.tokenizer, components["text_encoder"].config.vocab_size),
        processor=processor,
        index=files.index,
        ctx_begin_pos=files.ctx_begin_pos,
        subject_embeddings=vectors,
    )


def load_component(
    path_or_hub_id: AnyModelName,
    name: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    allow_non_finite: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Load one part alone.

    Args:
      path_or_hub_id: a pipeline, or the folder of the part.
      name: unet, vae, text_encoder, controlnet or qformer, if the first argument is a pipeline.
      dtype, param_dtype, mesh, allow_non_finite: as in `from_pretrained`.

    Returns:
      The module and its parameters.

    Raises:
      InputError: there is no such part, or it does not fit its config.
    """
    options: dict[str, Any] = {"mesh": mesh, "allow_non_finite": allow_non_finite}
    if name is None or name == "qformer":
        return from_pretrained(path_or_hub_id, dtype, param_dtype, **options)
    if name not in DRAWING_PARTS:
        raise InputError(f"`name` is {name!r:.40}; the parts of a pipeline are {', '.join(DRAWING_PARTS)} and qformer")
    part = DRAWING_PARTS[name]
    source = str(path_or_hub_id)
    folder = _downloaded(source, [part]) if not os.path.isdir(source) and is_hub_id(source) else Path(source)
    return load_part(_part_files(folder, part, source), part, dtype, param_dtype, **options)


def locate_pipeline(
    name: AnyModelName | None = None,
    with_controlnet: bool | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> PipelineFiles:
    """Find the files of a pipeline, which are downloaded for a hub id; arguments as in `load_pipeline_parts`.

    Raises:
      InputError: it is no pipeline, or a part is missing or of another class.
    """
    source = str(DEFAULT_PIPELINE if name is None else name.name if isinstance(name, ModelFiles) else name)
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(source):
            raise InputError(f"there is no folder {source}; give a pipeline's folder, or a hub id")
        folder = download(source, [INDEX])
        index = _read_index(folder, source)
        parts = _part_kinds(index, with_controlnet)
        folder = _downloaded(source, parts, is_pipeline=True)
    if _is_lavis(folder):
        return _lavis_pipeline(folder, source, tokenizer)
    index = _read_index(folder, source)
    files = {part.name: _part_files(folder, part, source) for part in _part_kinds(index, with_controlnet)}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise InputError(f"{source} has no scheduler/scheduler_config.json; fetch it too")
    image_processor = folder / "image_processor" / "preprocessor_config.json"
    return PipelineFiles(
        source,
        index,
        files,
        _qformer_files(folder, source),
        read_json(scheduler),
        _tokenizer_folder(folder / "tokenizer", tokenizer, source),
        image_processor if image_processor.is_file() else None,
    )


def is_pipeline(name: AnyModelName) -> bool:
    """Whether a folder or hub id holds a whole pipeline, and not a Q-Former alone."""
    if isinstance(name, ModelFiles) or os.path.isfile(name):
        return False
    folder = Path(name)
    if not folder.is_dir():
        if not is_hub_id(str(name)):
            return False
        folder = download(str(name), [INDEX, "*/config.json"])
    has_index = (folder / INDEX).is_file() or _is_lavis(folder)
    return has_index and any((folder / part).is_dir() for part in ("unet", "vae", "text_encoder"))


def read_subject(
    path: str | os.PathLike[str],
    base: PipelineFiles,
    dtype: jnp.dtype | None = None,
    place: Place | None = None,
) -> tuple[LoadedPart, Any]:
    """Read a file of LAVIS's fine-tuning: a UNet, and a subject's vectors.

    Returns:
      The UNet, with the base's config, and the vectors (Q, D) float32.

    Raises:
      InputError: it is no such file, or does not fit the base.
    """
    tensors = open_tensors(Path(path))
    unet = {name.removeprefix("unet."): tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    vectors = tensors.get("ctx_embeddings_cache")
    # Frozen parameters are not in the file, but constants are.
    others = [
        name
        for name in tensors
        if not name.startswith("unet.") and name != "ctx_embeddings_cache" and not name.endswith("position_ids")
    ]
    if not unet or vectors is None or others:
        found = f"it also holds {listed(others)}" if others else "it lacks unet.* or ctx_embeddings_cache"
        raise InputError(f"{path} is no file of LAVIS's fine-tuning: {found}; give its checkpoint_*.pth")
    files = base.parts["unet"]
    values = files.config_values if files.config else SD_1_5["unet"]
    config = part_config(UNET, values, str(files.config or files.name))
    try:
        loaded = convert_part(unet, UNET, values, config, dtype, place=place)
        array = jnp.asarray(vectors.view(), jnp.float32)
        if array.ndim != 3 or array.shape[0] != 1 or not jnp.isfinite(array).all():
            raise InputError(f"ctx_embeddings_cache has the shape {array.shape} or is not finite; it must be (1, Q, D)")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return loaded, array[0]


def pipeline_index(scheduler: str, ctx_begin_pos: int = 2, with_controlnet: bool = False) -> dict[str, Any]:
    """The contents of a `model_index.json`. scheduler: the name of its class."""
    parts = {name: part for name, part in DRAWING_PARTS.items() if part is not CONTROLNET or with_controlnet}
    libraries = {name: "blip_diffusion" if part is TEXT_ENCODER else "diffusers" for name, part in parts.items()}
    return {
        "_class_name": CONTROLNET_PIPELINE if with_controlnet else PIPELINE,
        "_diffusers_version": "0.32.2",
        **{name: [libraries[name], part.class_names[0]] for name, part in parts.items()},
        "qformer": ["blip_diffusion", QFORMER_CLASS],
        "scheduler": ["diffusers", scheduler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_processor": ["blip_diffusion", "BlipImageProcessor"],
        "ctx_begin_pos": ctx_begin_pos,
        "mean": None,
        "std": None,
    }


def check_widths(name: str, components: Mapping[str, Any]) -> None:
    """Raise InputError if parts do not fit each other."""
    controlnets = components.get("controlnet", ())
    configs = {key: module.config for key, module in components.items() if key != "controlnet"}
    width = configs["text_encoder"].hidden_size
    widths = {
        "the Q-Former's vectors": configs["qformer"].qformer_config.hidden_size,
        "the unet's cross_attention_dim": configs["unet"].cross_attention_dim,
    }
    for i, module in enumerate(controlnets if isinstance(controlnets, tuple) else (controlnets,)):
        widths[f"the cross_attention_dim of controlnet {i}"] = module.config.cross_attention_dim
    wrong = [f"{what} ({size})" for what, size in widths.items() if size != width]
    if wrong:
        raise InputError(
            f"{name}: the text encoder has the width {width}, but {' and '.join(wrong)} differs; take parts that were "
            "trained together"
        )
    channels, latents = configs["unet"].in_channels, configs["vae"].latent_channels
    if channels != latents:
        raise InputError(
            f"{name}: the unet takes {channels} channels, but the vae's latents have {latents}; take parts that were "
            "trained together"
        )


def load_clip_tokenizer(folder: Path, vocab_size: int) -> Any:
    """transformers' `CLIPTokenizer` of a folder with vocab.json and merges.txt, or tokenizer.json.

    Raises:
      InputError: it is damaged, or has more tokens than the text encoder.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(["a dog \u2603"], verbose=False)["input_ids"][0]
        if ids[0] != tokenizer.bos_token_id or ids[-1] != tokenizer.eos_token_id:
            raise ValueError("a text does not begin and end with its special tokens")
        size = max(tokenizer.get_vocab().values()) + 1
    # Damage shows as many kinds of errors.
    except Exception as error:
        raise InputError(
            f"the tokenizer in {folder} cannot be used ({first_line(error)}); fetch its files again"
        ) from None
    if size > vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has {size} tokens, and the text encoder {vocab_size}; give its own"
        )
    return tokenizer


def _read_index(folder: Path, name: str) -> dict[str, Any]:
    """Read and check the `model_index.json` of a pipeline, which errors call `name`."""
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"{name} is no pipeline: it has no {INDEX}; name the folder with unet, vae and text_encoder")
    index = read_json(path)
    stated = index.get("_class_name")
    if stated not in (PIPELINE, CONTROLNET_PIPELINE):
        raise InputError(f"{path} names the class {stated!r:.60}; it must be {PIPELINE} or {CONTROLNET_PIPELINE}")
    expected = {name: part.class_names for name, part in DRAWING_PARTS.items()} | {"qformer": (QFORMER_CLASS,)}
    for part, names in expected.items():
        # The library's name, the first of the two, differs between copies.
        entry = index.get(part)
        if entry is None:
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1] in names):
            raise InputError(f"{path} gives the {part} as {entry!r:.80}; its class must be {names[0]}")
    return index


def _part_kinds(index: Mapping[str, Any], with_controlnet: bool | None) -> list[DrawingPart]:
    """The drawing parts to read; with the ControlNet by default if the pipeline's class has one."""
    if with_controlnet is None:
        with_controlnet = index.get("_class_name") == CONTROLNET_PIPELINE
    return [UNET, VAE, TEXT_ENCODER, *([CONTROLNET] if with_controlnet else [])]


def _part_files(folder: Path, part: DrawingPart, source: str) -> ModelFiles:
    if not (folder / part.name).is_dir():
        raise InputError(f"{source} has no folder {part.name}, a part of the pipeline; fetch it too")
    files = files_in(folder / part.name, f"{source}/{part.name}")
    if files.config is None:
        raise InputError(f"{source}/{part.name} has no config.json; fetch it too")
    if not (files.params or files.weights):
        raise InputError(
            f"{source}/{part.name} holds no checkpoint: no {PARAMS}, {part.weights}.safetensors or .bin; fetch it too"
        )
    return files


def _qformer_files(folder: Path, source: str) -> ModelFiles:
    if folder == DEFAULT_PIPELINE:
        return locate(DEFAULT_MODEL)
    if not (folder / "qformer").is_dir():
        raise InputError(f"{source} has no folder qformer, a part of the pipeline; fetch it too")
    return replace(files_in(folder / "qformer", f"{source}/qformer"), name=f"{source}/qformer")


def _tokenizer_folder(folder: Path, name: str | os.PathLike[str] | None, source: str) -> Path:
    """The folder of CLIP's tokenizer: the named one, else the pipeline's."""
    if name is not None:
        folder = Path(name)
        if not folder.is_dir() and is_hub_id(str(name)):
            folder = download(str(name), CLIP_TOKENIZER_FILES)
        source = str(name)
    if (folder / "tokenizer.json").is_file() or all((folder / file).is_file() for file in CLIP_TOKENIZER_FILES[:2]):
        return folder
    raise InputError(
        f"{source} has no tokenizer of CLIP, neither vocab.json with merges.txt nor tokenizer.json; fetch it, or give "
        "`tokenizer=DIR`"
    )


def _is_lavis(folder: Path) -> bool:
    return not (folder / INDEX).is_file() and (folder / "blip_model" / "blip_weight.pt").is_file()


def _lavis_pipeline(folder: Path, source: str, tokenizer: str | os.PathLike[str] | None) -> PipelineFiles:
    kinds = [UNET, VAE, TEXT_ENCODER]
    missing = [part.name for part in kinds if not (folder / part.name).is_dir()]
    if missing:
        raise InputError(f"{source} has no {' and no '.join(missing)}, parts of the pipeline; fetch them too")
    parts = {part.name: files_in(folder / part.name, f"{source}/{part.name}") for part in kinds}
    index = pipeline_index(LAVIS_SCHEDULER["_class_name"])
    own = folder / "tokenizer"
    tokenizer_folder = _tokenizer_folder(own, tokenizer or (None if own.is_dir() else CLIP), source)
    qformer = files_in(folder, source)
    return PipelineFiles(source, index, parts, qformer, LAVIS_SCHEDULER, tokenizer_folder, None, is_lavis=True)


def _downloaded(hub_id: str, parts: Sequence[DrawingPart], is_pipeline: bool = False) -> Path:
    """Download parts of a pipeline: for each its converted parameters, or safetensors, or pickles, in this order."""
    names = [part.name for part in parts] + (["qformer"] if is_pipeline else [])
    patterns = [f"{name}/config.json" for name in names]
    if is_pipeline:
        patterns += [
            INDEX,
            "scheduler/*.json",
            "tokenizer/*",
            "image_processor/*.json",
            "qformer/*.json",
            "qformer/*.txt",
        ]
    for kinds in (("{}/params/**",), ("{}/{}.safetensors*", "{}/{}-*.safetensors"), ("{}/{}.bin*", "{}/{}-*.bin")):
        for name in names:
            for stem in ("model", "pytorch_model", "diffusion_pytorch_model"):
                patterns += [kind.format(name, stem) for kind in kinds]
        folder = download(hub_id, patterns)
        found = {name: files_in(folder / name, name) for name in names if (folder / name).is_dir()}
        names = [name for name, files in found.items() if not (files.params or files.weights)]
        if not names:
            break
    return folder
