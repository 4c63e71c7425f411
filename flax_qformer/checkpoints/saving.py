"""Write a model to a folder, as a Flax or a PyTorch checkpoint."""

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
    AnyConfig,
    AnyModel,
    Loaded,
    as_dtype,
    check_tree,
    completed,
    initial_params,
    load,
    locate_checkpoint,
)
from flax_qformer.checkpoints.model_files import PARAMS, TOKENIZER_FILES, AnyModelName, ModelFiles, locate
from flax_qformer.convert import export
from flax_qformer.convert.tables.qformer import Layout
from flax_qformer.errors import InputError
from flax_qformer.models.config import Blip2Config
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.models.surgery import check_merged, unstack_layers
from flax_qformer.parallel.processes import from_first, is_first, is_lost_process_error, wait_for_all
from flax_qformer.processing.processor import ImageProcessor, Processor, image_settings_file, tokenizer_of

CHUNK_BYTES = 1 << 20
"""Bytes per orbax chunk: the unit in which a shard is read."""

WRITE_BYTES = 1 << 27
"""Bytes of copies that a write holds at once, unless one parameter is larger."""


def save_pretrained(
    path: str | os.PathLike[str],
    model: AnyModel,
    params: Mapping[str, Any],
    processor: Processor | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model to a folder, atomically, in the dtypes of its parameters.

    Modules that are in the tree but that `model` does not read are written too. Modules that training has changed are
    no longer recorded as newly initialised. All processes of a job call this together.

    Raises:
      InputError: the folder exists and may not be replaced, the parameters are not those of the model, or they have
        LoRA weights.
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
    source: AnyModelName,
    destination: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    config: AnyConfig | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> str:
    """Convert a checkpoint to a Flax folder; `flax-qformer convert`.

    Args:
      source: anything that `from_pretrained` takes.
      destination: the folder to create, atomically.
      dtype: cast the parameters; by default each keeps its dtype.
      config: a `config.json`, if the checkpoint has none; the default for LAVIS's is the published geometry.
      tokenizer: folder or hub id, if the checkpoint has none; the default is `bert-base-uncased`.
      overwrite: replace an existing folder.
      allow_non_finite: accept infinities and NaN.

    Returns:
      A line on what was done.

    Raises:
      InputError: the source cannot be used, or the destination exists.
    """
    target_dtype = None if dtype is None else as_dtype(dtype)
    files, loaded = _load_for(destination, overwrite, source, config, target_dtype, allow_non_finite)
    small_files, notes = _small_files(files, loaded, tokenizer)
    with new_folder(Path(destination), overwrite) as folder:
        _write_files(folder, small_files)
        _write_params(folder, loaded.params)
    return f"{loaded.summary()}; wrote {destination}{notes}"


def export_checkpoint(
    source: AnyModelName,
    destination: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> str:
    """Write a folder with a PyTorch checkpoint; `flax-qformer export`.

    Args:
      source: anything that `from_pretrained` takes.
      destination: the folder to create, atomically.
      layout: whose names to use. "diffusers", the default, is for upstream's `Blip2QFormerModel.from_pretrained`; a
        stage-1 model without a `proj_layer` gets one that is the identity, and keeps its heads, which upstream ignores.
        "lavis", the default for a stage-1 model, is for `load_state_dict` of LAVIS's model.
      overwrite: replace an existing folder.

    Returns:
      A line on what was done.

    Raises:
      InputError: the source cannot be used, or the destination exists.
    """
    files, loaded = _load_for(destination, overwrite, source, allow_non_finite=True)
    if layout is None:
        layout = "lavis" if loaded.model_class is Blip2ForPreTraining else "diffusers"
    if layout == "diffusers":
        loaded = completed(replace(loaded, model_class=Blip2QFormerModel), loaded.params["query_tokens"].dtype)
    small_files, notes = _small_files(files, loaded, None)
    tensors = export(loaded.params, loaded.config, layout)
    with new_folder(Path(destination), overwrite) as folder:
        _write_files(folder, small_files)
        with _saving(folder, tensors.values()):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes its files readable for their owner only.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return f"{loaded.summary()}; wrote {destination}{notes}"


def _load_for(
    destination: str | os.PathLike[str],
    overwrite: bool,
    source: AnyModelName,
    config: AnyConfig | None = None,
    dtype: jnp.dtype | None = None,
    allow_non_finite: bool = False,
) -> tuple[ModelFiles, Loaded]:
    """Load a checkpoint that is to be written to another folder.

    Raises:
      InputError: the source cannot be used, or the destination cannot be created or may not be replaced.
    """
    check_absent(Path(destination), overwrite)
    files = locate(source)
    check_apart(Path(files.name), Path(destination))
    files = locate_checkpoint(files, config)
    return files, load(files, None, config, dtype, allow_non_finite)


def _with_trained(config: Blip2Config, params: Mapping[str, Any]) -> Blip2Config:
    """The config, without newly initialised modules whose parameters have changed since."""
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

    # Uncompressed, since floats hardly compress. Orbax copies arrays to cut them into chunks: the limit bounds these
    # copies, and must exceed the largest array. By default it would copy host arrays once more.
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
    """Raise OSError if arrays cannot be written; orbax and safetensors raise their own types."""
    check_space(folder, sum(array.nbytes for array in arrays))
    try:
        yield
    except Exception as error:
        if is_lost_process_error(error):
            raise
        raise OSError(str(error)) from error


def _small_files(
    source: ModelFiles, loaded: Loaded, tokenizer: str | os.PathLike[str] | None
) -> tuple[dict[str, bytes], str]:
    """The files of a folder except the parameters, and a note for the caller."""
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
