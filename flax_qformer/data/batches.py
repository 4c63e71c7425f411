"""Batches of arrays from captioned images.

Example::

    settings = DataSettings(data="my_images")
    train = open_source(settings)
    with Batches(train, processor, settings) as batches:
        batch = next(batches)

Hugging Face `datasets` keeps the rows in memory-mapped files. grain shuffles the rows, distributes them over processes
and decodes them in workers. An example depends only on the seed, the epoch and the row: not on the number of workers,
nor on whether the run was resumed.
"""

import gc
import logging
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import PIL.Image

from flax_qformer.data.sources import DataSettings, Images, Source, open_images, open_source
from flax_qformer.errors import InputError
from flax_qformer.parallel.stopping import signals_blocked
from flax_qformer.processing.processor import ImageProcessor, Processor, open_image

__all__ = [
    "Batches",
    "DataSettings",
    "Images",
    "Source",
    "evaluation_batches",
    "image_batches",
    "open_images",
    "open_source",
]

logger = logging.getLogger(__name__)

LOGGED_SKIPS = 10
"""Skipped examples that are logged by name; further ones are only counted."""


class Batches:
    """An endless iterator over full batches, shuffled in each epoch; its position can be saved.

    A batch has pixel_values (B, height, width, 3) float32, input_ids and attention_mask (B, T) int32 and image_id (B,)
    int32, where B is this process's share of the batch and T is `max_text_length`. Examples with a broken image or
    without a caption are skipped and counted.

    Close it, or use it in a `with` block, to end its workers. The workers start with the first batch and import the
    main module again, so a script that trains needs `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        settings: DataSettings,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Batches for one of several processes.

        Raises:
          InputError: the batch does not divide among the processes, the texts are too long for the model, or grain is
            not installed.
        """
        if settings.batch_size % process_count:
            nearest = max(1, round(settings.batch_size / process_count)) * process_count
            raise InputError(
                f"a batch of {settings.batch_size} does not divide among {process_count} processes; {nearest} does"
            )
        self._grain = _grain()
        self._source = source
        self._tokenize = partial(processor, max_length=settings.max_text_length)
        longest = processor.config.qformer_config.max_position_embeddings
        if settings.max_text_length > longest:
            raise InputError(
                f"`max_text_length` is {settings.max_text_length}; the model reads at most {longest} tokens"
            )
        self._settings = settings
        self._share = (process_index, process_count)
        self._size = settings.batch_size // process_count
        self._prepare = partial(
            _prepare, image_processor=processor.image_processor, crop_scale=settings.crop_scale, flip=settings.flip
        )
        self._running: list[Any] = []
        # For iterators that nobody closes: grain's own clean-up runs too late at the end of the program.
        weakref.finalize(self, _close, self._running)
        self._position = self._skipped = 0

    @property
    def skipped(self) -> int:
        """Number of examples skipped so far; an example counts in each epoch."""
        return self._skipped

    @property
    def epoch(self) -> float:
        """Passes over the source so far."""
        return self._position * self._share[1] / len(self._source)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch. A call that fails or is interrupted does not change the position.

        Raises:
          InputError: a worker died, or a whole epoch of examples in a row cannot be used.
        """
        examples: list[dict[str, Any]] = []
        read, skipped, failed_in_a_row = 0, self._skipped, 0
        if not self._running:
            self._running.append(self._open())
        try:
            while len(examples) < self._size:
                element = _next_element(self._running[0])
                read += 1
                if "error" not in element:
                    examples.append(element)
                    failed_in_a_row = 0
                    continue
                skipped, failed_in_a_row = skipped + 1, failed_in_a_row + 1
                if skipped <= LOGGED_SKIPS:
                    logger.warning("skipped: %s", element["error"])
                if failed_in_a_row >= len(self._source):
                    raise InputError(f"no example of {self._source.name} can be used; the last: {element['error']}")
            batch = _collate(examples, self._tokenize)
        except BaseException:
            self.close()
            raise
        self._position, self._skipped = self._position + read, skipped
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, as `json` can write it. It differs between processes, since each skips its own examples."""
        return {"position": self._position, "skipped": self._skipped, **self._must_match()}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Resume from a state, with any number of workers.

        Raises:
          InputError: the data, the seed or the number of processes differs.
        """
        descriptions = {"rows": "the number of examples (`data`, `held_out`)", "seed": "`seed`"}
        for name, value in self._must_match().items():
            if state[name] != value:
                raise InputError(
                    f"{descriptions.get(name, name)} was {state[name]} and is now {value}; set it back to resume, or "
                    "start anew"
                )
        self.close()
        self._position, self._skipped = state["position"], state["skipped"]

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        _close(self._running)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _must_match(self) -> dict[str, int]:
        index, count = self._share
        return {"rows": len(self._source), "seed": self._settings.seed, "process_index": index, "process_count": count}

    def _open(self) -> Any:
        index, count = self._share
        # All processes share one endless order; each takes every count-th element. Grain's own state depends on the
        # number of workers; a number of elements does not.
        elements = (
            self._grain.MapDataset.source(self._source)
            .seed(self._settings.seed)
            .random_map(self._prepare)
            .shuffle()
            .repeat()[index + self._position * count :: count]
        )
        return _run(self._grain, elements, self._settings.num_workers, self._size)


def evaluation_batches(
    source: Source, processor: Processor, settings: DataSettings
) -> Generator[tuple[dict[str, np.ndarray], list[str]]]:
    """Each example once, in order and without augmentation.

    The first of several captions is used. Examples that cannot be used are skipped and logged.

    Yields:
      A batch as in `Batches`, always of `batch_size` rows, and the captions of its n <= batch_size examples. The last
      batch is padded with copies of its last example; only its first n rows count.

    Raises:
      InputError: a worker died, or no example can be used.
    """
    grain = _grain()
    prepare = partial(_prepare, image_processor=processor.image_processor)
    dataset = grain.MapDataset.source(source).map(prepare)
    running = [_run(grain, dataset, settings.num_workers, settings.batch_size)]
    tokenize = partial(processor, max_length=settings.max_text_length)
    examples: list[dict[str, Any]] = []
    used = skipped = 0
    try:
        for _ in range(len(source)):
            element = _next_element(running[0])
            if "error" in element:
                skipped += 1
                if skipped <= LOGGED_SKIPS:
                    logger.warning("skipped: %s", element["error"])
                continue
            used += 1
            examples.append(element)
            if len(examples) == settings.batch_size:
                yield _collate(examples, tokenize), [example["caption"] for example in examples]
                examples = []
        if used == 0:
            raise InputError(f"no example of {source.name} can be used; the last: {element['error']}")
        if examples:
            padded = examples + examples[-1:] * (settings.batch_size - len(examples))
            yield _collate(padded, tokenize), [example["caption"] for example in examples]
    finally:
        _close(running)
    if skipped:
        logger.warning("%d of %d examples of %s were skipped", skipped, len(source), source.name)


def image_batches(
    images: Images, image_processor: ImageProcessor, batches: Sequence[range], size: int, num_workers: int
) -> Generator[dict[str, Any]]:
    """The images of these rows, batch by batch; workers decode a batch or two ahead.

    Yields:
      `id` and `error` of each of n <= size rows; `error` is None, or says why there is no image. pixel_values (size,
      height, width, 3) float32, with zeros for rows without an image.

    Raises:
      InputError: a worker died, or grain is not installed.
    """
    grain = _grain()
    # Each worker sends its part of a batch in one piece: single images would slow the reading process.
    step = math.ceil(size / max(num_workers, 1))
    pieces = [[rows[i : i + step] for i in range(0, len(rows), step)] for rows in batches]
    decode = partial(_decode, images=images, image_processor=image_processor)
    elements = grain.MapDataset.source([rows for batch_pieces in pieces for rows in batch_pieces]).map(decode)
    running = [_run(grain, elements, num_workers, 1)]
    try:
        for batch_pieces in pieces:
            # A copy outside shared memory: JAX may still read the array when the program ends.
            pixels = np.zeros((size, image_processor.height, image_processor.width, 3), np.float32)
            batch: dict[str, Any] = {"pixel_values": pixels, "id": [], "error": []}
            for rows in batch_pieces:
                element = _next_element(running[0])
                pixels[len(batch["id"]) :][: len(rows)] = element.pop("pixel_values")
                for name, values in element.items():
                    batch[name] += values
            yield batch
    finally:
        _close(running)


def _grain() -> ModuleType:
    try:
        import grain
        from absl import flags
    except ImportError:
        raise InputError("loading data needs grain; run pip install 'flax-qformer[train]'") from None
    # Grain up to 0.2.18 reads this flag of its profiler before flags are parsed (google/grain issue 1355).
    if "grain_enable_multiprocess_worker_profiling" in flags.FLAGS:
        flags.FLAGS["grain_enable_multiprocess_worker_profiling"].present = True
    return grain


def _run(grain: ModuleType, elements: Any, num_workers: int, batch_size: int) -> Any:
    """Grain's iterator over a MapDataset. With workers, it decodes about one batch ahead."""
    # A worker takes seconds to start, which a single batch does not repay.
    num_workers = min(num_workers, max(len(elements) - 1, 0) // batch_size)
    if num_workers:
        # If the resource tracker started with the first worker, it would unblock the signals that workers block.
        multiprocessing.resource_tracker.ensure_running()
    # Without these options, each worker decodes 500 elements ahead, in 16 threads.
    elements = elements.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=math.ceil(batch_size / max(num_workers, 1))
    )
    return iter(elements.mp_prefetch(options, worker_init_fn=_start_worker))


def _close(running: list[Any]) -> None:
    while running:
        running.pop().close()
    # Grain's iterators are reference cycles that hold elements in shared memory, which must be freed.
    gc.collect()


def _start_worker(index: int, count: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach all processes. The parent may need data until it has saved, so it ends its
    # workers itself. If the parent is killed, the workers must end too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _next_element(elements: Any) -> dict[str, Any]:
    try:
        with signals_blocked():  # the first call starts the workers
            return next(elements)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].partition(".")[0]
        raise InputError(
            f"a process that loads data died (exit code {code}), probably because memory or space in /dev/shm ran out; "
            "lower `num_workers` or `batch_size`"
        ) from None


def _prepare(
    row: Mapping[str, Any],
    rng: np.random.Generator | None = None,
    *,
    image_processor: ImageProcessor,
    crop_scale: tuple[float, float] = (1, 1),
    flip: bool = False,
) -> dict[str, Any]:
    """Turn a row into pixel_values, caption and image_id, or into an error; without `rng` nothing is random."""
    captions = [row["caption"]] if isinstance(row["caption"], str) else row["caption"] or []
    captions = [caption.strip() for caption in captions if caption and caption.strip()]
    if not captions:
        return {"error": f"{row['name']} has no caption"}
    caption = captions[rng.integers(len(captions)) if rng else 0]
    try:
        image = open_row(row["image"], row["name"])
        if rng and crop_scale != (1, 1):
            image = _random_crop(image, rng, crop_scale)
        pixels = image_processor(image)
    except Exception as error:
        # On broken files Pillow's decoders raise exceptions of any type.
        return {"error": str(error) or repr(error)}
    if rng and flip and rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    return {"pixel_values": pixels, "caption": caption, "image_id": row["image_id"]}


def _decode(rows: range, *, images: Images, image_processor: ImageProcessor) -> dict[str, Any]:
    pixels = np.zeros((len(rows), image_processor.height, image_processor.width, 3), np.float32)
    ids, errors = [], []
    for place, row in enumerate(map(images.__getitem__, rows)):
        error = None
        try:
            pixels[place] = image_processor(open_row(row["image"], row["name"]))
        except Exception as caught:
            # On broken files Pillow's decoders raise exceptions of any type.
            error = str(caught) or repr(caught)
        ids.append(row["id"])
        errors.append(error)
    return {"pixel_values": pixels, "id": ids, "error": errors}


def open_row(image: Any, name: str) -> PIL.Image.Image:
    """Open the image of a row of a `Source` or of `Images`; `name` is the row's name in errors."""
    if isinstance(image, Mapping):
        image = image["bytes"] or image.get("path")
    if not image:
        raise InputError(f"{name} has no image")
    return open_image(image, name) if isinstance(image, bytes) else open_image(Path(image))


def _random_crop(image: PIL.Image.Image, rng: np.random.Generator, scale: tuple[float, float]) -> PIL.Image.Image:
    """A random crop with an aspect ratio from 3:4 to 4:3, as torchvision's RandomResizedCrop; a narrow image stays."""
    for _ in range(10):
        area = image.width * image.height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
            return image.crop((left, top, left + width, top + height))
    return image


def _collate(examples: Sequence[Mapping[str, Any]], tokenize: Any) -> dict[str, np.ndarray]:
    return {
        "pixel_values": np.stack([example["pixel_values"] for example in examples]),
        **tokenize(text=[example["caption"] for example in examples]),
        "image_id": np.array([example["image_id"] for example in examples], np.int32),
    }
