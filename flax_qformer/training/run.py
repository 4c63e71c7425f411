"""An open training run, which the loop steps, saves and evaluates."""

import contextlib
import dataclasses
import math
import signal
from pathlib import Path
from typing import Any, Self

import jax

from flax_qformer.checkpoints.saving import save_pretrained
from flax_qformer.compilation import compiler_options
from flax_qformer.convert.tables.qformer import PARTS
from flax_qformer.data.batches import Batches, open_source
from flax_qformer.parallel.mesh import check_divides, named_mesh
from flax_qformer.parallel.processes import all_gather, any_process, is_first, wait_for_all
from flax_qformer.parallel.stopping import Stopped, stop_signals
from flax_qformer.progress import Progress
from flax_qformer.training.held_out import HeldOutEvaluation, open_held_out
from flax_qformer.training.metrics import MetricsLogger, check_reporters
from flax_qformer.training.prefetching import Prefetcher
from flax_qformer.training.run_checkpoints import Checkpoints
from flax_qformer.training.run_folder import check_output, locked_folder, log_resumption, write_settings
from flax_qformer.training.settings import TrainSettings
from flax_qformer.training.setup import initial_state, load_model, make_batches, optimizer_and_rates, trained_paths
from flax_qformer.training.step import make_train_step
from flax_qformer.training.step_logging import DispatchedStep, StepLogger


class Run:
    """A training run. All processes of a job must call its methods in the same order.

    Attributes:
      settings: the run's settings.
      signals: stop signals that this process received.
      state: the `TrainState` after the last step.
      done: steps taken, those of earlier programs included.
    """

    def __init__(self, settings: TrainSettings) -> None:
        """Open a new run, or resume one from its newest checkpoint; use it in a `with` block, which closes it.

        Raises:
          InputError: a setting, the data, the model or the folder is unfit.
          Stopped: a stop signal came before the run began.
        """
        check_reporters(settings.report_to)
        self.settings, self._output = settings, Path(settings.output)
        self._saved_settings = dataclasses.replace(settings, overwrite=False)
        self._checkpoints = Checkpoints(self._output / "checkpoints", settings.keep)
        check_output(self._output, self._checkpoints, settings)
        mesh = named_mesh(settings.mesh, jax.devices())
        check_divides(settings.batch_size, mesh, "`batch_size`")
        source, held_out = open_source(settings), open_held_out(settings)
        with contextlib.ExitStack() as stack:
            self.signals = stack.enter_context(stop_signals())
            self._model, params, self._processor = load_model(settings, mesh)
            batches = make_batches(source, self._processor, settings, mesh)
            optimizer, rates = optimizer_and_rates(settings, self._model.config)
            self._trained = trained_paths(params, settings.train)
            self.state = initial_state(params, self._trained, optimizer, settings, mesh)
            del params  # half-precision originals of trained parameters
            self._train_step = make_train_step(
                self._model,
                optimizer,
                ema_decay=settings.ema_decay,
                accumulation=settings.accumulation,
                mesh=mesh,
                compiler_options=compiler_options(),
            )
            self._evaluation = None
            if held_out is not None:
                self._evaluation = HeldOutEvaluation(self._model, self._processor, held_out, settings, mesh)
            self._lock_folder(stack)
            self.done = self._restore(batches)
            self._prefetcher = Prefetcher(stack.enter_context(batches), mesh)
            saved = dataclasses.asdict(self._saved_settings)
            self._log = stack.enter_context(MetricsLogger(self._output, self.done, settings.report_to, saved))
            progress = stack.enter_context(Progress(settings.steps, "step", initial=self.done, line_every=math.inf))
            self._step_logger = StepLogger(settings, rates, self._checkpoints, self._log, progress)
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._resources.__exit__(*error)

    def _lock_folder(self, stack: contextlib.ExitStack) -> None:
        """Lock the folder in the first process while the others wait; raise `Stopped` after a stop signal."""
        if self.must_stop():
            raise self.stopped("stopped before the run began; nothing was changed")
        if is_first():
            stack.enter_context(locked_folder(self._output, self.settings.overwrite))
        wait_for_all("begun")

    def _restore(self, batches: Batches) -> int:
        """Restore the state and the position in the data from the newest checkpoint; returns the steps taken."""
        self.state, notes = self._checkpoints.restore(self.state) or (self.state, {})
        done = int(self.state.step) // self.settings.accumulation
        if notes:
            batches.set_state(notes["data"][jax.process_index() % len(notes["data"])])
        if is_first():
            log_resumption(done, notes.get("settings", {}), self._saved_settings)
            if done < self.settings.steps:
                write_settings(self._output, self._saved_settings)
        self._checkpoints.tidy(done)
        return done

    def step(self) -> None:
        """Dispatch a step to the devices, prefetch a batch, and log the steps that have finished.

        Raises:
          InputError: a batch cannot be read, or a metric is not finite.
        """
        metrics = []
        for _ in range(self.settings.accumulation):
            self.state, batch_metrics = self._train_step(self.state, self._prefetcher.take())
            metrics.append(batch_metrics)
        self.done += 1
        dispatched = DispatchedStep(self.done, metrics, self._prefetcher.epoch, self._prefetcher.state["skipped"])
        if self.done < self.settings.steps:
            self._prefetcher.prefetch()
        self._step_logger.add(dispatched)

    def flush(self) -> None:
        """Wait for the devices, and log the last step."""
        self._step_logger.flush()

    def save(self) -> None:
        """Log the last step, and write its checkpoint unless it has one.

        Raises:
          InputError: a metric is not finite, or the checkpoint cannot be written.
        """
        self.flush()
        notes = {"data": all_gather(self._prefetcher.state), "settings": dataclasses.asdict(self._saved_settings)}
        self._checkpoints.save(self.done, self.state, notes)

    def evaluate(self) -> None:
        """Evaluate on the held-out examples; skipped if there are none, or if this step was already evaluated."""
        if not any_process(self._evaluation is None or self._log.is_evaluated(self.done)) and self._evaluation:
            self._evaluation.evaluate(self.state.averaged_params, self._log, self.done)
        self._step_logger.start_clock()

    def must_stop(self) -> bool:
        """Whether any process received a stop signal. All processes must call this together."""
        return any_process(bool(self.signals))

    def stopped(self, message: str) -> Stopped:
        """The exception for a run that a signal stopped, in this process or another."""
        return Stopped(self.signals[0] if self.signals else signal.SIGTERM, message)

    def finish(self) -> str:
        """Save the trained model after the run is closed; returns a line that says what was done."""
        # `save_pretrained` itself compares the other new modules with their initial values.
        trained_modules = {path.split("/")[0] for path in self._trained} - PARTS.keys()
        config = self._model.config
        untrained = tuple((name, kind) for name, kind in config.newly_initialised if name not in trained_modules)
        model = self._model.clone(config=dataclasses.replace(config, newly_initialised=untrained))
        save_pretrained(self._output / "model", model, self.state.averaged_params, self._processor, overwrite=True)
        skipped = self._prefetcher.state["skipped"]
        return (
            f"trained {self.done} steps, {skipped} examples skipped; wrote {self._output / 'model'}{self._log.last()}"
        )
