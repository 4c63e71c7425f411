"""A Flax folder to a checkpoint that upstream loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flax_qformer.checkpoints.converting import export_checkpoint
from flax_qformer.commands.messages import with_options
from flax_qformer.commands.options import CommonOptions
from flax_qformer.convert.tables.qformer import Layout


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CommonOptions):
    """Write a folder with model.safetensors for PyTorch: the inverse of convert, bit for bit.

    A drawing pipeline becomes a folder for each part.

    Attributes:
      source: a Flax folder, or anything that convert reads.
      destination: the folder to create.
      layout: the names of the tensors: diffusers, for Blip2QFormerModel.from_pretrained, or lavis, for load_state_dict
        of LAVIS's stage-1 model.
      overwrite: replace DST if it exists.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    layout: Annotated[
        Layout | None,
        tyro.conf.arg(
            metavar="{diffusers,lavis}",
            help_behavior_hint="(default: lavis for a stage-1 model, else diffusers)",
        ),
    ] = None
    overwrite: bool = False


def run(options: ExportOptions) -> None:
    done = export_checkpoint(options.source, options.destination, layout=options.layout, overwrite=options.overwrite)
    print(with_options(done, ExportOptions))
