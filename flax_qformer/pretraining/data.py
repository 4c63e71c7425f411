"""Captioned images, from wherever they lie to batches of arrays.

settings = DataSettings(data="my_images")
train = open_source(settings)
with Batches(train, processor, settings) as batches:
    batch = next(batches)

Hugging Face `datasets` keeps the rows in memory-mapped files, and grain shuffles them, deals them out to processes and has
them decoded by workers. What an element becomes depends on the seed, the epoch and the row alone: neither the number of
workers nor a stop in between changes it.
"""

import json
import logging
import math
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np
import PIL.Image

from ..errors import InputError
from ..processor import ImageProcessor, Processor, open_image

logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentences", "description", "prompt")
IMAGE_COLUMNS = ("image", "jpg", "png", "img", "picture")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "test")

LOGGED_SKIPS = 10
"""So many examples are named when they are skipped; the rest are only counted."""


@dataclass(frozen=True)
class DataSettings:
    """What to read, and how examples are made of it.

    Attributes:
      data: a folder with `metadata.jsonl` or `metadata.csv`, a folder of WebDataset tars or of Parquet files, one such
        file, or a hub id.
      caption_column: the column with the captions; by default found by its name.
      image_column: the column with the images; by default found by its type and name.
      held_out: what is kept from training if the data has no `validation` or `test` split: a fraction of the images if
        below 1, else their number.
      batch_size: examples in a batch, of all processes together.
      max_text_length: tokens to which captions are padded and cut.
      crop_scale: least and largest part of the image's area that a random crop keeps; 1 1 switches it off.
      flip: mirror every other image, which makes captions with "left" and "right" wrong.
      num_workers: processes that decode; 0 decodes in the process itself.
      seed: of the shuffle, the augmentation and the choice of what is held out.
    """

    data: str
    caption_column: str | None = None
    image_column: str | None = None
    held_out: float = 0.05
    batch_size: int = 64
    max_text_length: int = 32
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = False
    num_workers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        for fits, wanted in (
            (self.held_out >= 0, f"held_out is {self.held_out}; it must not be below 0"),
            (self.batch_size > 0, f"batch_size is {self.batch_size}; it must be above 0"),
            (self.max_text_length > 1, f"max_text_length is {self.max_text_length}; it must be above 1"),
            (0 < low <= high <= 1, f"crop_scale is {low} {high}; it must be two numbers from 0 to 1, the lesser first"),
            (self.num_workers >= 0, f"num_workers is {self.num_workers}; it must not be below 0"),
            (0 <= self.seed < 2**32, f"seed is {self.seed}; it must be from 0 to {2**32 - 1}"),
        ):
            if not fits:
                raise InputError(wanted)


@dataclass(frozen=True)
class Source:
    """Rows with images and captions, read when they are asked for.

    Attributes:
      name: what the caller called it.
      rows: a `datasets.Dataset`; images are not decoded.
      image_column, caption_column: of the rows.
      chosen: (N,) the numbers of the rows that belong to it.
      image_ids: (N,) int32, the same for rows that show the same image.
    """

    name: str
    rows: Any
    image_column: str
    caption_column: str
    chosen: np.ndarray
    image_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.chosen[index])
        row = self.rows[number]
        return {
            "name": f"row {number} of {self.name}",
            "image": row[self.image_column],
            "caption": row[self.caption_column],
            "image_id": self.image_ids[index],
        }


def open_source(settings: DataSettings, split: Literal["train", "held_out", "all"] = "train") -> Source:
    """Open data for random access; the first time, `datasets` writes its index into its cache.

    Rows share an `image_id` if the data's column of that name says so, else if they name the same image file, else
    never. All rows of an image are on the same side of the split.

    Args:
      settings: `data`, the columns, `held_out` and `seed` matter.
      split: rows to train on, those held out, or both together.

    Raises:
      InputError: there is no such data, it cannot be read, it has no images or captions, or nothing is in the split.
    """
    splits = _load(settings)
    held_out = next((splits[name] for name in HELD_OUT_SPLITS if name in splits), None)
    if len(splits) > 1 and "train" not in splits:
        raise InputError(f"{settings.data} has the splits {', '.join(splits)}; name the one to train on train")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    if split == "all":
        rows = _datasets().concatenate_datasets(list(splits.values()))
    elif split == "held_out" and held_out is not None:
        rows = held_out
    else:
        rows = train

    image_column = _image_column(rows.features, settings)
    caption_column = _caption_column(rows.features, settings)
    image_ids = _image_ids(rows, image_column)
    chosen = np.arange(len(rows))
    # A lone split is what there is to train on, whatever its name.
    if split != "all" and (held_out is None or held_out is train):
        chosen = np.flatnonzero(_is_held_out(image_ids, settings) == (split == "held_out"))
    if len(chosen) == 0:
        raise InputError(f"{settings.data} leaves no example for {split.replace('_', ' ')}; change --held-out")
    rows = rows.select_columns([image_column, caption_column])
    return Source(settings.data, rows, image_column, caption_column, chosen, image_ids[chosen])


class Batches:
    """Full batches without end, each epoch in another order; an iterator with a position that can be kept.

    A batch has pixel_values (B, height, width, 3) float32, input_ids and attention_mask (B, T) int32 and image_id (B,)
    int32, where B is this process's share of the batch and T is `max_text_length`. What has a broken image or no
    caption is skipped and counted.

    Close it, or use it in a `with` block, to end its workers. They start with the first batch, by importing the main
    module anew: a script that trains needs `if __name__ == "__main__":`.
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
          InputError: the batch does not divide among the processes, the model reads no such length of text, or grain
            is not installed.
        """
        if settings.batch_size % process_count:
            nearest = max(1, round(settings.batch_size / process_count)) * process_count
            raise InputError(
                f"a batch of {settings.batch_size} does not divide among {process_count} processes; {nearest} does"
            )
        self._grain = _grain()
        self._source = source
        self._tokenize = partial(processor, max_length=settings.max_text_length)
        # An impossible length shall show now.
        self._tokenize(text="")
        self._settings = settings
        self._share = (process_index, process_count)
        self._size = settings.batch_size // process_count
        self._prepare = partial(
            _prepare, image_processor=processor.image_processor, crop_scale=settings.crop_scale, flip=settings.flip
        )
        self._elements: Any = None
        self._position = self._skipped = self._fruitless = 0

    @property
    def skipped(self) -> int:
        """Examples that were skipped so far, each time they came."""
        return self._skipped

    @property
    def epoch(self) -> float:
        """Passes over the source so far."""
        return self._position * self._share[1] / len(self._source)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch. A call that fails or is interrupted leaves the position where it was.

        Raises:
          InputError: a worker died, or as many examples as the source has came in a row without a good one.
        """
        examples: list[dict[str, Any]] = []
        read, skipped, fruitless = 0, self._skipped, self._fruitless
        if self._elements is None:
            self._elements = self._open()
        try:
            while len(examples) < self._size:
                element = _next_element(self._elements)
                read += 1
                if "error" not in element:
                    examples.append(element)
                    fruitless = 0
                    continue
                skipped, fruitless = skipped + 1, fruitless + 1
                if skipped <= LOGGED_SKIPS:
                    logger.warning("skipped: %s", element["error"])
                if fruitless >= len(self._source):
                    raise InputError(f"no example of {self._source.name} can be used; the last: {element['error']}")
            batch = _collate(examples, self._tokenize)
        except BaseException:
            self.close()
            raise
        self._position, self._skipped, self._fruitless = self._position + read, skipped, fruitless
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, for `json`. Each process has its own, as each skips on its own."""
        return {
            "position": self._position,
            "skipped": self._skipped,
            "fruitless": self._fruitless,
            **self._must_match(),
        }

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on as the iterator would have from which the state is, with any number of workers.

        Raises:
          InputError: the data, the seed or the number of processes is another.
        """
        for name, value in self._must_match().items():
            if state[name] != value:
                raise InputError(f"{name} was {state[name]} and is now {value}; set it back to go on, or start anew")
        self.close()
        self._position, self._skipped = state["position"], state["skipped"]
        self._fruitless = state["fruitless"]

    def close(self) -> None:
        """End the workers; the next batch would start new ones."""
        elements, self._elements = self._elements, None
        if elements is not None:
            elements.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_elements", None) is not None:
            self.close()

    def _must_match(self) -> dict[str, int]:
        index, count = self._share
        return {"rows": len(self._source), "seed": self._settings.seed, "process_index": index, "process_count": count}

    def _open(self) -> Any:
        index, count = self._share
        # The one endless order of all processes, of which each takes every count-th element. Grain's own state would
        # be bound to the number of workers; a plain number of elements is not.
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
) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """Every example once and in order, without augmentation; the pixels are the processor's.

    Of a list of captions the first is taken. What cannot be used is left out and logged.

    Yields:
      A batch as of `Batches`, always of `batch_size`, and the captions of its n <= batch_size examples. The last batch
      is filled up with its last example; only its first n rows count.

    Raises:
      InputError: a worker died, or no example can be used.
    """
    grain = _grain()
    prepare = partial(_prepare, image_processor=processor.image_processor)
    elements = _run(grain, grain.MapDataset.source(source).map(prepare), settings.num_workers, settings.batch_size)
    tokenize = partial(processor, max_length=settings.max_text_length)
    examples: list[dict[str, Any]] = []
    used = skipped = 0
    try:
        for _ in range(len(source)):
            element = _next_element(elements)
            if "error" in element:
                skipped += 1
                if skipped <= LOGGED_SKIPS:
                    logger.warning("left out: %s", element["error"])
                continue
            used += 1
            examples.append(element)
            if len(examples) == settings.batch_size:
                yield _collate(examples, tokenize), [example["caption"] for example in examples]
                examples = []
        if used == 0:
            raise InputError(f"no example of {source.name} can be used; the last: {element['error']}")
        if examples:
            filled = examples + examples[-1:] * (settings.batch_size - len(examples))
            yield _collate(filled, tokenize), [example["caption"] for example in examples]
    finally:
        elements.close()
    if skipped:
        logger.warning("%d of %d examples of %s were left out", skipped, len(source), source.name)


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise InputError("reading data needs datasets; run pip install 'flax-qformer[train]'") from None
    return datasets


def _grain() -> ModuleType:
    try:
        import grain
        from absl import flags
    except ImportError:
        raise InputError("loading data needs grain; run pip install 'flax-qformer[train]'") from None
    # Grain up to 0.2.18 reads this flag of its workers' profiler although nobody parsed any (google/grain issue 1355).
    if "grain_enable_multiprocess_worker_profiling" in flags.FLAGS:
        flags.FLAGS["grain_enable_multiprocess_worker_profiling"].present = True
    return grain


# Sources


def _load(settings: DataSettings) -> dict[str, Any]:
    """The splits of the data, by name."""
    datasets = _datasets()
    path = Path(settings.data)
    try:
        if path.is_file() and path.suffix == ".parquet":
            splits = datasets.load_dataset("parquet", data_files=str(path))
        elif path.is_file() and path.suffix == ".tar":
            splits = {"train": _load_tars([path], settings)}
        elif path.is_file():
            raise InputError(f"{path} is no .tar and no .parquet; give such a file, or a folder")
        elif path.is_dir():
            splits = _load_folder(path, settings)
        else:
            splits = datasets.load_dataset(settings.data)
    except InputError:
        raise
    except Exception as error:
        # datasets raises what its readers do, and wraps it in errors that say nothing.
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        if path.exists():
            raise InputError(f"{path} cannot be read ({reason}); mend or remove that file") from None
        raise InputError(
            f"{settings.data} is no file or folder here, and the hub does not give it ({reason}); check the name and "
            "the connection, or give a folder"
        ) from None
    splits = {name: _undecoded(rows) for name, rows in splits.items() if len(rows)}
    if not splits:
        raise InputError(f"{settings.data} has no rows; add images and captions to it")
    return splits


def _load_folder(folder: Path, settings: DataSettings) -> dict[str, Any]:
    datasets = _datasets()
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"the folder {folder} may not be read; change its permissions")
    if any(next(folder.rglob(name), None) for name in METADATA_FILES):
        return datasets.load_dataset("imagefolder", data_dir=str(folder))
    # img2dataset puts Parquet files without images beside its tars.
    if tars := sorted(folder.rglob("*.tar")):
        splits: dict[str, list[Path]] = {}
        for tar in tars:
            top = tar.relative_to(folder).parts[0]
            splits.setdefault(top if top in HELD_OUT_SPLITS else "train", []).append(tar)
        return {name: _load_tars(paths, settings) for name, paths in splits.items()}
    if next(folder.rglob("*.parquet"), None):
        return datasets.load_dataset("parquet", data_dir=str(folder))
    raise InputError(
        f"{folder} has neither metadata.jsonl or metadata.csv (with file_name and a caption) nor .tar or .parquet files; "
        "add the captions, or name another folder"
    )


def _undecoded(rows: Any) -> Any:
    """Rows whose images are still files, so that workers decode them."""
    image = _datasets().Image
    for name, feature in rows.features.items():
        if isinstance(feature, image):
            rows = rows.cast_column(name, image(decode=False))
    return rows


def _load_tars(paths: Sequence[Path], settings: DataSettings) -> Any:
    """Rows of WebDataset tars: files that differ in the suffix are one example, as `1.jpg`, `1.txt` and `1.json`.

    The reader of datasets takes the columns' types from the first five examples and fails on those that differ, say by
    a png among jpgs or an error message in the json.
    """
    datasets = _datasets()
    columns = {name: None for example in islice(_examples_of_tars(paths), 10) for name in example}
    caption = _caption_column(columns, settings)
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            caption: datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    # datasets finds what it wrote before by the arguments: changed files need changed arguments.
    arguments = {"paths": [str(path) for path in paths], "stamps": stamps, "caption": caption}
    return datasets.Dataset.from_generator(_rows_of_tars, features=features, gen_kwargs=arguments)


def _rows_of_tars(paths: Sequence[str], stamps: object, caption: str) -> Iterator[dict[str, Any]]:
    for example in _examples_of_tars([Path(path) for path in paths]):
        captions, image_id = example.get(caption), example.get("image_id")
        captions = captions if isinstance(captions, list) else [captions]
        yield {
            "image": {"bytes": example.get("image"), "path": None},
            caption: [text for text in captions if isinstance(text, str)],
            "image_id": None if image_id is None else str(image_id),
        }


def _examples_of_tars(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The examples by column: `image`, the suffixes of text files, and what the json says."""
    suffixes = PIL.Image.registered_extensions()
    for path in paths:
        current, example = None, {}
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not (member.isfile() and stem and suffix):
                    continue
                if (folder, stem) != current:
                    if example:
                        yield example
                    current, example = (folder, stem), {}
                file = tar.extractfile(member)
                content = file.read() if file else b""
                if f".{suffix.lower()}" in suffixes:
                    example["image"] = content
                elif suffix == "json":
                    values = _json(content)
                    example = {**values, **example} if isinstance(values, dict) else example
                else:
                    example[suffix] = content.decode("utf-8", errors="replace")
        if example:
            yield example


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _caption_column(columns: Mapping[str, Any], settings: DataSettings) -> str:
    """The column with captions, of columns by name with their types (None if they have none)."""
    named = settings.caption_column
    column = named or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is None or column not in columns:
        missing = f"no column {named}" if named else "no column that is known to hold captions"
        raise InputError(f"{settings.data} has {missing}, only {', '.join(columns)}; name one with --caption-column")
    feature = columns[column]
    text = getattr(feature, "feature", feature)
    if feature is not None and getattr(text, "dtype", None) not in ("string", "large_string"):
        raise InputError(
            f"the column {column} of {settings.data} holds no text, but {feature}; name another with --caption-column"
        )
    return column


def _image_column(features: Mapping[str, Any], settings: DataSettings) -> str:
    holding = [name for name, feature in features.items() if _holds_images(feature)]
    named = settings.image_column
    if named:
        if named in holding:
            return named
        raise InputError(f"{settings.data} has no images in {named}; these hold some: {', '.join(holding) or 'none'}")
    usual = [name for name in IMAGE_COLUMNS if name in holding]
    if not usual and len(holding) != 1:
        found = f"several columns of images ({', '.join(holding)})" if holding else "no column of images"
        raise InputError(f"{settings.data} has {found} among {', '.join(features)}; name one with --image-column")
    return (usual or holding)[0]


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images, of files as bytes, or of structs {bytes, path}."""
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return isinstance(feature, _datasets().Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _image_ids(rows: Any, image_column: str) -> np.ndarray:
    """(N,) int32: the number of the first row with the same image."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = np.arange(len(rows), dtype=np.int32)
    images = rows.data.column(image_column)
    if "image_id" in rows.features:
        keys = rows.data.column("image_id")
    elif pa.types.is_struct(images.type) and {"bytes", "path"} <= {field.name for field in images.type}:
        # Beside bytes the path is but a name, which images of several folders may share.
        is_file = pc.is_null(pc.struct_field(images, "bytes"))
        keys = pc.if_else(is_file, pc.struct_field(images, "path"), None)
    else:
        return numbers
    chunks = keys.dictionary_encode().unify_dictionaries().chunks
    kinds = np.concatenate([chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in chunks])
    _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
    return np.where(kinds < 0, numbers, numbers[first][inverse]).astype(np.int32)


def _is_held_out(image_ids: np.ndarray, settings: DataSettings) -> np.ndarray:
    """(N,) bool: whether the image of a row is among those drawn to be held out."""
    images = np.unique(image_ids)
    number = settings.held_out if settings.held_out >= 1 else math.ceil(settings.held_out * len(images))
    drawn = np.random.default_rng(settings.seed).permutation(images)[: int(number)]
    return np.isin(image_ids, drawn)


# Loading


def _run(grain: ModuleType, elements: Any, num_workers: int, batch_size: int) -> Any:
    """Grain's iterator over a MapDataset, which decodes about one batch ahead if it has workers."""
    # By default each worker would decode 500 ahead, in 16 threads.
    elements = elements.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=math.ceil(batch_size / max(num_workers, 1))
    )
    return iter(elements.mp_prefetch(options, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    # Ctrl-C reaches the whole process group; the parent ends its workers itself. Where it cannot, as it was killed,
    # they must not wait for it forever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _next_element(elements: Any) -> dict[str, Any]:
    try:
        return next(elements)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].partition(".")[0]
        raise InputError(
            f"a process that loads data died (exit code {code}), likely for want of memory or of space in /dev/shm; "
            "lower --num-workers or --batch-size"
        ) from None


def _prepare(
    row: Mapping[str, Any],
    rng: np.random.Generator | None = None,
    *,
    image_processor: ImageProcessor,
    crop_scale: tuple[float, float] = (1, 1),
    flip: bool = False,
) -> dict[str, Any]:
    """A row to pixel_values, caption and image_id, or to an error; without rng nothing is left to chance."""
    captions = [row["caption"]] if isinstance(row["caption"], str) else row["caption"] or []
    captions = [caption.strip() for caption in captions if caption and caption.strip()]
    if not captions:
        return {"error": f"{row['name']} has no caption"}
    caption = captions[rng.integers(len(captions)) if rng else 0]
    try:
        image = _open(row["image"], row["name"])
        if rng and crop_scale != (1, 1):
            image = _random_crop(image, rng, crop_scale)
        pixels = image_processor(image)
    except Exception as error:
        # Pillow's decoders raise whatever they meet in a broken file.
        return {"error": str(error) or repr(error)}
    if rng and flip and rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    return {"pixel_values": pixels, "caption": caption, "image_id": row["image_id"]}


def _open(image: Any, name: str) -> PIL.Image.Image:
    if isinstance(image, Mapping):
        image = image["bytes"] or image.get("path")
    if not image:
        raise InputError(f"{name} has no image")
    return open_image(image, name) if isinstance(image, bytes) else open_image(Path(image))


def _random_crop(image: PIL.Image.Image, rng: np.random.Generator, scale: tuple[float, float]) -> PIL.Image.Image:
    """A part of the image between 3:4 and 4:3, as torchvision's RandomResizedCrop draws it; narrow images stay whole."""
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
