"""Train on captioned images, or resume a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import jax
import tyro

from flax_qformer.commands.options import CommonOptions, File, check_train_packages
from flax_qformer.errors import InputError, first_line
from flax_qformer.parallel.processes import is_first, is_lost_process_error, join_processes
from flax_qformer.training.settings import TrainSettings, read_settings


@dataclass(frozen=True, kw_only=True)
class TrainOptions(CommonOptions):
    """Train a Q-Former on captioned images, or resume the run in the output folder.

    Attributes:
      settings: YAML file with options, as in `batch_size: 64`; options of the command line override it.
    """

    settings: File = None
    training: Annotated[TrainSettings, tyro.conf.arg(name="")]

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        return cls(training=read_settings(path, TrainSettings))


def run(options: TrainOptions) -> None:
    check_train_packages()
    from flax_qformer.training.loop import train

    if options.training.distributed:
        join_processes()
    try:
        summary = train(options.training)
        if is_first():
            print(summary)
    except jax.errors.JaxRuntimeError as error:
        if not is_lost_process_error(error):
            raise
        raise InputError(
            f"another process of the job has ended ({first_line(error)}); start all of them again: the run goes on "
            "from its newest checkpoint"
        ) from None
