"""What a run trains, from its settings: model, batches, optimizer, trained parameters, state."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flax_qformer.checkpoints.loading import as_dtype, from_pretrained, initialise, locate_checkpoint
from flax_qformer.convert.tables.qformer import PARTS
from flax_qformer.data.batches import Batches
from flax_qformer.data.sources import Source
from flax_qformer.errors import InputError
from flax_qformer.models.config import Blip2Config
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.models.selection import Selection, select
from flax_qformer.models.surgery import stack_layers
from flax_qformer.parallel.mesh import batch_part
from flax_qformer.parallel.partition_rules import shard_params
from flax_qformer.parallel.processes import is_first
from flax_qformer.processing.processor import Processor
from flax_qformer.training.optimizer import Rate, make_optimizer, make_schedule
from flax_qformer.training.settings import TrainSettings
from flax_qformer.training.step import TrainState

logger = logging.getLogger(__name__)


def load_model(settings: TrainSettings, mesh: Mesh) -> tuple[Blip2ForPreTraining, dict[str, Any], Processor]:
    """The model with the settings' dropout, remat and scan, its parameters on the mesh, and its processor."""
    files, dtype = locate_checkpoint(settings.model), as_dtype(settings.dtype)
    if files.config and not files.params and not files.weights:
        logger.warning("%s has no weights: all are randomly initialised", files.name)
        model, params = initialise(files.config, Blip2ForPreTraining, dtype, settings.seed, mesh)
    else:
        model, params = from_pretrained(files, dtype, model_class=Blip2ForPreTraining, mesh=mesh)
    config, rate = model.config, settings.dropout
    if rate is not None:
        qformer = config.qformer_config
        qformer = dataclasses.replace(qformer, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
        config = dataclasses.replace(config, qformer_config=qformer)
    if settings.gradient_checkpointing:
        config = config.recomputed()
    if settings.scan_layers:
        config = config.scanned()
        if config.scan_layers:
            params = stack_layers(params)
        else:
            logger.warning("the layers are not alike, so that they cannot be scanned: compiling takes longer")
    processor = Processor.from_pretrained(files, config=config, tokenizer=settings.tokenizer)
    return model.clone(config=config), params, processor


def make_batches(source: Source, processor: Processor, settings: TrainSettings, mesh: Mesh) -> Batches:
    """This process's part of each batch."""
    index, count = batch_part(mesh)
    return Batches(source, processor, settings, process_index=index, process_count=count)


def optimizer_and_rates(
    settings: TrainSettings, config: Blip2Config
) -> tuple[optax.GradientTransformation, np.ndarray]:
    """The optimizer, and the learning rate of each step without those of groups, (steps,) float32."""
    if settings.warmup >= settings.steps and is_first():
        logger.warning(
            "the warm-up of %d steps outlasts the run: it ends below the learning rate; lower `warmup`",
            settings.warmup,
        )
    schedule = make_schedule(settings.learning_rate, settings.steps, settings.warmup)
    learning_rate: Rate | dict[str, Rate] = schedule
    if settings.group_learning_rates:
        groups: dict[str, Rate] = {
            name: make_schedule(rate, settings.steps, settings.warmup)
            for name, rate in settings.group_learning_rates.items()
        }
        learning_rate = {**groups, "all": groups.get("all", schedule)}
    optimizer = make_optimizer(
        config,
        learning_rate,
        optimizer=settings.optimizer,
        weight_decay=settings.weight_decay,
        b1=settings.b1,
        b2=settings.b2,
        clip_norm=settings.clip_norm,
        layer_decay=settings.layer_decay,
        accumulation=settings.accumulation,
    )
    # Computed before training: later, each rate would wait for the step that runs on the devices.
    return optimizer, np.asarray(schedule(np.arange(settings.steps)))


def trained_paths(params: Mapping[str, Any], train: Selection) -> set[str]:
    """The paths of the trained parameters: the selected ones that the stage-1 losses read.

    Raises:
      InputError: the losses read none of the selected parameters.
    """
    selected = select(params, train)
    unread = {path.split("/")[0] for path in selected} & (PARTS.keys() - set(Blip2ForPreTraining.parts))
    trained = {path for path in selected if path.split("/")[0] not in unread}
    if not trained:
        raise InputError(f"the stage-1 losses do not read {', '.join(unread)}; name something else in `train`")
    if unread:
        logger.info("%s stays frozen: the stage-1 losses do not read it", ", ".join(unread))
    return trained


def initial_state(
    params: Mapping[str, Any],
    trained: set[str],
    optimizer: optax.GradientTransformation,
    settings: TrainSettings,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, on the mesh; trained parameters are float32."""
    flat = flatten_dict(params, sep="/")
    flat |= {path: flat[path].astype(jnp.float32) for path in trained}
    params = unflatten_dict(flat, sep="/")
    state = TrainState.create(params, optimizer, trained.__contains__, ema=settings.ema_decay > 0, seed=settings.seed)
    return shard_params(state, mesh)
