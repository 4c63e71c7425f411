"""Options and steps that several commands share."""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_qformer.checkpoints.loading import Model, as_dtype, check_heads, from_pretrained, locate_checkpoint
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.errors import InputError
from flax_qformer.processing.processor import Processor
from flax_qformer.progress import Progress

BATCH_SIZE = 8
"""Images that run together, unless `--batch-size` says otherwise."""

TEXT_MULTIPLE = 16
"""Texts are padded to a multiple of this many tokens, so that most lengths share one compiled program."""

TRAIN_PACKAGES = ("datasets", "grain", "pyarrow", "tensorboardX", "yaml")
"""What pip installs with `flax-qformer[train]`."""


def whole_number(least: int, most: int | None = None) -> tyro.constructors.PrimitiveConstructorSpec[int]:
    """The type of an option that takes a whole number from `least` to `most`."""
    bounds = f"of {least} or more" if most is None else f"from {least} to {most}"

    def parse(texts: list[str]) -> int:
        if not texts[0].isdecimal() or int(texts[0]) < least or (most is not None and int(texts[0]) > most):
            raise ValueError(f"{texts[0]} is not a whole number {bounds}")
        return int(texts[0])

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


Positive = Annotated[int, whole_number(1)]
Images = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")
]
ModelName = Annotated[
    str, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: a small model inside the package)")
]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Tokenizer = Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")]
ImageColumn = Annotated[
    str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: found by its type and name)")
]
ProcessShare = Annotated[
    tuple[int, int] | None, tyro.conf.arg(metavar="I N", help_behavior_hint="(default: as JAX counts them)")
]
Texts = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint=""),
]
"""The texts of each time that the option is used; `texts_of` joins them."""


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options of every command.

    Attributes:
      quiet: show no progress and no information, only warnings and errors.
    """

    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CommonOptions):
    """Options of commands that load a model.

    Attributes:
      model: folder, checkpoint file or hub id, Flax or PyTorch.
      dtype: dtype of the computation: float32, bfloat16 or float16.
      config: config.json, if the checkpoint has none.
      tokenizer: folder or hub id of a tokenizer, if the checkpoint has none.
    """

    model: ModelName = str(DEFAULT_MODEL)
    dtype: Annotated[str, tyro.conf.arg(metavar="DTYPE")] = "float32"
    config: File = None
    tokenizer: Tokenizer = None


def load_with_processor(
    options: ModelOptions, model_class: type[Model], *heads: str
) -> tuple[Model, dict[str, Any], Processor]:
    """Load the model, its parameters and its processor; the named heads must be trained."""
    dtype = as_dtype(options.dtype)
    files = locate_checkpoint(options.model, options.config)
    model, params = from_pretrained(files, dtype, model_class=model_class, config=options.config)
    check_heads(model.config, options.model, *heads)
    return model, params, Processor.from_pretrained(files, config=model.config, tokenizer=options.tokenizer)


def input_files(options: ModelOptions, images: Sequence[Path]) -> list[Path]:
    return [*images, Path(options.model), *([options.config] if options.config else [])]


def check_images(images: Sequence[Path]) -> None:
    if not images:
        raise InputError("no image is named; name one or more image files")


def texts_of(groups: Sequence[Sequence[str]], name: str = "text") -> list[str]:
    """All texts of an option that can be repeated."""
    if () in groups:
        raise InputError(f"`{name}` is empty; put a text after it")
    return [text for group in groups for text in group]


def size_of(text: str) -> tuple[int, int]:
    """Width and height in pixels, from a text such as 512x768."""
    sides = re.fullmatch(r"([1-9]\d{0,4})[xX]([1-9]\d{0,4})", text, re.ASCII)
    if not sides:
        raise InputError(f"`size` is {text:.40}; write the width and the height in pixels, as in 512x768")
    return int(sides[1]), int(sides[2])


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
