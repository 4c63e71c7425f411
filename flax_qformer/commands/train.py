"""Train on captioned images, or resume a run."""

from typing import Any

import jax

from flax_qformer.commands.options import add_quiet
from flax_qformer.errors import InputError, first_line
from flax_qformer.parallel.processes import is_first, is_lost_process_error, join_processes
from flax_qformer.training.settings import TrainSettings


def add_parser(commands: Any) -> None:
    command = commands.add_parser("train", add_help=False, help="train on captioned images, or resume a run")
    command.set_defaults(run=run, settings=TrainSettings)
    add_quiet(command)


def run(settings: TrainSettings) -> None:
    from flax_qformer.training.loop import train

    if settings.distributed:
        join_processes()
    try:
        summary = train(settings)
        if is_first():
            print(summary)
    except jax.errors.JaxRuntimeError as error:
        if not is_lost_process_error(error):
            raise
        raise InputError(
            f"another process of the job has ended ({first_line(error)}); start all of them again: the run goes on "
            "from its newest checkpoint"
        ) from None
