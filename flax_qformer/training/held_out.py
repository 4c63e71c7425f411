"""Evaluate a run on held-out examples: log recall, and samples if there is a reporter."""

import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_qformer.data.batches import open_source
from flax_qformer.data.sources import Source
from flax_qformer.errors import InputError, first_line
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.parallel.processes import is_first
from flax_qformer.processing.processor import Processor
from flax_qformer.training.evaluation import Retrieval, RetrievalResult, read_examples, warn_of_few_images
from flax_qformer.training.metrics import MetricsLogger
from flax_qformer.training.samples import Sampler
from flax_qformer.training.settings import TrainSettings

logger = logging.getLogger(__name__)


def open_held_out(settings: TrainSettings) -> Source | None:
    """At most `evaluate_on` held-out examples; None, after a warning, if no evaluation is possible."""
    try:
        source = open_source(settings, "held_out").select(slice(settings.evaluate_on))
    except InputError as error:
        logger.warning("no evaluation: %s", error)
        return None
    images = len(np.unique(source.image_ids))
    if images < 2:
        logger.warning("no evaluation: fewer than two images are held out")
        return None
    if is_first():
        warn_of_few_images(images)
    return source


class HeldOutEvaluation:
    """Measures recall on the held-out examples, and draws samples of them if a reporter shows samples."""

    def __init__(
        self, model: Blip2ForPreTraining, processor: Processor, source: Source, settings: TrainSettings, mesh: Mesh
    ) -> None:
        self._processor, self._source, self._settings = processor, source, settings
        self._retrieval = Retrieval(model, settings.batch_size, mesh)
        self._sampler = None
        if settings.samples and settings.report_to:
            self._sampler = Sampler(model, processor, source, settings.samples, settings.max_text_length, mesh)

    def evaluate(self, params: Any, log: MetricsLogger, step: int) -> None:
        """Evaluate parameters and log the result. If no example can be used, log a warning.

        Raises:
          InputError: an example cannot be used in a job of several processes, or metrics cannot be written.
        """
        examples = read_examples(self._source, self._processor, self._settings)
        try:
            result = self._retrieval.search(params, examples, self._settings.rerank)
        except InputError as error:
            if jax.process_count() > 1:  # the other processes wait in a collective
                raise
            logger.warning("no evaluation: %s", error)
            return
        log.write(step, result.figures)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
        logger.info("step %d: %s", step, figures)
        if self._sampler:
            _log_samples(self._sampler, params, result, log, step)


def _log_samples(sampler: Sampler, params: Any, result: RetrievalResult, log: MetricsLogger, step: int) -> None:
    """Log samples of an evaluation; if they cannot be drawn, log a warning and continue."""
    try:
        samples = sampler.draw(params, result)
        if samples:
            log.show(step, samples)
    except (InputError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() > 1:  # the other processes wait in a collective
            raise
        logger.warning("no samples: %s", first_line(error))
