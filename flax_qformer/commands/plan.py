"""What a training step needs of a TPU pod."""

import argparse
import dataclasses
import importlib.util
import json
from typing import Any

import jax

from flax_qformer.checkpoints.loading import DTYPES
from flax_qformer.commands.messages import with_options
from flax_qformer.commands.options import (
    positive,
)
from flax_qformer.errors import InputError
from flax_qformer.model_files import DEFAULT_MODEL


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="what a training step needs of a TPU pod",
        description="Compile the training step for a TPU pod, without one: memory, FLOPs and traffic of a chip, and "
        "the time that they allow. Nothing is run, and no weights are needed.",
    )
    command.set_defaults(run=run)
    command.add_argument("--topology", required=True, metavar="POD", help="such as v5e:16x16")
    command.add_argument("--batch", type=positive, required=True, metavar="N", help="images in a step, over all chips")
    command.add_argument("--model", default=DEFAULT_MODEL, help="folder, hub id or config.json (default: a small one)")
    command.add_argument(
        "--mesh", default="data=-1", metavar="SIZES", help="how to split over the chips (default: %(default)s)"
    )
    command.add_argument("--remat", action="store_true", help="recompute each layer in the backward pass")
    command.add_argument(
        "--train",
        nargs="+",
        metavar="PART",
        default=("qformer", "heads"),
        help="what is trained: vision, qformer, heads, all, or regular expressions of paths (default: qformer heads)",
    )
    command.add_argument(
        "--text-length", type=positive, default=32, metavar="N", help="tokens of a caption (default: %(default)s)"
    )
    command.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)} (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("this needs the TPU's compiler as well; run pip install 'flax-qformer[tpu]'")
    from flax_qformer.planning.planner import plan

    # The plan needs no chip, and another program may use those of this machine.
    jax.config.update("jax_platforms", "cpu")
    # Programs of the TPU compiler cannot be read from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    told = plan(
        options.model,
        options.topology,
        options.batch,
        mesh=options.mesh,
        remat=options.remat,
        train=tuple(options.train),
        text_length=options.text_length,
        dtype=options.dtype,
    )
    text = json.dumps(dataclasses.asdict(told) | {"bound": told.bound}) if options.json else str(told)
    print(with_options(text, options))
