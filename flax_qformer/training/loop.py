"""The training program: data, steps, checkpoints, metrics, evaluation."""

import contextlib
import dataclasses
import fcntl
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flax_qformer.checkpoints.atomic import new_file, writing
from flax_qformer.checkpoints.loading import as_dtype, check_heads, from_pretrained, initialise
from flax_qformer.checkpoints.model_files import locate
from flax_qformer.checkpoints.saving import save_pretrained
from flax_qformer.compilation import compiler_options, give_back, is_on_cpu, keep_memory
from flax_qformer.convert.tables.qformer import PARTS
from flax_qformer.data.batches import Batches, evaluation_batches, open_source
from flax_qformer.data.sources import DataSettings, Source
from flax_qformer.errors import InputError, first_line
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.models.selection import Selection, select
from flax_qformer.models.surgery import stack_layers
from flax_qformer.parallel.mesh import batch_part, check_divides, named_mesh, shard_batch, shard_params
from flax_qformer.parallel.processes import any_process, ask_all, is_first, of_all, wait_for_all
from flax_qformer.parallel.stopping import Stopped, noted_signals
from flax_qformer.processing.processor import Processor
from flax_qformer.progress import Progress
from flax_qformer.training.evaluation import Found, Retrieval, warn_of_few_images
from flax_qformer.training.metrics import FOLDERS, METRICS, MetricsLogger, check_reporters
from flax_qformer.training.optimizer import make_optimizer, make_schedule
from flax_qformer.training.run_checkpoints import Checkpoints
from flax_qformer.training.samples import Sampler
from flax_qformer.training.settings import EvaluateSettings, TrainSettings, changed, check_resumable, to_yaml
from flax_qformer.training.step import TrainState, make_train_step

logger = logging.getLogger(__name__)

SETTINGS = "settings.yaml"


def train(settings: TrainSettings) -> str:
    """Train as the settings say, from the start or from the newest checkpoint in the folder.

    Returns:
      A line on what was done.

    Raises:
      InputError: a setting, the data or the model is unfit, the loss is not finite, or there is no space.
      Stopped: SIGTERM or SIGINT came; the run was saved, if it had begun.
    """
    if settings.scan_layers is None:
        settings = dataclasses.replace(settings, scan_layers=not is_on_cpu())
    check_reporters(settings.report_to)
    output = Path(settings.output)
    checkpoints = Checkpoints(output / "checkpoints", settings.keep)
    _check_output(output, checkpoints, settings)
    mesh = named_mesh(settings.mesh, jax.devices())
    check_divides(settings.batch_size, mesh, "`batch_size`")
    data = open_source(settings)
    held_out = _open_held_out(settings)
    with contextlib.ExitStack() as run:
        came = run.enter_context(noted_signals())
        model, params, processor = _load(settings, mesh)
        index, count = batch_part(mesh)
        batches = Batches(data, processor, settings, process_index=index, process_count=count)
        if settings.warmup >= settings.steps and is_first():
            logger.warning(
                "the warm-up of %d steps outlasts the run: it ends below the learning rate; lower `warmup`",
                settings.warmup,
            )
        schedule = make_schedule(settings.learning_rate, settings.steps, settings.warmup)
        # All at once: on the devices, a rate would wait for the step that they do.
        rates = np.asarray(schedule(np.arange(settings.steps)))
        schedules: dict[str, Any] = {
            name: make_schedule(rate, settings.steps, settings.warmup)
            for name, rate in settings.group_learning_rates.items()
        }
        optimizer = make_optimizer(
            model.config,
            {**schedules, "all": schedules.get("all", schedule)} if schedules else schedule,
            optimizer=settings.optimizer,
            weight_decay=settings.weight_decay,
            b1=settings.b1,
            b2=settings.b2,
            clip_norm=settings.clip_norm,
            layer_decay=settings.layer_decay,
            accumulation=settings.accumulation,
        )
        trained = _trained(params, settings.train)
        flat = flatten_dict(params, sep="/")
        flat |= {path: flat[path].astype(jnp.float32) for path in trained}
        params = unflatten_dict(flat, sep="/")
        state = TrainState.create(
            params, optimizer, trained.__contains__, ema=settings.ema_decay > 0, seed=settings.seed
        )
        state = shard_params(state, mesh)
        step = make_train_step(
            model,
            optimizer,
            ema_decay=settings.ema_decay,
            accumulation=settings.accumulation,
            mesh=mesh,
            compiler_options=compiler_options(),
        )
        retrieval = Retrieval(model, settings.batch_size, mesh)
        sampler = None
        if held_out is not None and settings.samples and settings.report_to:
            sampler = Sampler(model, processor, held_out, settings.samples, settings.max_text_length, mesh)

        if any_process(bool(came)):
            raise Stopped(_first(came), "stopped before the run began; nothing was changed")
        if is_first():
            run.enter_context(_begun(output, settings.overwrite))
        wait_for_all("begun")
        state, notes = checkpoints.restore(state) or (state, {})
        done = int(state.step) // settings.accumulation
        if notes:
            batches.set_state(notes["data"][jax.process_index() % len(notes["data"])])
        kept = dataclasses.replace(settings, overwrite=False)
        if is_first():
            _tell(done, notes.get("settings", {}), kept)
            if done < settings.steps:
                with new_file(output / SETTINGS) as file:
                    file.write(to_yaml(kept).encode())
        checkpoints.tidy(done)
        feed = Feed(run.enter_context(batches), mesh)
        log = run.enter_context(MetricsLogger(output, done, settings.report_to, dataclasses.asdict(kept)))

        def save() -> None:
            data = of_all(feed.state)
            checkpoints.save(done, state, {"data": data, "settings": dataclasses.asdict(kept)})
            give_back()

        def evaluate() -> None:
            """Unless it was done before the run stopped here."""
            if any_process(held_out is None or log.is_evaluated(done)):
                return
            assert held_out is not None
            examples = _examples(held_out, processor, settings)
            try:
                found = retrieval.search(state.averaged_params, examples, settings.rerank)
            except InputError as error:
                if jax.process_count() > 1:  # the others are in the midst of it
                    raise
                logger.warning("no evaluation: %s", error)
                return
            log.write(done, found.figures)
            figures = ", ".join(f"{name} {value:.4g}" for name, value in found.figures.items())
            logger.info("step %d: %s", done, figures)
            if sampler:
                _show_samples(sampler, state.averaged_params, found, log, done)
            give_back()

        with Progress(settings.steps, "step", initial=done, line_every=math.inf) as progress:
            reports = Reports(settings, rates, checkpoints, log, progress)
            is_asked = False
            while done < settings.steps and not is_asked:
                if done and settings.evaluate_every and done % settings.evaluate_every == 0:
                    reports.catch_up()
                    if any_process(bool(came)):
                        break
                    evaluate()
                    reports.start_clock()
                # Before the step, so that nobody waits for this one to learn the answer.
                asked = ask_all(bool(came))
                parts = []
                for _ in range(settings.accumulation):
                    state, metrics = step(state, feed.take())
                    parts.append(metrics)
                done += 1
                given = Step(done, parts, feed.epoch, feed.state["skipped"])
                if done < settings.steps:
                    feed.read_ahead()
                reports.add(given)
                keep_memory()  # once a step has run, and not before
                if done % settings.save_every == 0 or done == settings.steps:
                    reports.catch_up()
                    save()
                is_asked = bool(asked) or (jax.process_count() == 1 and bool(came))
            reports.catch_up()
            if any_process(bool(came)):
                save()
                again = "the same command without `overwrite=True`" if settings.overwrite else "the same command"
                raise Stopped(_first(came), f"stopped after step {done}, which is saved; {again} goes on from there")
            evaluate()
    # Modules that belong to one class alone are compared with their initial values when they are saved.
    trained_modules = {path.split("/")[0] for path in trained} - PARTS.keys()
    new = [(name, kind) for name, kind in model.config.newly_initialised if name not in trained_modules]
    model = model.clone(config=dataclasses.replace(model.config, newly_initialised=tuple(new)))
    save_pretrained(output / "model", model, state.averaged_params, processor, overwrite=True)
    return f"trained {done} steps, {feed.state['skipped']} examples skipped; wrote {output / 'model'}{log.last()}"


def evaluate(settings: EvaluateSettings) -> dict[str, float]:
    """Recall of images and texts; see `Retrieval.evaluate`.

    Raises:
      InputError: a setting, the data or the model is unfit.
    """
    model, params = from_pretrained(settings.model, as_dtype(settings.dtype), model_class=Blip2ForPreTraining)
    heads = ("vision_proj", "text_proj", "itm_head") if settings.rerank else ("vision_proj", "text_proj")
    check_heads(model.config, settings.model, *heads)
    processor = Processor.from_pretrained(settings.model, config=model.config, tokenizer=settings.tokenizer)
    source = open_source(settings, "all" if settings.everything else "held_out").select(slice(settings.evaluate_on))
    examples = _examples(source, processor, settings)
    figures = Retrieval(model, settings.batch_size).evaluate(params, examples, settings.rerank)
    warn_of_few_images(int(figures["images"]))
    return figures


class Feed:
    """Batches on the devices; at a step's end, the next step's first is read ahead while the devices work.

    Attributes:
      state: the position in the data after the last batch taken.
      epoch: passes over the data up to there.
    """

    def __init__(self, batches: Batches, mesh: Mesh) -> None:
        self._batches, self._mesh = batches, mesh
        self._ahead: dict[str, jax.Array] | InputError | None = None
        self._note()

    def take(self) -> dict[str, jax.Array]:
        batch, self._ahead = self._read() if self._ahead is None else self._ahead, None
        if isinstance(batch, InputError):
            raise batch
        self._note()
        return batch

    def read_ahead(self) -> None:
        """What fails is told when its turn comes: the step before is still to be saved."""
        try:
            self._ahead = self._read()
        except InputError as error:
            self._ahead = error

    def _read(self) -> dict[str, jax.Array]:
        return shard_batch(next(self._batches), self._mesh)

    def _note(self) -> None:
        self.state, self.epoch = self._batches.get_state(), self._batches.epoch


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that the devices were given.

    Attributes:
      number: of the step, from 1.
      parts: the metrics of each of its batches.
      epoch, skipped: passes over the data, and examples left out, up to there.
    """

    number: int
    parts: list[dict[str, jax.Array]]
    epoch: float
    skipped: int


class Reports:
    """What steps come to.

    It is told one step late: while the program waits for a step, the devices have the next one to work on. On a CPU,
    where both would have their temporaries at once, it is told in time.
    """

    def __init__(
        self,
        settings: TrainSettings,
        rates: np.ndarray,
        checkpoints: Checkpoints,
        log: MetricsLogger,
        progress: Progress,
    ) -> None:
        self._settings, self._rates, self._checkpoints = settings, rates, checkpoints
        self._log, self._progress = log, progress
        self._given: Step | None = None
        self.start_clock()

    @property
    def is_late(self) -> bool:
        return not is_on_cpu()

    def start_clock(self) -> None:
        """Count the time of a step from now on."""
        self._started, self._timed = time.perf_counter(), 0

    def add(self, step: Step) -> None:
        """Take a step to tell of, after the one before it."""
        self.catch_up()
        self._given = step
        if not self.is_late:
            self.catch_up()

    def catch_up(self) -> None:
        """Wait for the devices, and tell of the last step that they were given.

        Raises:
          InputError: a figure is not finite.
        """
        step, self._given = self._given, None
        if step is None:
            return
        parts = jax.device_get(step.parts)
        figures = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
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
            text = _short(figures)
            self._started, self._timed = now, 0
        self._progress.advance(text=text)

    def _check_finite(self, number: int, figures: Mapping[str, float]) -> None:
        unfit = [name for name, value in figures.items() if not math.isfinite(value)]
        if unfit:
            saved = self._checkpoints.steps()
            good = f"the last good checkpoint is of step {saved[0]}" if saved else "no checkpoint was saved yet"
            clipping = "lower `clip_norm`" if self._settings.clip_norm else "set `clip_norm`"
            raise InputError(f"{unfit[0]} is not finite at step {number}; {good}; lower `learning_rate` or {clipping}")


def _first(came: Sequence[int]) -> int:
    """The signal that asked to stop, here or in another process."""
    return came[0] if came else signal.SIGTERM


def _check_output(output: Path, checkpoints: Checkpoints, settings: TrainSettings) -> None:
    """Whether the run's folder can be made, or the run in it can go on."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder; name another `output`")
    with writing(output, "another `output`"):
        visible = [path for path in output.iterdir() if path.name[0] != "."] if output.is_dir() else []
        if visible and not (output / SETTINGS).is_file():
            raise InputError(f"{output} holds something else than a run; name another `output`")
        if not settings.overwrite:
            check_resumable(checkpoints.notes().get("settings", {}), settings)
            return
        for name, source in (("`model`", settings.model), ("`data`", settings.data)):
            if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
                raise InputError(
                    f"{name} {source} lies in the run that `overwrite=True` removes; name another `output`"
                )


def _tell(done: int, before: Mapping[str, Any], settings: TrainSettings) -> None:
    """Say where a run goes on, and with what other settings."""
    if done >= settings.steps:
        logger.warning("the run has %d steps already; to take more, raise `steps` above that", done)
    elif before:
        others = changed(before, settings)
        told = "; ".join([f"the run goes on after step {done}", *others])
        logger.log(logging.WARNING if others else logging.INFO, "%s", told)


@contextlib.contextmanager
def _begun(output: Path, overwrite: bool) -> Iterator[None]:
    """Make the run's folder, or empty it of another run; within the block it is this program's alone."""
    with writing(output, "another `output`"):
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another program trains in {output}; wait for its end, or name another `output`"
            ) from None
        except OSError:
            logger.warning("%s is on a disk without locks: let no two programs train in it", output)
        if overwrite:
            for name in ("checkpoints", *FOLDERS, "model"):
                shutil.rmtree(output / name, ignore_errors=True)
            (output / METRICS).unlink(missing_ok=True)
        yield


def _load(settings: TrainSettings, mesh: Mesh) -> tuple[Blip2ForPreTraining, dict[str, Any], Processor]:
    source, dtype = locate(settings.model), as_dtype(settings.dtype)
    if source.config and not source.params and not source.weights:
        logger.warning("%s has no weights: all are randomly initialised", source.name)
        model, params = initialise(source.config, Blip2ForPreTraining, dtype, settings.seed, mesh)
    else:
        model, params = from_pretrained(settings.model, dtype, model_class=Blip2ForPreTraining, mesh=mesh)
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
    processor = Processor.from_pretrained(settings.model, config=config, tokenizer=settings.tokenizer)
    return model.clone(config=config), params, processor


def _trained(params: Mapping[str, Any], train: Selection) -> set[str]:
    """The paths of the trained parameters: the selected ones that the losses read."""
    selected = select(params, train)
    unread = {path.split("/")[0] for path in selected} & (PARTS.keys() - set(Blip2ForPreTraining.parts))
    trained = {path for path in selected if path.split("/")[0] not in unread}
    if not trained:
        raise InputError(f"the stage-1 losses do not read {', '.join(unread)}; name something else in `train`")
    if unread:
        logger.info("%s stays frozen: the stage-1 losses do not read it", ", ".join(unread))
    return trained


def _show_samples(sampler: Sampler, params: Any, found: Found, log: MetricsLogger, step: int) -> None:
    """Log samples of an evaluation; a run goes on without them where they cannot be drawn."""
    try:
        samples = sampler.draw(params, found)
        if samples:
            log.show(step, samples)
    except (InputError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() > 1:  # the others wait for this one
            raise
        logger.warning("no samples: %s", first_line(error))


def _open_held_out(settings: TrainSettings) -> Source | None:
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


def _examples(
    source: Source, processor: Processor, settings: DataSettings
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    with Progress(len(source), "example", "evaluating") as progress:
        for batch, captions in evaluation_batches(source, processor, settings):
            yield batch, len(captions)
            progress.advance(len(captions))


def _short(figures: dict[str, float]) -> str:
    names = {"loss": "loss", "loss_itc": "itc", "loss_itm": "itm", "loss_itg": "itg"}
    parts = [f"{short} {figures[name]:.3f}" for name, short in names.items()]
    return f"{' '.join(parts)} lr {figures['learning_rate']:.1e} {figures['images_per_second']:.0f} images/s"
