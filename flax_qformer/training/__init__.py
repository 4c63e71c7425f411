"""Stage-1 training: the model, its three losses, and a training step. The training program is `training.loop`."""

from flax_qformer.checkpoints.lora_files import load_lora, save_lora
from flax_qformer.models.lora import add_lora, merge_lora
from flax_qformer.models.losses import similarities
from flax_qformer.models.pretraining import Blip2ForPreTraining, PreTrainingOutput
from flax_qformer.models.selection import Selection, merge, partition
from flax_qformer.training.denoising import denoising_loss
from flax_qformer.training.optimizer import Rate, make_optimizer, make_schedule
from flax_qformer.training.step import Loss, TrainState, make_train_step, pretraining_loss

__all__ = [
    "Blip2ForPreTraining",
    "Loss",
    "PreTrainingOutput",
    "Rate",
    "Selection",
    "TrainState",
    "add_lora",
    "denoising_loss",
    "load_lora",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "merge",
    "merge_lora",
    "partition",
    "pretraining_loss",
    "save_lora",
    "similarities",
]
