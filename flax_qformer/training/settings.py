"""The settings of the training program: one dataclass, for the command line and for a YAML file."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_qformer.data.sources import DataSettings
from flax_qformer.errors import InputError
from flax_qformer.model_files import DEFAULT_MODEL
from flax_qformer.training.metrics import ReportTo
from flax_qformer.training.optimizer import OptimizerName

FIXED = ("model", "train", "optimizer", "group_learning_rates", "ema_decay", "accumulation", "scan_layers", "seed")
"""Settings that a resumed run cannot change: its state's arrays or its data's order depend on them."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(DataSettings):
    """Train a Q-Former on captioned images, or resume the run in the output folder.

    Attributes:
      output: folder of the run: checkpoints, metrics.jsonl, TensorBoard's files, and at the end `model`.
      model: folder, checkpoint file or hub id of the model to start from; if a folder has a config.json and a tokenizer
        but no weights, all parameters are randomly initialised.
      tokenizer: folder or hub id of a tokenizer, if the checkpoint has none.
      overwrite: remove the run in the output folder and start a new one.
      train: parameters to train: vision, qformer, heads, all, or regular expressions of paths such as
        encoder/layer_0/crossattention/attention/query/kernel.
      steps: total number of steps.
      optimizer: adamw, lion, adafactor or sgd.
      learning_rate: peak learning rate, after the warm-up; a cosine schedule lowers it to a tenth.
      group_learning_rates: learning rates of groups or regular expressions, such as vision 1e-5 crossattention 2e-4;
        the first that matches a parameter applies.
      warmup: steps from 0 to the peak learning rate.
      weight_decay: decoupled weight decay; biases, LayerNorms and the temperature have none.
      b1: decay of the first moment of adamw and lion, and momentum of sgd; adafactor has none.
      b2: decay of the second moment of adamw and lion.
      clip_norm: largest norm of the gradient; 0 for no clipping.
      layer_decay: learning rate of a layer, as a multiple of that of the layer above.
      accumulation: batches whose gradients are averaged for one step; ITC contrasts only within a batch.
      ema_decay: decay of the moving average of the parameters, which is then evaluated and saved; 0 for none.
      dropout: dropout rate of the Q-Former; by default that of its config.
      dtype: dtype of the computation: float32 or bfloat16; trained parameters are float32, frozen ones keep the dtype
        of the checkpoint.
      gradient_checkpointing: recompute each layer in the backward pass, which saves memory.
      scan_layers: run the layers in a loop, which compiles faster but runs slower on a CPU; by default on GPUs and TPUs
        only. A pruned model cannot be scanned.
      mesh: how devices share the work, such as data=-1,fsdp=4,tensor=2: data and fsdp split the batch, fsdp and tensor
        the parameters; -1 takes the remaining devices.
      distributed: join the job's other processes, which jax.distributed.initialize finds on Cloud TPU, GKE and Slurm;
        elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      log_every: steps between lines of metrics.
      report_to: where metrics and samples are logged besides metrics.jsonl: tensorboard, wandb (Weights & Biases), or
        both.
      save_every: steps between checkpoints.
      keep: number of newest checkpoints to keep.
      evaluate_every: steps between evaluations on held-out examples; the last step is always evaluated, with 0 only it.
      evaluate_on: largest number of examples of an evaluation.
      rerank: candidates that ITM reranks in an evaluation; 0 for none.
      samples: held-out images whose captions, retrieved images and attention maps each evaluation logs; 0 for none.
    """

    output: str
    model: str = str(DEFAULT_MODEL)
    tokenizer: str | None = None
    overwrite: bool = False
    train: tuple[str, ...] = ("qformer", "heads")
    steps: int = 1000
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    group_learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    warmup: int = 100
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.98
    clip_norm: float = 1.0
    layer_decay: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.0
    dropout: float | None = None
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    scan_layers: bool | None = None
    mesh: str = "data=-1"
    distributed: bool = False
    log_every: int = 10
    report_to: tuple[ReportTo, ...] = ("tensorboard",)
    save_every: int = 500
    keep: int = 2
    evaluate_every: int = 0
    evaluate_on: int = 1000
    rerank: int = 16
    samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least(self, 1, ("steps", "accumulation", "log_every", "save_every", "keep"))
        _check_least(self, 0, ("warmup", "weight_decay", "clip_norm", "evaluate_every", "rerank", "samples"))
        # A single pair has no negatives.
        _check_least(self, 2, ("batch_size", "evaluate_on"))
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"`learning_rate` is {self.learning_rate}; it must be a number above 0")
        for group, rate in self.group_learning_rates.items():
            if not 0 < rate < float("inf"):
                raise InputError(f"`group_learning_rates` has {rate} for {group}; it must be a number above 0")
        if not self.train:
            raise InputError("`train` names nothing; name vision, qformer, heads or all")
        if self.dtype == "float16":
            raise InputError(
                "`dtype` is float16, in which small gradients underflow without loss scaling; train in bfloat16, which "
                "has the range of float32, or in float32"
            )
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"`layer_decay` is {self.layer_decay}; it must be above 0 and at most 1")
        for name in ("b1", "b2", "ema_decay", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"`{name}` is {value}; it must be from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(DataSettings):
    """Measure how well the images and captions of a data set find each other.

    Attributes:
      model: folder, checkpoint file or hub id of a stage-1 model.
      tokenizer: folder or hub id of a tokenizer, if the checkpoint has none.
      everything: evaluate on all examples, not only on those that training with the same settings holds out.
      evaluate_on: largest number of examples; only a text's own image counts as a match, even if others fit as well.
      rerank: candidates of each query that ITM reranks; 0 for none.
      dtype: dtype of the computation: float32, bfloat16 or float16.
    """

    model: str = str(DEFAULT_MODEL)
    tokenizer: str | None = None
    everything: bool = False
    evaluate_on: int = 1000
    rerank: int = 16
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least(self, 2, ("evaluate_on",))
        _check_least(self, 0, ("rerank",))


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file, of `train` or `evaluate`.

    Raises:
      InputError: the file cannot be read, or names an unknown setting.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the name") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a setting a line, as in: batch_size: 64")
    known = {field.name for kind in (TrainSettings, EvaluateSettings) for field in dataclasses.fields(kind)}
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise InputError(
            f"{path} names unknown settings: {', '.join(unknown)}; take those of `TrainSettings` or `EvaluateSettings`"
        )
    return values


def yaml_arguments(path: Path, kind: type[DataSettings]) -> list[str]:
    """A file's settings as options of the command line; settings that only the other command has are left out."""
    own, arguments = {field.name: field for field in dataclasses.fields(kind)}, []
    for name, value in read_yaml(path).items():
        flag = name.replace("_", "-")
        if name not in own:
            continue
        if value is None and own[name].default is not None:
            raise InputError(f"{path} leaves {name} empty; give it a value, or leave the line out")
        if own[name].type is bool and isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | dict):
            parts = value if isinstance(value, list) else [part for pair in value.items() for part in pair]
            arguments += [f"--{flag}", *map(str, parts)]
        else:
            arguments.append(f"--{flag}={value}")
    return arguments


def to_yaml(settings: DataSettings) -> str:
    import yaml

    return yaml.safe_dump(_plain(settings), sort_keys=False)


def _plain(settings: DataSettings) -> dict[str, Any]:
    """Settings as they are read back from YAML, which has lists instead of tuples."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(settings).items()}


def _check_least(settings: DataSettings, least: int, names: tuple[str, ...]) -> None:
    for name in names:
        if not least <= getattr(settings, name) < float("inf"):
            raise InputError(f"`{name}` is {getattr(settings, name)}; it must be {least} or more")


def differences(saved: Mapping[str, Any], current: DataSettings, names: Collection[str] | None = None) -> list[str]:
    """Differences between the saved and the current settings, of all names by default."""
    return [
        f"`{name}` was {saved[name]} and is now {value}"
        for name, value in _plain(current).items()
        if (names is None or name in names) and name in saved and saved[name] != value
    ]


def check_resumable(saved: Mapping[str, Any], current: DataSettings) -> None:
    """Raise InputError if a setting of `FIXED` differs from the saved one."""
    unfit = differences(saved, current, FIXED)
    if unfit:
        raise InputError(
            f"the run cannot go on with other settings: {'; '.join(unfit)}. Set them back, name another `output`, "
            "or start anew with `overwrite=True`"
        )
