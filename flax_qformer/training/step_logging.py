"""Log the metrics of finished steps, one step behind the devices."""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import numpy as np

from flax_qformer.compilation import is_on_cpu
from flax_qformer.errors import InputError
from flax_qformer.progress import Progress
from flax_qformer.training.metrics import MetricsLogger
from flax_qformer.training.run_checkpoints import Checkpoints
from flax_qformer.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """A step that was dispatched to the devices.

    Attributes:
      number: number of the step, from 1.
      metrics: metrics of each of its batches, scalars on the devices.
      epoch: passes over the data up to the end of the step.
      skipped: examples skipped up to the end of the step.
    """

    number: int
    metrics: list[dict[str, jax.Array]]
    epoch: float
    skipped: int


class StepLogger:
    """Logs finished steps.

    Each step is logged after the next one is dispatched, so that the devices stay busy while the program waits. On CPU
    each step is logged at once: two steps in flight would hold their temporaries at the same time.
    """

    def __init__(
        self,
        settings: TrainSettings,
        rates: np.ndarray,
        checkpoints: Checkpoints,
        log: MetricsLogger,
        progress: Progress,
    ) -> None:
        """Start the clock.

        Args:
          settings: the run's settings.
          rates: (steps,) learning rate of each step.
          checkpoints: the run's checkpoints; an error names the newest.
          log: writes the metrics.
          progress: advances with each logged step.
        """
        self._settings, self._rates, self._checkpoints = settings, rates, checkpoints
        self._log, self._progress = log, progress
        self._pending: DispatchedStep | None = None
        self.start_clock()

    @property
    def is_delayed(self) -> bool:
        return not is_on_cpu()

    def start_clock(self) -> None:
        """Start to measure the time of steps."""
        self._started, self._timed = time.perf_counter(), 0

    def add(self, step: DispatchedStep) -> None:
        """Log the previous step; log this one now, or with the next call."""
        self.flush()
        self._pending = step
        if not self.is_delayed:
            self.flush()

    def flush(self) -> None:
        """Wait for the devices and log the last dispatched step.

        Raises:
          InputError: a metric is not finite, or cannot be written.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        metrics = jax.device_get(step.metrics)
        figures = {name: float(np.mean([batch[name] for batch in metrics])) for name in metrics[0]}
        self._check_finite(step.number, figures)
        self._timed += 1
        settings, text = self._settings, ""
        if step.number % settings.log_every == 0 or step.number == settings.steps:
            now = time.perf_counter()
            step_time = (now - self._started) / self._timed
            figures |= {
                "learning_rate": float(self._rates[step.number - 1]),
                "images_per_second": settings.batch_size * settings.accumulation / step_time,
                "step_time": step_time,
                "epoch": step.epoch,
                "skipped": step.skipped,
            }
            self._log.write(step.number, figures)
            text = _summary(figures)
            self._started, self._timed = now, 0
        self._progress.advance(text=text)

    def _check_finite(self, number: int, figures: Mapping[str, float]) -> None:
        diverged = [name for name, value in figures.items() if not math.isfinite(value)]
        if diverged:
            saved = self._checkpoints.steps()
            good = f"the last good checkpoint is of step {saved[0]}" if saved else "no checkpoint was saved yet"
            clipping = "lower `clip_norm`" if self._settings.clip_norm else "set `clip_norm`"
            raise InputError(
                f"{diverged[0]} is not finite at step {number}; {good}; lower `learning_rate` or {clipping}"
            )


def _summary(figures: Mapping[str, float]) -> str:
    """Losses, learning rate and speed in one line."""
    names = {"loss": "loss", "loss_itc": "itc", "loss_itm": "itm", "loss_itg": "itg"}
    parts = [f"{short} {figures[name]:.3f}" for name, short in names.items()]
    return f"{' '.join(parts)} lr {figures['learning_rate']:.1e} {figures['images_per_second']:.0f} images/s"
