"""Options and steps that several commands share."""

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_qformer.checkpoints.loading import DTYPES, Model, as_dtype, check_heads, from_pretrained, locate_checkpoint
from flax_qformer.errors import InputError
from flax_qformer.model_files import DEFAULT_MODEL
from flax_qformer.processing.processor import Processor
from flax_qformer.progress import Progress

TEXT_MULTIPLE = 16
"""Texts are padded to a multiple of this many tokens, so that most lengths share one compiled program."""

TRAIN_PACKAGES = ("datasets", "grain", "pyarrow", "tensorboardX", "tyro", "yaml")
"""What pip installs with `flax-qformer[train]`."""


def add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quiet", action="store_true", help="show no progress and no information, only warnings and errors"
    )


def add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    command.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="images that run together (default: %(default)s)"
    )


def add_text(command: argparse.ArgumentParser, **details: Any) -> None:
    details["help"] += " (default: none, the queries read the image alone)"
    command.add_argument("--text", metavar="TEXT", **details)
    command.add_argument(
        "--truncate", action="store_true", help="cut a text that is longer than the model reads, at its right end"
    )


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="folder, checkpoint file or hub id, Flax or PyTorch (default: a small one inside the package)",
    )
    command.add_argument(
        "--dtype", default="float32", help=f"what to compute in: {', '.join(DTYPES)} (default: %(default)s)"
    )
    add_missing_parts(command)


def add_missing_parts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="config.json, if the checkpoint has none")
    command.add_argument("--tokenizer", metavar="DIR", help="folder or hub id, if the checkpoint has none")


def add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def load_with_processor(
    options: argparse.Namespace, model_class: type[Model], *heads: str
) -> tuple[Model, dict[str, Any], Processor]:
    """Load the model, its parameters and its processor; the named heads must be trained."""
    dtype = as_dtype(options.dtype)
    files = locate_checkpoint(options.model, options.config)
    model, params = from_pretrained(files, dtype, model_class=model_class, config=options.config)
    check_heads(model.config, options.model, *heads)
    return model, params, Processor.from_pretrained(files, config=model.config, tokenizer=options.tokenizer)


def input_files(options: argparse.Namespace, images: list[Path]) -> list[Path]:
    return [*images, *(Path(name) for name in (options.model, options.config) if name)]


def batches(total: int, size: int) -> Iterator[list[int]]:
    """Indices of the images in each batch, with progress.

    The last batch repeats its last image, so that all batches share one compiled program.
    """
    size = min(size, total)
    with Progress(total, "image") as progress:
        for start in range(0, total, size):
            yield [min(row, total - 1) for row in range(start, start + size)]
            progress.advance(min(size, total - start))


def check_train_packages() -> None:
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"this needs {', '.join(missing)} as well; run pip install 'flax-qformer[train]'")
