"""A Flax folder to what upstream loads."""

import argparse
from typing import Any

from flax_qformer.checkpoints.saving import export_checkpoint
from flax_qformer.commands.messages import with_options
from flax_qformer.commands.options import (
    add_overwrite,
)


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="a Flax folder to what upstream loads",
        description="Write a folder with model.safetensors, which PyTorch loads: the inverse of convert, bit for bit.",
    )
    command.set_defaults(run=run)
    command.add_argument("source", metavar="SRC", help="a Flax folder, or anything that convert takes")
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument(
        "--layout",
        choices=("diffusers", "lavis"),
        help="what loads it: diffusers' Blip2QFormerModel.from_pretrained, or load_state_dict of LAVIS's stage-1 model "
        "(default: lavis for a stage-1 model, else diffusers)",
    )
    add_overwrite(command)


def run(options: argparse.Namespace) -> None:
    done = export_checkpoint(options.source, options.destination, layout=options.layout, overwrite=options.overwrite)
    print(with_options(done, options))
