"""Convert models between Flax and PyTorch folders."""

import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from flax_qformer.checkpoints.atomic import check_absent, check_apart, new_folder
from flax_qformer.checkpoints.loading import AnyConfig, Loaded, completed, load, locate_checkpoint
from flax_qformer.checkpoints.model_files import AnyModelName, ModelFiles, locate
from flax_qformer.checkpoints.parts import CONTROLNET
from flax_qformer.checkpoints.pipeline_writing import convert_pipeline, export_pipeline
from flax_qformer.checkpoints.pipelines import PipelineFiles, is_pipeline, locate_pipeline
from flax_qformer.checkpoints.reading import as_dtype
from flax_qformer.checkpoints.saving import small_files
from flax_qformer.checkpoints.writing import write_files, write_params, write_tensors
from flax_qformer.convert import export
from flax_qformer.convert.tables.qformer import Layout
from flax_qformer.errors import InputError
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.models.qformer import Blip2QFormerModel


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

    A drawing pipeline becomes a Flax folder for each part.

    Args:
      source: anything that `from_pretrained` takes, or a pipeline's folder or hub id.
      destination: the folder to create, atomically.
      dtype: cast the parameters; by default each keeps its dtype.
      config: a `config.json`, if the checkpoint has none; the default for LAVIS's is the published geometry.
      tokenizer: folder or hub id, if the checkpoint has none; the default is `bert-base-uncased`. For a
        pipeline: the text encoder's tokenizer.
      overwrite: replace an existing folder.
      allow_non_finite: accept infinities and NaN.

    Returns:
      A line on what was done.

    Raises:
      InputError: the source cannot be used, or the destination exists.
    """
    target_dtype = None if dtype is None else as_dtype(dtype)
    if config is None and is_pipeline(source):
        pipeline = _locate_pipeline_for(destination, overwrite, source, tokenizer)
        return convert_pipeline(pipeline, Path(destination), target_dtype, overwrite, allow_non_finite)
    files, loaded = _load_for(destination, overwrite, source, config, target_dtype, allow_non_finite)
    contents, notes = small_files(files, loaded, tokenizer)
    with new_folder(Path(destination), overwrite) as folder:
        write_files(folder, contents)
        write_params(folder, loaded.params)
    return f"{loaded.summary()}; wrote {destination}{notes}"


def export_checkpoint(
    source: AnyModelName,
    destination: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> str:
    """Write a folder with a PyTorch checkpoint; `flax-qformer export`.

    A drawing pipeline becomes a folder for each part.

    Args:
      source: anything that `from_pretrained` takes, or a pipeline's folder or hub id.
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
    if is_pipeline(source):
        if layout == "lavis":
            raise InputError(
                "a pipeline is only exported in upstream's layout; leave `layout` out, or export its qformer folder"
            )
        return export_pipeline(_locate_pipeline_for(destination, overwrite, source), Path(destination), overwrite)
    files, loaded = _load_for(destination, overwrite, source, allow_non_finite=True)
    if layout is None:
        layout = "lavis" if loaded.model_class is Blip2ForPreTraining else "diffusers"
    if layout == "diffusers":
        loaded = completed(replace(loaded, model_class=Blip2QFormerModel), loaded.params["query_tokens"].dtype)
    contents, notes = small_files(files, loaded, None)
    tensors = export(loaded.params, loaded.config, layout)
    with new_folder(Path(destination), overwrite) as folder:
        write_files(folder, contents)
        write_tensors(folder / "model.safetensors", tensors)
    return f"{loaded.summary()}; wrote {destination}{notes}"


def _locate_pipeline_for(
    destination: str | os.PathLike[str],
    overwrite: bool,
    source: AnyModelName,
    tokenizer: str | os.PathLike[str] | None = None,
) -> PipelineFiles:
    """Find a pipeline that is to be written to another folder, with its ControlNet if it has one."""
    check_absent(Path(destination), overwrite)
    check_apart(Path(str(source)), Path(destination))
    has_controlnet = (Path(str(source)) / CONTROLNET.name).is_dir()
    return locate_pipeline(source, has_controlnet or None, tokenizer)


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
