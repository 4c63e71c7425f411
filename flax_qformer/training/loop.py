"""The training loop."""

import dataclasses

import jax

from flax_qformer.compilation import is_on_cpu, kept_memory
from flax_qformer.parallel.processes import any_process_async
from flax_qformer.training.run import Run
from flax_qformer.training.settings import TrainSettings


def train(settings: TrainSettings) -> str:
    """Train with these settings, from the start or from the newest checkpoint in the output folder.

    Returns:
      A line that says what was done.

    Raises:
      InputError: a setting, the data or the model is unfit, a metric is not finite, or a file cannot be written.
      Stopped: SIGTERM or SIGINT stopped the run; it is saved if it had begun.
    """
    if settings.scan_layers is None:
        settings = dataclasses.replace(settings, scan_layers=not is_on_cpu())
    with Run(settings) as run, kept_memory():
        stop_requested = False
        while run.done < settings.steps and not stop_requested:
            if run.done and settings.evaluate_every and run.done % settings.evaluate_every == 0:
                run.flush()
                if run.must_stop():
                    break
                run.evaluate()
            # The processes exchange the flag before the step, so that none waits for the step to learn it.
            signal_received = any_process_async(bool(run.signals))
            run.step()
            if run.done % settings.save_every == 0 or run.done == settings.steps:
                run.save()
            stop_requested = bool(signal_received) or (jax.process_count() == 1 and bool(run.signals))
        run.flush()
        if run.must_stop():
            run.save()
            again = "the same command without `overwrite=True`" if settings.overwrite else "the same command"
            raise run.stopped(f"stopped after step {run.done}, which is saved; {again} resumes it")
        run.evaluate()
    return run.finish()
