"""How well images and captions find each other."""

from typing import Any

from flax_qformer.commands.options import add_quiet
from flax_qformer.training.settings import EvaluateSettings


def add_parser(commands: Any) -> None:
    command = commands.add_parser("evaluate", add_help=False, help="how well images and captions find each other")
    command.set_defaults(run=run, settings=EvaluateSettings)
    add_quiet(command)


def run(settings: EvaluateSettings) -> None:
    from flax_qformer.training.evaluation import evaluate

    for name, value in evaluate(settings).items():
        print(f"{name}: {value:g}")
