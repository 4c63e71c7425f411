"""Write a drawing pipeline to a folder: converted, exported for upstream, or from memory."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_qformer.checkpoints.atomic import new_folder
from flax_qformer.checkpoints.loading import Loaded, completed
from flax_qformer.checkpoints.parts import DRAWING_PARTS, LoadedPart
from flax_qformer.checkpoints.pipelines import (
    CLIP_TOKENIZER_FILES,
    INDEX,
    PipelineFiles,
    pipeline_index,
)
from flax_qformer.checkpoints.saving import config_file, small_files
from flax_qformer.checkpoints.writing import write_files, write_params, write_tensors
from flax_qformer.convert import export
from flax_qformer.errors import InputError
from flax_qformer.json_files import json_bytes
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.parallel.processes import from_first, is_first, wait_for_all
from flax_qformer.processing.processor import Processor, image_settings_file

Write = Callable[[Path, LoadedPart | Loaded], None]


def save_pipeline(
    path: str | os.PathLike[str],
    components: Mapping[str, Any],
    params: Mapping[str, Any],
    scheduler: Any,
    tokenizer: Any,
    processor: Processor,
    ctx_begin_pos: int = 2,
    *,
    overwrite: bool = False,
) -> None:
    """Write a pipeline to a folder, atomically, in the dtypes of its parameters; all processes call this together.

    Args:
      path: the folder.
      components, params, scheduler, tokenizer, processor, ctx_begin_pos: as in `PipelineParts`.
      overwrite: replace an existing folder.

    Raises:
      InputError: the folder exists and may not be replaced, or there are several ControlNets.
    """
    if isinstance(components.get("controlnet"), tuple):
        raise InputError("a pipeline's folder holds one ControlNet, and there are several; save it with one")
    index = pipeline_index(type(scheduler).__name__, ctx_begin_pos, "controlnet" in components)
    with new_folder(Path(path), overwrite) if is_first() else contextlib.nullcontext("") as folder:
        folder = Path(from_first(str(folder)))
        for name, module in components.items():
            if is_first():
                if name == "qformer":
                    write_files(folder / name, {"config.json": config_file(module.config, type(module))})
                    processor.save_pretrained(folder / name)
                else:
                    values = DRAWING_PARTS[name].config_values(module.config)
                    write_files(folder / name, {"config.json": json_bytes(values)})
            wait_for_all("made")
            write_params(folder / name, params[name])
        if is_first():
            tokenizer.save_pretrained(folder / "tokenizer")
            # Upstream's CLIPTokenizer reads vocab.json and merges.txt.
            tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
            settings = image_settings_file(processor.image_processor)
            write_files(folder, {INDEX: json_bytes(index)})
            write_files(folder / "scheduler", {"scheduler_config.json": json_bytes(scheduler.to_dict())})
            write_files(folder / "image_processor", {"preprocessor_config.json": settings})
    wait_for_all("saved")


def convert_pipeline(
    files: PipelineFiles,
    destination: Path,
    dtype: jnp.dtype | None = None,
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> str:
    """Convert a pipeline to Flax folders, one part in memory at a time; see `convert_checkpoint`."""

    def write(folder: Path, loaded: LoadedPart | Loaded) -> None:
        if isinstance(loaded, LoadedPart):
            write_files(folder, {"config.json": json_bytes(loaded.converted_values())})
        write_params(folder, loaded.params)

    return _write_parts(files, destination, dtype, overwrite, allow_non_finite, write)


def export_pipeline(files: PipelineFiles, destination: Path, overwrite: bool = False) -> str:
    """Write a pipeline as upstream does, one part in memory at a time; see `export_checkpoint`."""

    def write(folder: Path, loaded: LoadedPart | Loaded) -> None:
        if isinstance(loaded, LoadedPart):
            write_files(folder, {"config.json": json_bytes(loaded.values)})
            write_tensors(folder / f"{loaded.part.weights}.safetensors", loaded.tensors())
        else:
            whole = completed(replace(loaded, model_class=Blip2QFormerModel), loaded.params["query_tokens"].dtype)
            write_tensors(folder / "model.safetensors", export(whole.params, whole.config, "diffusers"))

    return _write_parts(files, destination, None, overwrite, True, write)


def _write_parts(
    files: PipelineFiles,
    destination: Path,
    dtype: jnp.dtype | None,
    overwrite: bool,
    allow_non_finite: bool,
    write: Write,
) -> str:
    """Read each part, write it by `write`, and then the small files; returns a line on what was done."""
    lines = []
    with new_folder(destination, overwrite) as folder:
        for name in files.parts:
            (folder / name).mkdir()
            part = files.read(DRAWING_PARTS[name], dtype, allow_non_finite)
            write(folder / name, part)
            lines.append(f"{name}: {_size(part.params)}")
            del part
        qformer = files.read_qformer(dtype, allow_non_finite)
        contents, notes = small_files(files.qformer, qformer, None)
        write_files(folder / "qformer", contents)
        write(folder / "qformer", qformer)
        lines.append(f"qformer: {_size(qformer.params)}")
        tokenizer = [files.tokenizer / name for name in CLIP_TOKENIZER_FILES]
        settings = files.image_processor.read_bytes() if files.image_processor else contents["preprocessor_config.json"]
        write_files(folder, {INDEX: json_bytes(files.index)})
        write_files(folder / "scheduler", {"scheduler_config.json": json_bytes(files.scheduler)})
        write_files(folder / "tokenizer", {path.name: path.read_bytes() for path in tokenizer if path.is_file()})
        write_files(folder / "image_processor", {"preprocessor_config.json": settings})
    return f"read {', '.join(lines)}; wrote {destination}{notes}"


def _size(params: Mapping[str, Any]) -> str:
    """A count of tensors and parameters, with their dtypes."""
    leaves = jax.tree.leaves(params)
    dtypes = " and ".join(dict.fromkeys(leaf.dtype.name for leaf in leaves))
    return f"{len(leaves)} tensors, {sum(leaf.size for leaf in leaves):,} parameters in {dtypes}"
