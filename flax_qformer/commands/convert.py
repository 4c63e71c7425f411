"""A PyTorch checkpoint to a Flax folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flax_qformer.checkpoints.converting import convert_checkpoint
from flax_qformer.commands.messages import with_options
from flax_qformer.commands.options import CommonOptions, File, Tokenizer


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(CommonOptions):
    """Convert a checkpoint to a folder with config.json, tokenizer, image settings and an orbax checkpoint.

    PyTorch is not needed. Every tensor is accounted for, or nothing is written. A drawing
    pipeline becomes a folder for each part.

    Attributes:
      source: diffusers pipeline or its qformer folder, LAVIS folder, checkpoint file (.safetensors, .bin, .pt, .pth),
        *.index.json of a sharded one, or hub id.
      destination: the folder to create.
      dtype: cast the parameters to float32, bfloat16 or float16.
      config: config.json, if the checkpoint has none.
      tokenizer: folder or hub id of a tokenizer, if the checkpoint has none.
      overwrite: replace DST if it exists.
      allow_non_finite: accept infinities and NaN.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    dtype: Annotated[str | None, tyro.conf.arg(metavar="DTYPE", help_behavior_hint="(default: as stored)")] = None
    config: File = None
    tokenizer: Tokenizer = None
    overwrite: bool = False
    allow_non_finite: bool = False


def run(options: ConvertOptions) -> None:
    done = convert_checkpoint(
        options.source,
        options.destination,
        dtype=options.dtype,
        config=options.config,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
        allow_non_finite=options.allow_non_finite,
    )
    print(with_options(done, ConvertOptions))
