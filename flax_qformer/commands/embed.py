"""Subject embeddings of images."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import numpy as np
import tyro

from flax_qformer.checkpoints.atomic import check_writable, new_file
from flax_qformer.commands.options import (
    BATCH_SIZE,
    TEXT_MULTIPLE,
    File,
    ImageColumn,
    Images,
    ModelOptions,
    Positive,
    ProcessShare,
    Texts,
    batches,
    check_train_packages,
    input_files,
    load_with_processor,
    texts_of,
    whole_number,
)
from flax_qformer.compilation import compiler_options
from flax_qformer.data.sources import DataSettings
from flax_qformer.errors import InputError
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.parallel.processes import join_processes
from flax_qformer.processing.processor import pair_up
from flax_qformer.training.settings import TrainSettings, read_settings

FOR_DATA = ("image_column", "embedding_dtype", "shard_size", "num_workers", "mesh", "process", "distributed")
"""Options that need `--data`."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(ModelOptions):
    """Turn images, each with the word for its subject, into subject embeddings.

    The result is an .npz file with query_embeddings (images, queries, width), the names of the images and the texts.
    With --data, all images of a source become a folder of Parquet files, and the same command resumes after a stop.

    Attributes:
      images: image files.
      data: instead of files: all that train reads (a folder, WebDataset tars, Parquet, a hub id), or any folder of
        images; each image becomes a row with id, row, embeddings and error.
      text: the subject's name: one for all images, or one for each; without it the queries read the image alone.
      truncate: cut a text that is longer than the model reads, at its right end.
      output: .npz file; with --data, folder.
      batch_size: images that run together.
      image_column: with --data: the column with the images.
      embedding_dtype: with --data: dtype of the written embeddings.
      shard_size: with --data: rows in a Parquet file.
      num_workers: with --data: processes that decode; 0 decodes in the process itself.
      mesh: with --data: how the devices of each process share the work.
      distributed: with --data: share the work with the other processes of a job, as in training.
      process: with --data: take the share of process I, from 0, of N that run this command.
      settings: YAML file with options, as in `batch_size: 64`; options of the command line override it.
    """

    images: Images = ()
    data: Annotated[str | None, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")] = None
    text: Texts = ()
    truncate: bool = False
    output: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: embeddings.npz; with --data, embeddings)"),
    ] = None
    batch_size: Annotated[
        int | None,
        whole_number(1),
        tyro.conf.arg(help_behavior_hint=f"(default: {BATCH_SIZE}; with --data, {DataSettings.batch_size})"),
    ] = None
    image_column: ImageColumn = DataSettings.image_column
    embedding_dtype: Literal["float16", "float32"] = "float32"
    shard_size: Positive = 1024
    num_workers: Annotated[int, tyro.conf.arg(metavar="N")] = DataSettings.num_workers
    mesh: Annotated[str, tyro.conf.arg(metavar="AXES")] = TrainSettings.mesh
    distributed: bool = False
    process: ProcessShare = None
    settings: File = None

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        return read_settings(path, cls)


def run(options: EmbedOptions) -> None:
    if options.data:
        _embed_data(options)
        return
    unfit = [name for name in FOR_DATA if getattr(options, name) != getattr(EmbedOptions, name)]
    if unfit:
        raise InputError(f"`{unfit[0]}` goes with `data`; name the source, or leave it out")
    if not options.images:
        raise InputError("no image is named; name one or more image files, or all images of a source with `data`")
    output, images = options.output or Path("embeddings.npz"), options.images
    texts = texts_of(options.text)
    if texts:
        texts = pair_up(len(images), texts)
    folder = next((image for image in images if os.path.isdir(image)), None)
    if folder:
        raise InputError(
            f"{folder} is a folder, not an image; embed all its images with --data {folder}, or name files, such as "
            f"{folder / '*.png'}"
        )
    check_writable(output, input_files(options, images))
    if output.suffix.lower() != ".npz":
        raise InputError(f"{output} becomes a NumPy archive; end the name in .npz")
    model, params, processor = load_with_processor(options, Blip2QFormerModel)
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch), compiler_options=compiler_options())
    results = []
    for rows in batches(len(images), options.batch_size or BATCH_SIZE):
        batch = processor(
            [images[row] for row in rows],
            [texts[row] for row in rows] if texts else None,
            truncate=options.truncate,
            pad_to_multiple_of=TEXT_MULTIPLE,
        )
        results.append(np.asarray(run(params, batch).query_embeddings, np.float32))
    embeddings = np.concatenate(results)[: len(images)]
    arrays: dict[str, Any] = {"query_embeddings": embeddings, "images": [str(image) for image in images]}
    if texts:
        arrays["texts"] = texts
    with new_file(output) as file:
        np.savez(file, **arrays)
    print(f"wrote {output}: query_embeddings {embeddings.shape}, {', '.join(list(arrays)[1:])}")


def _embed_data(options: EmbedOptions) -> None:
    texts = texts_of(options.text)
    if options.images or len(texts) > 1:
        what = f"the image {options.images[0]}" if options.images else "all but one `text`"
        raise InputError(f"`data` names the images, and one `text` goes for all; leave out {what}")
    check_train_packages()
    from flax_qformer.commands.bulk_embedding import EmbedSettings, embed_data

    if options.distributed:
        join_processes()
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(EmbedSettings)}
    values |= {
        "text": texts[0] if texts else None,
        "config": str(options.config) if options.config else None,
        "output": options.output or Path("embeddings"),
        "batch_size": options.batch_size or DataSettings.batch_size,
    }
    print(embed_data(EmbedSettings(**values)))
