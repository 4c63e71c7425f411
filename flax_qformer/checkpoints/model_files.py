"""Find the files of a model: in a folder, in the folder of a file, or on the hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from flax_qformer.errors import InputError, first_line
from flax_qformer.json_files import read_json

DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / "default"
"""The embedded checkpoint: small, and in the layout that upstream's `save_pretrained` writes."""

DEFAULT_PIPELINE = DEFAULT_MODEL / "pipeline"
"""The embedded pipeline around it. Its other parts are not trained, and its Q-Former is `DEFAULT_MODEL`."""

EXAMPLE_IMAGE = DEFAULT_MODEL.parent / "example.png"

BERT = "bert-base-uncased"
"""The tokenizer for checkpoints without one, as in upstream."""

PARAMS = "params"
"""Name of the orbax checkpoint in a Flax folder."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

SMALL_FILES = (
    "model_index.json",
    "image_processor/*.json",
    *("config.json", "preprocessor_config.json", *TOKENIZER_FILES),
    *(f"qformer/{name}" for name in ("config.json", "preprocessor_config.json", *TOKENIZER_FILES)),
)
"""Patterns of a model's files on the hub, except its parameters."""

_WEIGHTS = tuple(
    f"{stem}{suffix}{index}"
    for suffix, stems in (
        (".safetensors", ("model", "diffusion_pytorch_model")),
        (".bin", ("pytorch_model", "diffusion_pytorch_model")),
    )
    for stem in stems
    for index in ("", ".index.json")
)
"""Names of checkpoint files in the order in which they are looked for; diffusers' models have names of their own."""

_LAVIS = ("blip_model/blip_weight.pt", "proj_layer/proj_weight.pt")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model; None for files that are not there.

    Attributes:
      name: the name that the caller gave.
      config: `config.json`.
      params: folder of an orbax checkpoint.
      weights: PyTorch checkpoint files that together hold the model.
      tokenizer: folder with a tokenizer's files.
      image_processor: `preprocessor_config.json`.
      pipeline: `model_index.json` of the diffusers pipeline around it.
      hub_id: the repository that `params` or `weights` are still to be downloaded from.
    """

    name: str
    config: Path | None = None
    params: Path | None = None
    weights: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    image_processor: Path | None = None
    pipeline: Path | None = None
    hub_id: str | None = None

    @cached_property
    def config_values(self) -> dict[str, Any]:
        """The contents of `config`; empty if there is none.

        Raises:
          InputError: it is no JSON object.
        """
        return read_json(self.config) if self.config else {}


AnyModelName: TypeAlias = str | os.PathLike[str] | ModelFiles
"""A path, a hub id, or files that are located already."""


def locate(name: AnyModelName) -> ModelFiles:
    """Find the files of a model. Of a hub id, this downloads a few small files; `download_weights` fetches the rest.

    Args:
      name: a folder (Flax, upstream's `qformer` folder, its parent with `model_index.json`, or LAVIS's), a single
        checkpoint file, the `*.index.json` of a sharded one, or a hub id. Located files are returned as they are.

    Raises:
      InputError: nothing has this name, or it cannot be read or downloaded.
    """
    if isinstance(name, ModelFiles):
        return name
    path, name = Path(name), str(name)
    try:
        if name and path.is_dir():
            return files_in(path, name)
        if path.is_file():
            return replace(files_in(path.parent, name), params=None, weights=(path,))
    except OSError as error:
        raise InputError(f"{error.filename or name} cannot be read ({error.strerror})") from None
    if is_hub_id(name):
        return replace(files_in(download(name, SMALL_FILES), name), params=None, weights=(), hub_id=name)
    raise InputError(
        f"there is no file or folder {name or repr(name)}; give one, or a hub id such as Salesforce/blipdiffusion"
    )


def download_weights(files: ModelFiles) -> ModelFiles:
    """The files with the parameters: those of a hub id are downloaded, safetensors if there are any.

    Raises:
      InputError: they cannot be downloaded.
    """
    if files.hub_id is None:
        return files
    patterns = [*SMALL_FILES, f"{PARAMS}/**", "model*.safetensors*", "qformer/model*.safetensors*"]
    patterns += ["diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*.safetensors"]
    complete = files_in(download(files.hub_id, patterns), files.name)
    if complete.params or complete.weights:
        return complete
    patterns += ["pytorch_model*", "qformer/pytorch_model*", *_LAVIS]
    patterns += ["diffusion_pytorch_model.bin*", "diffusion_pytorch_model-*.bin"]
    return files_in(download(files.hub_id, patterns), files.name)


def find_tokenizer(name: str | os.PathLike[str]) -> Path | None:
    """The folder with a tokenizer's files, for a folder or a hub id; None if it has none."""
    path = Path(name)
    if not os.path.isdir(path):
        if not is_hub_id(str(name)):
            raise InputError(f"there is no folder {name} with a tokenizer")
        path = download(str(name), TOKENIZER_FILES)
    return path if any(os.path.isfile(path / file) for file in TOKENIZER_FILES[:2]) else None


def files_in(folder: Path, name: str) -> ModelFiles:
    pipeline = folder
    if (folder / "model_index.json").is_file() and (folder / "qformer").is_dir():
        folder = folder / "qformer"
    elif (folder.parent / "model_index.json").is_file():
        pipeline = folder.parent
    return ModelFiles(
        name,
        config=_first_file(folder, ["config.json"]),
        params=folder / PARAMS if (folder / PARAMS).is_dir() else None,
        weights=_weights_in(folder),
        tokenizer=find_tokenizer(folder),
        image_processor=_first_file(folder, ["preprocessor_config.json"])
        or _first_file(pipeline / "image_processor", ["preprocessor_config.json"]),
        pipeline=_first_file(pipeline, ["model_index.json"]),
    )


def _weights_in(folder: Path) -> tuple[Path, ...]:
    single = _first_file(folder, _WEIGHTS)
    if single:
        return (single,)
    return tuple(folder / file for file in _LAVIS if (folder / file).is_file())


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def is_hub_id(name: str) -> bool:
    looks_like_a_file = Path(name).suffix in (".safetensors", ".bin", ".pt", ".pth", ".json")
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not looks_like_a_file


def download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    # The hub's own errors and those of its download libraries.
    except Exception as error:
        raise InputError(
            f"{hub_id} is no file or folder here, and cannot be downloaded from the hub ({first_line(error)}); check "
            "the name and the connection, or give a folder"
        ) from None
