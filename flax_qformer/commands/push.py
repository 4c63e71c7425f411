"""Upload a model to the hub."""

import argparse
from typing import Any

from flax_qformer.training.push import push_to_hub


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "push",
        help="upload a model to the hub",
        description="Upload a model to the hub in one commit, with a model card of the training run's settings and "
        "metrics. A README.md in the model's folder is uploaded instead of that card. Log in with `hf auth login`, or "
        "set HF_TOKEN.",
    )
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="folder of a model or of a training run")
    command.add_argument("repository", metavar="ORG/NAME", help="created if it does not exist")
    command.add_argument("--private", action="store_true", help="create the repository as a private one")
    command.add_argument("--license", metavar="NAME", help="the license that the card names, such as apache-2.0")


def run(options: argparse.Namespace) -> None:
    print(push_to_hub(options.model, options.repository, private=options.private, license=options.license))
