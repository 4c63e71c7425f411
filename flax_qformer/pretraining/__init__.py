"""The first stage: the model, its three losses, and what trains it."""

from flax_qformer.pretraining.model import Blip2ForPreTraining, PreTrainingOutput

__all__ = ["Blip2ForPreTraining", "PreTrainingOutput"]
