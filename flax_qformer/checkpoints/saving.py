"""Write a model to a folder: as a checkpoint of ours, or as PyTorch loads it."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from flax_qformer.checkpoints.atomic import check_absent, check_apart, check_space, new_folder
from flax_qformer.checkpoints.loading import (
    CLASSES,
    AnyModel,
    Loaded,
    as_dtype,
    check_tree,
    completed,
    initial_params,
    load,
    located,
)
from flax_qformer.checkpoints.model_files import PARAMS, TOKENIZER_FILES, ModelFiles
from flax_qformer.convert import export
from flax_qformer.convert.tables.qformer import Layout
from flax_qformer.errors import InputError
from flax_qformer.models.config import Blip2Config
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.models.surgery import check_merged, unstack_layers
from flax_qformer.parallel.processes import from_first, is_first, tells_of_lost_process, wait_for_all
from flax_qformer.processing.processor import ImageProcessor, Processor, image_settings_file, tokenizer_of

CHUNK_BYTES = 1 << 20
"""Of what is written as one piece, and so is read as one: a chip's part of a parameter needs few more."""

WRITE_BYTES = 1 << 27
"""Of what is copied on its way to disk, held at once, unless one parameter is more."""


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
    check_tree(shapes, model.config, type(model))
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
    found = located(source, config)
    loaded = load(found, None, config, None if dtype is None else as_dtype(dtype), allow_non_finite)
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
    found = located(source, None)
    loaded = load(found, None, None, None, allow_non_finite=True)
    if layout is None:
        layout = "lavis" if loaded.model_class is Blip2ForPreTraining else "diffusers"
    if layout == "diffusers":
        loaded = completed(replace(loaded, model_class=Blip2QFormerModel), loaded.params["query_tokens"].dtype)
    settings, notes = _settings(found, loaded, None)
    tensors = export(loaded.params, loaded.config, layout)
    with new_folder(Path(destination), overwrite) as folder:
        _write_files(folder, settings)
        with _saving(folder, tensors.values()):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        # safetensors lets nobody else read what it writes.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return f"{loaded.summary()}; wrote {destination}{notes}"


def _with_trained(config: Blip2Config, params: Mapping[str, Any]) -> Blip2Config:
    """The config, in which modules that have left their initial values are no longer recorded as newly initialised."""
    trained = set()
    for model_class in CLASSES.values():
        names = [name for name, _ in config.newly_initialised if name in model_class.parts and name in params]
        initial = initial_params(model_class, config, names) if names else {}
        for name in names:
            pairs = zip(jax.tree.leaves(params[name]), jax.tree.leaves(initial[name]), strict=True)
            if not all(_is_close(leaf, np.asarray(first)) for leaf, first in pairs):
                trained.add(name)
    return replace(config, newly_initialised=tuple(pair for pair in config.newly_initialised if pair[0] not in trained))


def _is_close(leaf: Any, first: np.ndarray) -> bool:
    """Whether a parameter has its initial value, up to the rounding of its dtype."""
    error = jnp.abs(leaf.astype(jnp.float32) - first)
    return bool((error <= 1e-8 + 4 * jnp.finfo(leaf.dtype).eps * np.abs(first)).all())


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
    source: ModelFiles, loaded: Loaded, tokenizer: str | os.PathLike[str] | None
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
