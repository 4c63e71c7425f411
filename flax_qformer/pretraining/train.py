"""The training program: data, steps, checkpoints, metrics, evaluation."""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from flax_qformer.checkpoint import as_dtype, from_pretrained, initialise, save_pretrained
from flax_qformer.errors import InputError
from flax_qformer.pretraining.checkpoints import Checkpoints
from flax_qformer.pretraining.data import Batches, evaluation_batches, open_source
from flax_qformer.pretraining.model import Blip2ForPreTraining
from flax_qformer.pretraining.optimizer import make_optimizer, make_schedule
from flax_qformer.pretraining.retrieval import Retrieval
from flax_qformer.pretraining.settings import EvaluateSettings, TrainSettings, check_resumable, read_yaml, to_yaml
from flax_qformer.pretraining.sources import DataSettings, Source
from flax_qformer.pretraining.step import LOSSES, TrainState, make_train_step
from flax_qformer.processor import Processor
from flax_qformer.source import locate

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to end; it was saved.

    Attributes:
      signal: its number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


def train(settings: TrainSettings) -> str:
    """Train as the settings say, from the start or from the newest checkpoint in the folder.

    Returns:
      A line on what was done.

    Raises:
      InputError: a setting, the data or the model is unfit, the loss is not finite, or there is no space.
      Stopped: SIGTERM or SIGINT came; the run was saved.
    """
    output = Path(settings.output)
    checkpoints = _begin(output, settings)
    model, params, processor = _load(settings)
    data = _open_data(settings)
    held_out = _open_held_out(settings)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    if settings.batch_size % mesh.size:
        nearest = max(1, round(settings.batch_size / mesh.size)) * mesh.size
        raise InputError(
            f"a batch of {settings.batch_size} does not divide among {mesh.size} devices; --batch-size {nearest} does"
        )
    schedule = make_schedule(settings.learning_rate, settings.steps, settings.warmup)
    optimizer = make_optimizer(
        model.config,
        schedule,
        weight_decay=settings.weight_decay,
        b1=settings.b1,
        b2=settings.b2,
        clip_norm=settings.clip_norm,
        layer_decay=settings.layer_decay,
        accumulation=settings.accumulation,
    )
    state = TrainState.create(params, optimizer, settings.train, ema=settings.ema_decay > 0, seed=settings.seed)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("data"))
    step = make_train_step(model, optimizer, ema_decay=settings.ema_decay)
    retrieval = Retrieval(model, settings.batch_size)

    restored = checkpoints.restore(state)
    state, notes = restored or (state, None)
    done = int(state.step) // settings.accumulation
    checkpoints.remove_after(done)
    with Batches(data, processor, settings) as batches, _signals() as came, Log(output, done) as log:
        if notes:
            batches.set_state(notes["data"])

        def save() -> None:
            checkpoints.save(done, state, {"data": batches.get_state(), "settings": dataclasses.asdict(settings)})

        def evaluate() -> None:
            if held_out is not None:
                examples = _examples(held_out, processor, settings, settings.evaluate_on)
                log.write(done, retrieval.evaluate(state.averaged_params, examples, settings.rerank))

        progress = tqdm(total=settings.steps, initial=done, unit="step", dynamic_ncols=True)
        started, examples_since = time.perf_counter(), 0
        with progress:
            while done < settings.steps:
                for _ in range(settings.accumulation):
                    state, metrics = step(state, jax.make_array_from_process_local_data(split, next(batches)))
                losses = {name: float(metrics[name]) for name in metrics}
                if not all(math.isfinite(losses[name]) for name in LOSSES):
                    saved = checkpoints.steps()
                    kept = f"the last good checkpoint is of step {saved[0]}" if saved else "no checkpoint was saved yet"
                    raise InputError(
                        f"the loss is not finite at step {done + 1}; {kept}; lower --learning-rate or clip with "
                        "--clip-norm"
                    )
                done += 1
                examples_since += settings.batch_size * settings.accumulation
                progress.update()
                if done % settings.log_every == 0 or done == settings.steps:
                    now = time.perf_counter()
                    figures = {
                        **losses,
                        "learning_rate": float(schedule(done - 1)),
                        "images_per_second": examples_since / (now - started),
                        "step_time": (now - started) / (examples_since / settings.batch_size / settings.accumulation),
                        "epoch": batches.epoch,
                        "skipped": batches.skipped,
                    }
                    log.write(done, figures)
                    progress.set_postfix_str(_short(figures))
                    started, examples_since = now, 0
                if came or done % settings.save_every == 0 or done == settings.steps:
                    save()
                if came:
                    raise Stopped(
                        came[0], f"stopped after step {done}, which is saved; the same command goes on from there"
                    )
                if settings.evaluate_every and done % settings.evaluate_every == 0 and done < settings.steps:
                    evaluate()
                    started, examples_since = time.perf_counter(), 0
        evaluate()
    save_pretrained(output / "model", model, state.averaged_params, processor, overwrite=True)
    return f"trained {settings.steps} steps, {batches.skipped} examples skipped; wrote {output / 'model'}{log.last()}"


def evaluate(settings: EvaluateSettings) -> dict[str, float]:
    """Recall of images and texts; see `Retrieval.evaluate`.

    Raises:
      InputError: a setting, the data or the model is unfit.
    """
    model, params = from_pretrained(settings.model, as_dtype(settings.dtype), model_class=Blip2ForPreTraining)
    processor = Processor.from_pretrained(settings.model, config=model.config, tokenizer=settings.tokenizer)
    source = open_source(settings, "all" if settings.everything else "held_out")
    examples = _examples(source, processor, settings, settings.evaluate_on)
    return Retrieval(model, settings.batch_size).evaluate(params, examples, settings.rerank)


class Log:
    """Figures of a run: `metrics.jsonl`, a line for each time, and TensorBoard's files."""

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after a step: what comes after it will be written again."""
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._last: dict[str, float] = {}
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
            partial.rename(self._path)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._last = figures
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def last(self) -> str:
        return "".join(f"\n  {name}: {value:g}" for name, value in self._last.items())


def _begin(output: Path, settings: TrainSettings) -> Checkpoints:
    """Make the run's folder, or look whether the run in it can go on."""
    checkpoints, file = Checkpoints(output / "checkpoints", settings.keep), output / "settings.yaml"
    try:
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} is not a folder; name another --output")
        if output.is_dir() and any(output.iterdir()) and not file.is_file():
            raise InputError(f"{output} holds something else than a run; name another --output")
        if settings.overwrite:
            shutil.rmtree(output, ignore_errors=True)
        elif file.is_file() and checkpoints.steps():
            check_resumable((checkpoints.notes() or {}).get("settings") or read_yaml(file), settings)
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(settings))
    except OSError as error:
        raise InputError(f"cannot write {output} ({error.strerror}); free space, or name another --output") from None
    return checkpoints


def _load(settings: TrainSettings) -> tuple[Blip2ForPreTraining, dict[str, Any], Processor]:
    source, dtype = locate(settings.model), as_dtype(settings.dtype)
    if source.config and not source.params and not source.weights:
        logger.warning("%s has no weights: all are drawn afresh", source.name)
        model, params = initialise(source.config, Blip2ForPreTraining, dtype, settings.seed)
    else:
        model, params = from_pretrained(settings.model, dtype, jnp.float32, model_class=Blip2ForPreTraining)
    config = model.config
    qformer, vision = config.qformer_config, config.vision_config
    if settings.dropout is not None:
        rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), settings.dropout)
        qformer = dataclasses.replace(qformer, **rates)
    if settings.gradient_checkpointing:
        qformer = dataclasses.replace(qformer, gradient_checkpointing=True)
        vision = dataclasses.replace(vision, gradient_checkpointing=True)
    config = dataclasses.replace(config, qformer_config=qformer, vision_config=vision)
    processor = Processor.from_pretrained(settings.model, config=config, tokenizer=settings.tokenizer)
    return model.clone(config=config), params, processor


def _open_data(settings: TrainSettings) -> Source:
    source = open_source(settings)
    if len(source) == 0:
        raise InputError(f"{settings.data} leaves nothing to train on; lower --held-out")
    return source


def _open_held_out(settings: TrainSettings) -> Source | None:
    source = open_source(settings, "held_out")
    if len(np.unique(source.image_ids)) < 2:
        logger.warning("no evaluation: fewer than two images are held out")
        return None
    return source


def _examples(
    source: Source, processor: Processor, settings: DataSettings, limit: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    source = dataclasses.replace(source, chosen=source.chosen[:limit], image_ids=source.image_ids[:limit])
    for batch, captions in evaluation_batches(source, processor, settings):
        yield batch, len(captions)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked to stop, instead of their stopping the program at once; a second one does."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield came
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _short(figures: dict[str, float]) -> str:
    names = {"loss": "loss", "loss_itc": "itc", "loss_itm": "itm", "loss_itg": "itg"}
    parts = [f"{short} {figures[name]:.3f}" for name, short in names.items()]
    return f"{' '.join(parts)} lr {figures['learning_rate']:.1e} {figures['images_per_second']:.0f} images/s"
