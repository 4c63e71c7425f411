"""Write a model to a Flax folder."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flax_qformer.checkpoints.atomic import new_folder
from flax_qformer.checkpoints.loading import CLASSES, AnyModel, Loaded, check_tree, initial_params
from flax_qformer.checkpoints.model_files import TOKENIZER_FILES, ModelFiles
from flax_qformer.checkpoints.writing import write_files, write_params
from flax_qformer.errors import InputError
from flax_qformer.json_files import json_bytes
from flax_qformer.models.config import Blip2Config
from flax_qformer.models.surgery import check_merged, unstack_layers
from flax_qformer.parallel.processes import from_first, is_first, wait_for_all
from flax_qformer.processing.processor import ImageProcessor, Processor, image_settings_file, tokenizer_of


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
            write_files(folder, {"config.json": config_file(config, type(model))})
            if processor is not None:
                processor.save_pretrained(folder)
        write_params(folder, params)
    wait_for_all("saved")


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


def config_file(config: Blip2Config, model_class: type[AnyModel]) -> bytes:
    return json_bytes({"architectures": [model_class.__name__], **config.to_dict()})


def small_files(
    source: ModelFiles, loaded: Loaded, tokenizer: str | os.PathLike[str] | None
) -> tuple[dict[str, bytes], str]:
    """The files of a folder except the parameters, and a note for the caller."""
    image_processor = ImageProcessor.from_source(source, loaded.config.vision_config.image_size)
    files = {
        "config.json": config_file(loaded.config, loaded.model_class),
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
