"""How well images and captions find each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import tyro

from flax_qformer.commands.options import CommonOptions, File, check_train_packages
from flax_qformer.training.settings import EvaluateSettings, read_settings


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(CommonOptions):
    """Measure how well the images and captions of a data set find each other.

    Attributes:
      settings: YAML file with options, as in `batch_size: 64`; options of the command line override it.
    """

    settings: File = None
    evaluation: Annotated[EvaluateSettings, tyro.conf.arg(name="")]

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        return cls(evaluation=read_settings(path, EvaluateSettings))


def run(options: EvaluateOptions) -> None:
    check_train_packages()
    from flax_qformer.training.evaluation import evaluate

    for name, value in evaluate(options.evaluation).items():
        print(f"{name}: {value:g}")
