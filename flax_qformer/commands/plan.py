"""What a training step, or drawing, needs of a TPU pod."""

import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import tyro

from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.commands.messages import with_options
from flax_qformer.commands.options import CommonOptions, ModelName, Positive, size_of
from flax_qformer.errors import InputError
from flax_qformer.training.settings import TrainSettings

if TYPE_CHECKING:
    from flax_qformer.planning.generation import GenerationPlan
    from flax_qformer.planning.planner import Plan


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CommonOptions):
    """Compile for a TPU pod, without one: memory, FLOPs, traffic and least time of each chip.

    Nothing is run, and no weights are needed.

    Attributes:
      purpose: what to compile: a training step, or the programs that draw pictures with Stable Diffusion 1.5's sizes.
      topology: the pod, such as v5e:16x16.
      batch: images in a step, or pictures that are drawn together, over all chips.
      size: width and height of the pictures.
      steps: denoising steps.
      model: folder, hub id or config.json of the model to train.
      mesh: how the chips share the work, such as data=-1,fsdp=4,tensor=2.
      remat: recompute each layer in the backward pass.
      train: parameters to train: vision, qformer, heads, all, or regular expressions of paths.
      text_length: tokens of a caption.
      dtype: dtype of the computation: float32, bfloat16 or float16.
      json: print JSON.
    """

    purpose: Annotated[Literal["train", "generate"], tyro.conf.arg(name="for")] = "train"
    topology: Annotated[str, tyro.conf.arg(metavar="POD")]
    batch: Positive
    size: Annotated[str, tyro.conf.arg(metavar="WxH")] = "512x512"
    steps: Positive = 50
    model: ModelName = str(DEFAULT_MODEL)
    mesh: Annotated[str, tyro.conf.arg(metavar="SIZES")] = TrainSettings.mesh
    remat: bool = False
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART [PART ...]")] = TrainSettings.train
    text_length: Positive = TrainSettings.max_text_length
    dtype: Annotated[str, tyro.conf.arg(metavar="DTYPE")] = TrainSettings.dtype
    json: bool = False


def run(options: PlanOptions) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("this needs the TPU's compiler as well; run pip install 'flax-qformer[tpu]'")
    # The plan needs no chip, and another program may use those of this machine.
    jax.config.update("jax_platforms", "cpu")
    # Programs of the TPU compiler cannot be read from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    result = _drawing(options) if options.purpose == "generate" else _training(options)
    text = json.dumps(dataclasses.asdict(result) | {"bound": result.bound}) if options.json else str(result)
    print(with_options(text, PlanOptions))


def _training(options: PlanOptions) -> "Plan":
    from flax_qformer.planning.planner import plan

    if not options.train:
        raise InputError("`train` names nothing; name vision, qformer, heads or all")
    return plan(
        options.model,
        options.topology,
        options.batch,
        mesh=options.mesh,
        remat=options.remat,
        train=options.train,
        text_length=options.text_length,
        dtype=options.dtype,
    )


def _drawing(options: PlanOptions) -> "GenerationPlan":
    from flax_qformer.planning.generation import plan_generation

    return plan_generation(
        options.topology,
        options.batch,
        size=size_of(options.size),
        steps=options.steps,
        mesh=options.mesh,
        dtype=options.dtype,
    )
