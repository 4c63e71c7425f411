"""The first stage: the model, its three losses, and a step that trains it. The program around it is `train.py`."""

from flax_qformer.pretraining.lora import add_lora, load_lora, merge_lora, save_lora
from flax_qformer.pretraining.losses import similarities
from flax_qformer.pretraining.model import Blip2ForPreTraining, PreTrainingOutput
from flax_qformer.pretraining.optimizer import Rate, Selection, make_optimizer, make_schedule, merge, partition
from flax_qformer.pretraining.step import Loss, TrainState, make_train_step, pretraining_loss

__all__ = [
    "Blip2ForPreTraining",
    "Loss",
    "PreTrainingOutput",
    "Rate",
    "Selection",
    "TrainState",
    "add_lora",
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
