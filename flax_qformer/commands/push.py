"""Upload a model to the hub."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from flax_qformer.commands.options import CommonOptions
from flax_qformer.training.push import push_to_hub


@dataclass(frozen=True, kw_only=True)
class PushOptions(CommonOptions):
    """Upload a model to the hub in one commit, with a model card of the training run's settings and metrics.

    A README.md in the model's folder is uploaded instead of that card. Log in with `hf auth login`, or set HF_TOKEN.

    Attributes:
      model: folder of a model or of a training run.
      repository: repository on the hub, created if it does not exist.
      private: create the repository as a private one.
      license: the license that the card names, such as apache-2.0.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ORG/NAME")]
    private: bool = False
    license: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None


def run(options: PushOptions) -> None:
    print(push_to_hub(options.model, options.repository, private=options.private, license=options.license))
