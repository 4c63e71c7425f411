"""Subject embeddings of images."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_qformer.checkpoints.atomic import check_writable, new_file
from flax_qformer.commands.options import (
    TEXT_MULTIPLE,
    add_model,
    add_quiet,
    add_text,
    batches,
    check_train_packages,
    input_files,
    load_with_processor,
    positive,
)
from flax_qformer.compilation import compiler_options
from flax_qformer.errors import InputError
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.parallel.processes import join_processes
from flax_qformer.processing.processor import pair_up

DATA_OPTIONS = ("image_column", "embedding_dtype", "shard_size", "num_workers", "mesh", "process", "distributed")
"""Those that go with --data alone."""


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "embed",
        help="subject embeddings of images",
        description="Turn images, each with the word for its subject, into subject embeddings: query_embeddings "
        "(images, queries, width) in an .npz file, which also holds the names of the images and the texts; or, with "
        "--data, all images of a source into a folder of Parquet files. The same command resumes after a stop.",
    )
    command.set_defaults(run=run)
    command.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files")
    command.add_argument(
        "--data",
        metavar="SOURCE",
        help="instead of files: whatever train reads (a folder, WebDataset tars, Parquet, a hub id), or any folder of "
        "images; each image gets a row with id, row, embeddings and error",
    )
    add_text(command, nargs="+", action="extend", help="the subject's name: one for all images, or one for each")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="default: embeddings.npz; with --data, the folder embeddings"
    )
    command.add_argument(
        "--batch-size", type=positive, metavar="N", help="images that run together (default: 8, with --data 64)"
    )
    add_model(command)
    add_quiet(command)
    data = command.add_argument_group("with --data")
    data.add_argument("--image-column", metavar="NAME", help="default: found by its type and name")
    data.add_argument("--embedding-dtype", choices=("float16", "float32"), help="what is written (default: float32)")
    data.add_argument("--shard-size", type=positive, metavar="N", help="rows in a Parquet file (default: 1024)")
    data.add_argument("--num-workers", type=int, metavar="N", help="processes that decode (default: 4)")
    data.add_argument("--mesh", metavar="AXES", help="layout of each process's devices (default: data=-1)")
    data.add_argument(
        "--distributed",
        action="store_true",
        default=None,
        help="share the work with the other processes of a job, as in training",
    )
    data.add_argument(
        "--process",
        type=int,
        nargs=2,
        metavar=("I", "N"),
        help="take the share of process I, from 0, of N that run this command (default: as JAX counts them)",
    )


def run(options: argparse.Namespace) -> None:
    if options.data:
        _embed_data(options)
        return
    unfit = [name for name in DATA_OPTIONS if getattr(options, name) is not None]
    if unfit:
        raise InputError(f"--{unfit[0].replace('_', '-')} goes with --data; name the source, or leave it out")
    if not options.images:
        raise InputError("the following arguments are required: IMAGE, or --data SOURCE; see flax-qformer embed --help")
    options.output = options.output or Path("embeddings.npz")
    images, texts = options.images, options.text and pair_up(len(options.images), options.text)
    folder = next((image for image in images if os.path.isdir(image)), None)
    if folder:
        raise InputError(
            f"{folder} is a folder, not an image; embed all its images with --data {folder}, or name files, such as "
            f"{folder / '*.png'}"
        )
    check_writable(options.output, input_files(options, images))
    if options.output.suffix.lower() != ".npz":
        raise InputError(f"{options.output} becomes a NumPy archive; end the name in .npz")
    model, params, processor = load_with_processor(options, Blip2QFormerModel)
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch), compiler_options=compiler_options())
    results = []
    for rows in batches(len(images), options.batch_size or 8):
        batch = processor(
            [images[row] for row in rows],
            texts and [texts[row] for row in rows],
            truncate=options.truncate,
            pad_to_multiple_of=TEXT_MULTIPLE,
        )
        results.append(np.asarray(run(params, batch).query_embeddings, np.float32))
    embeddings = np.concatenate(results)[: len(images)]
    arrays: dict[str, Any] = {"query_embeddings": embeddings, "images": [str(image) for image in images]}
    if texts:
        arrays["texts"] = texts
    with new_file(options.output) as file:
        np.savez(file, **arrays)
    print(f"wrote {options.output}: query_embeddings {embeddings.shape}, {', '.join(list(arrays)[1:])}")


def _embed_data(options: argparse.Namespace) -> None:
    if options.images or len(options.text or ()) > 1:
        what = f"the image {options.images[0]}" if options.images else "all but one --text"
        raise InputError(f"--data names the images, and one --text goes for all; leave out {what}")
    check_train_packages()
    from flax_qformer.commands.bulk_embedding import EmbedSettings, embed_data

    if options.distributed:
        join_processes()
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(EmbedSettings)}
    given |= {"text": options.text and options.text[0], "model": str(options.model)}
    given |= {"output": options.output or Path("embeddings"), "process": options.process and tuple(options.process)}
    settings = EmbedSettings(**{name: value for name, value in given.items() if value is not None})
    print(embed_data(settings))
