"""The settings of the training program: one dataclass, for the command line and for a YAML file."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.data.sources import DataSettings
from flax_qformer.errors import InputError
from flax_qformer.training.metrics import ReportTo
from flax_qformer.training.optimizer import B1, B2, CLIP_NORM, WEIGHT_DECAY, OptimizerName

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

FIXED = ("model", "train", "optimizer", "group_learning_rates", "ema_decay", "accumulation", "scan_layers", "seed")
"""Settings that a resumed run cannot change: its state's arrays or its data's order depend on them."""


def _named_rates(texts: list[str]) -> dict[str, float]:
    """Pairs of a name and a learning rate, from the command line."""
    try:
        return {name: float(rate) for name, rate in zip(texts[::2], texts[1::2], strict=True)}
    except ValueError:
        raise ValueError(
            f"'{' '.join(texts)}' is not a list of groups, each followed by its learning rate, such as vision 1e-5 "
            "crossattention 2e-4"
        ) from None


NAMED_RATES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[GROUP RATE ...]",
    instance_from_str=_named_rates,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda rates: [str(part) for pair in rates.items() for part in pair],
)
"""How the command line reads learning rates of groups."""


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
      gradient_checkpointing: recompute each layer in the backward pass, which saves memory; on a CPU, only with
        `scan_layers`.
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
    group_learning_rates: Annotated[dict[str, float], NAMED_RATES] = dataclasses.field(default_factory=dict)
    warmup: int = 100
    weight_decay: float = WEIGHT_DECAY
    b1: float = B1
    b2: float = B2
    clip_norm: float = CLIP_NORM
    layer_decay: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.0
    dropout: float | None = None
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    scan_layers: Annotated[bool | None, tyro.conf.DisallowNone] = None
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

    model: str = TrainSettings.model
    tokenizer: str | None = None
    everything: bool = False
    evaluate_on: int = TrainSettings.evaluate_on
    rerank: int = TrainSettings.rerank
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least(self, 2, ("evaluate_on",))
        _check_least(self, 0, ("rerank",))


def read_yaml(path: Path, known: Collection[str] = ()) -> dict[str, Any]:
    """The settings in a file: those of `train` and `evaluate`, and further known ones.

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
    names = {field.name for kind in (TrainSettings, EvaluateSettings) for field in dataclasses.fields(kind)}
    unknown = [str(name) for name in values if name not in names and name not in known]
    if unknown:
        raise InputError(
            f"{path} names unknown settings: {', '.join(unknown)}; take those of `TrainSettings` or `EvaluateSettings`"
        )
    return values


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Settings from a YAML file; those that only another command has are left out.

    Returns:
      Settings with `tyro.MISSING` for those that have no default and are not in the file.

    Raises:
      InputError: the file cannot be read, or a name or value in it is wrong.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "settings"}
    types = get_type_hints(kind)
    required = (f for f in fields.values() if f.default is dataclasses.MISSING)
    values = {f.name: tyro.MISSING for f in required if f.default_factory is dataclasses.MISSING}
    for name, value in read_yaml(path, fields.keys()).items():
        if name not in fields:
            continue
        try:
            values[name] = _converted(value, types[name])
        except ValueError:
            if value is None:
                raise InputError(f"{path} leaves {name} empty; give it a value, or leave the line out") from None
            wanted = str(types[name]) if get_args(types[name]) else types[name].__name__
            raise InputError(f"{path}: `{name}` is {value!r}; it must be {wanted}") from None
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _converted(value: Any, kind: Any) -> Any:
    """A value of YAML as a setting's type; ValueError if it does not fit."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):  # of a type and None
        return None if value is None else _converted(value, parts[0])
    if origin is tuple and value is not None:
        items = value if isinstance(value, list) else [value]
        kinds = parts[:1] * len(items) if parts[-1] is ... else parts
        return tuple(_converted(item, of) for item, of in zip(items, kinds, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_converted(name, parts[0]): _converted(item, parts[1]) for name, item in value.items()}
    if (origin is Literal and value in parts) or (origin is bool and isinstance(value, bool)):
        return value
    if origin in (str, Path) and value is not None and not isinstance(value, list | dict):
        return kind(value)
    if origin in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        return kind(str(value))  # YAML reads 1e-4 as a text, and 1.5 is no int
    raise ValueError(value)


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
