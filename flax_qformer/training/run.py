"""An open training run: what the loop steps, saves and evaluates."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from flax_qformer.checkpoints.saving import save_pretrained
from flax_qformer.compilation import compiler_options
from flax_qformer.convert.tables.qformer import PARTS
from flax_qformer.data.batches import Batches, open_source
from flax_qformer.data.sources import Source
from flax_qformer.parallel.mesh import check_divides, named_mesh
from flax_qformer.parallel.processes import all_gather, any_process, is_first, wait_for_all
from flax_qformer.parallel.stopping import Stopped, noted_signals
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
    """A training run. All processes of a job call its methods in the same order.

    Attributes:
      settings: of the run.
      signals: those that asked this process to stop.
      state: the `TrainState` after the last step.
      done: steps taken, those of earlier programs included.
    """

    @classmethod
    @contextlib.contextmanager
    def open(cls, settings: TrainSettings) -> Iterator["Run"]:
        """Open all that a run needs, from the start or from its newest checkpoint; the end of the block closes it.

        Raises:
          InputError: a setting, the data, the model or the folder is unfit.
          Stopped: a signal asked to stop before the run began.
        """
        check_reporters(settings.report_to)
        output = Path(settings.output)
        checkpoints = Checkpoints(output / "checkpoints", settings.keep)
        check_output(output, checkpoints, settings)
        mesh = named_mesh(settings.mesh, jax.devices())
        check_divides(settings.batch_size, mesh, "`batch_size`")
        source, held_out = open_source(settings), open_held_out(settings)
        with contextlib.ExitStack() as stack:
            yield cls(settings, checkpoints, mesh, source, held_out, stack)

    def __init__(
        self,
        settings: TrainSettings,
        checkpoints: Checkpoints,
        mesh: Mesh,
        source: Source,
        held_out: Source | None,
        stack: contextlib.ExitStack,
    ) -> None:
        """Load the model, lock the folder, restore the newest checkpoint; see `open`. `stack` closes what is opened."""
        self.settings, self._output, self._checkpoints = settings, Path(settings.output), checkpoints
        self._saved_settings = dataclasses.replace(settings, overwrite=False)
        self.signals = stack.enter_context(noted_signals())
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
        self._log = stack.enter_context(
            MetricsLogger(self._output, self.done, settings.report_to, dataclasses.asdict(self._saved_settings))
        )
        progress = stack.enter_context(Progress(settings.steps, "step", initial=self.done, line_every=math.inf))
        self._step_logger = StepLogger(settings, rates, checkpoints, self._log, progress)

    def _lock_folder(self, stack: contextlib.ExitStack) -> None:
        """Lock the folder in the first process while the others wait, unless a signal asked to stop."""
        if self.must_stop():
            raise self.stopped("stopped before the run began; nothing was changed")
        if is_first():
            stack.enter_context(locked_folder(self._output, self.settings.overwrite))
        wait_for_all("begun")

    def _restore(self, batches: Batches) -> int:
        """Restore state and position in the data from the newest checkpoint; returns the steps taken."""
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
        """Dispatch a step to the devices, read the next batch, and log what is finished.

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
        """Wait for the devices and log the last step."""
        self._step_logger.flush()

    def save(self) -> None:
        """Log the last step, and write its checkpoint unless there is one.

        Raises:
          InputError: a metric is not finite, or the checkpoint cannot be written.
        """
        self.flush()
        notes = {"data": all_gather(self._prefetcher.state), "settings": dataclasses.asdict(self._saved_settings)}
        self._checkpoints.save(self.done, self.state, notes)

    def evaluate(self) -> None:
        """Evaluate on the held-out examples, unless there are none or this step was evaluated before."""
        if not any_process(self._evaluation is None or self._log.is_evaluated(self.done)) and self._evaluation:
            self._evaluation.evaluate(self.state.averaged_params, self._log, self.done)
        self._step_logger.start_clock()

    def must_stop(self) -> bool:
        """Whether a signal asked any process to stop; all processes call it together."""
        return any_process(bool(self.signals))

    def stopped(self, message: str) -> Stopped:
        """The exception that ends a run which a signal stopped, here or in another process."""
        return Stopped(self.signals[0] if self.signals else signal.SIGTERM, message)

    def finish(self) -> str:
        """Save the trained model, after the run is closed; returns a line on what was done."""
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
