"""A PyTorch checkpoint to a Flax folder."""

import argparse
from typing import Any

from flax_qformer.checkpoints.loading import DTYPES
from flax_qformer.checkpoints.saving import convert_checkpoint
from flax_qformer.commands.messages import with_options
from flax_qformer.commands.options import (
    add_missing_parts,
    add_overwrite,
)


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="a PyTorch checkpoint to a Flax folder",
        description="Convert a checkpoint to a folder with config.json, tokenizer, image settings and an orbax "
        "checkpoint. PyTorch is not needed. Every tensor is accounted for, or nothing is written.",
    )
    command.set_defaults(run=run)
    command.add_argument(
        "source",
        metavar="SRC",
        help="diffusers pipeline or its qformer folder, LAVIS folder, checkpoint file (.safetensors, .bin, .pt, .pth), "
        "*.index.json of a sharded one, or hub id",
    )
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument("--dtype", help=f"cast the parameters: {', '.join(DTYPES)} (default: as stored)")
    add_missing_parts(command)
    add_overwrite(command)
    command.add_argument("--allow-non-finite", action="store_true", help="accept infinities and NaN")


def run(options: argparse.Namespace) -> None:
    done = convert_checkpoint(
        options.source,
        options.destination,
        dtype=options.dtype,
        config=options.config,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
        allow_non_finite=options.allow_non_finite,
    )
    print(with_options(done, options))
