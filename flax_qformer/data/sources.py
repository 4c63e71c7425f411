"""Captioned images from folders, tars, Parquet files or the hub, as rows with random access."""

import dataclasses
import errno
import json
import logging
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import PIL.Image

from flax_qformer.errors import InputError

logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentences", "description", "prompt")
IMAGE_COLUMNS = ("image", "jpg", "png", "img", "picture")
ID_COLUMNS = ("id", "__key__", "file_name")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "test")


@dataclass(frozen=True)
class DataSettings:
    """Which data to read, and how to make examples from it.

    Attributes:
      data: a folder with `metadata.jsonl` or `metadata.csv`, a folder of WebDataset tars or of Parquet files, one such
        file, or a hub id.
      caption_column: the column with the captions; by default recognised by its name.
      image_column: the column with the images; by default recognised by its type and name.
      held_out: images held out from training if the data has no `validation` or `test` split: a fraction if below 1,
        else a number of images.
      batch_size: examples in a batch, over all processes.
      max_text_length: tokens to which captions are padded and cut.
      crop_scale: smallest and largest part of the image's area that a random crop keeps; 1 1 turns cropping off.
      flip: mirror half of the images, which makes captions with "left" and "right" wrong.
      num_workers: processes that decode; 0 decodes in the main process.
      seed: seed of the shuffle, the augmentation and the choice of held-out images.
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
        for is_valid, message in (
            (
                0 <= self.held_out < 1 or (self.held_out >= 1 and self.held_out % 1 == 0),
                f"`held_out` is {self.held_out}; it must be a fraction below 1, or a whole number of images",
            ),
            (self.batch_size > 0, f"`batch_size` is {self.batch_size}; it must be above 0"),
            (self.max_text_length > 1, f"`max_text_length` is {self.max_text_length}; it must be above 1"),
            (
                0 < low <= high <= 1,
                f"`crop_scale` is {low} {high}; it must be two numbers in (0, 1], the smaller first",
            ),
            (self.num_workers >= 0, f"`num_workers` is {self.num_workers}; it must not be below 0"),
            (0 <= self.seed < 2**32, f"`seed` is {self.seed}; it must be from 0 to {2**32 - 1}"),
        ):
            if not is_valid:
                raise InputError(message)


@dataclass(frozen=True)
class Source:
    """Rows with images and captions, read on access.

    Attributes:
      name: folder, file or hub id of the data.
      rows: a `datasets.Dataset`; images are not decoded.
      image_column, caption_column: names of columns of the rows.
      chosen: (N,) numbers of the rows that are examples of this source.
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

    def select(self, index: slice | np.ndarray) -> "Source":
        """A part of the examples."""
        return dataclasses.replace(self, chosen=self.chosen[index], image_ids=self.image_ids[index])


@dataclass(frozen=True)
class Images:
    """Rows with images, with or without captions, read on access.

    Attributes:
      name: folder, file or hub id of the data.
      rows: a `datasets.Dataset`; images are not decoded.
      image_column: name of a column of the rows.
      id_column: name of a column of the rows, or None.
    """

    name: str
    rows: Any
    image_column: str
    id_column: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        image = row[self.image_column]
        key = row[self.id_column] if self.id_column else None
        if key is None and isinstance(image, Mapping) and image["bytes"] is None:
            key = image.get("path") or ""
            # datasets names files by their real path; Parquet files may use another one.
            for folder in (os.path.realpath(self.name), os.path.abspath(self.name)):
                _, _, key = key.rpartition(os.path.join(folder, ""))
        return {"name": f"row {number} of {self.name}", "id": str(number if key in (None, "") else key), "image": image}


def open_images(settings: DataSettings) -> Images:
    """Open the images of all splits for random access, as `open_source` does; captions are not needed.

    The id of a row is its value in the column `id`, `__key__` or `file_name`, else its file's path below the folder,
    else its number.

    Raises:
      InputError: there is no such data, it cannot be read, or it has no images.
    """
    splits = _load(settings, captions=False)
    rows = _datasets().concatenate_datasets(list(splits.values()))
    image_column = _image_column(rows.features, settings)
    id_column = next((name for name in ID_COLUMNS if name in rows.features), None)
    rows = rows.select_columns([name for name in (image_column, id_column) if name])
    return Images(settings.data, rows, image_column, id_column)


def open_source(settings: DataSettings, split: Literal["train", "held_out", "all"] = "train") -> Source:
    """Open data for random access. The first time, `datasets` copies tars and Parquet files into its cache.

    Rows share an `image_id` if they have the same value in the column of that name, or, without that column, the same
    image file. All rows of an image are on the same side of the split.

    Args:
      settings: `data`, the columns, `held_out` and `seed` are used.
      split: rows to train on, held-out rows, or both together.

    Raises:
      InputError: there is no such data, it cannot be read, it has no images or captions, or the split is empty.
    """
    splits = _load(settings, captions=True)
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
    # A single split is used for training, whatever its name.
    if split != "all" and (held_out is None or held_out is train):
        chosen = np.flatnonzero(_is_held_out(image_ids, settings) == (split == "held_out"))
    if len(chosen) == 0:
        raise InputError(
            f"{settings.data} leaves no example for {split.replace('_', ' ')}, of {len(rows)} rows; change `held_out`, "
            "or add images"
        )
    rows = rows.select_columns([image_column, caption_column])
    return Source(settings.data, rows, image_column, caption_column, chosen, image_ids[chosen])


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise InputError("reading data needs datasets; run pip install 'flax-qformer[train]'") from None
    return datasets


def _load(settings: DataSettings, captions: bool) -> dict[str, Any]:
    """The splits of the data by name. With `captions`, data without captions raises InputError."""
    datasets = _datasets()
    path = Path(settings.data)
    try:
        if path.is_file() and path.suffix == ".parquet":
            splits = _load_tables({"train": [path]})
        elif path.is_file() and path.suffix == ".tar":
            splits = {"train": _load_tars([path], settings, captions)}
        elif path.is_file():
            raise InputError(f"{path} is no .tar and no .parquet; give such a file, or a folder")
        elif path.is_dir():
            splits = _load_folder(path, settings, captions)
        else:
            splits = datasets.load_dataset(settings.data)
    except InputError:
        raise
    except Exception as error:
        # datasets hides the errors of its readers behind uninformative ones.
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from None
        reason = str(cause).strip().split("\n")[0] or type(error).__name__
        cache = str(datasets.config.HF_DATASETS_CACHE)
        if isinstance(cause, OSError) and (
            cause.errno in (errno.ENOSPC, errno.EDQUOT) or str(cause.filename).startswith(cache)
        ):
            raise InputError(
                f"the rows of {settings.data} cannot be kept in {cache} ({cause.strerror or reason}); free space "
                "there, or set HF_DATASETS_CACHE to another folder"
            ) from None
        if path.exists():
            file = path if path.is_file() else _metadata(path) or _damaged_parquet(path) or path
            raise InputError(f"{file} cannot be read ({reason}); fix or remove it") from None
        raise InputError(
            f"{settings.data} is no file or folder here, and cannot be loaded from the hub ({reason}); check the "
            "name and the connection, or name a folder"
        ) from None
    splits = {name: _undecoded(rows) for name, rows in splits.items() if len(rows)}
    if not splits:
        raise InputError(f"{settings.data} has no rows; add images{' and captions' if captions else ''} to it")
    return splits


def _load_folder(folder: Path, settings: DataSettings, captions: bool) -> dict[str, Any]:
    datasets = _datasets()
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"the folder {folder} may not be read; change its permissions")
    if metadata := _metadata(folder):
        if metadata.stat().st_size == 0:
            raise InputError(f"{metadata} is empty; write a row for each image, with file_name and a caption")
        splits = datasets.load_dataset("imagefolder", data_dir=str(folder), data_files=_patterns(folder))
        if captions:
            _warn_of_unused_images(folder, splits)
        return splits
    # img2dataset puts Parquet files without images beside its tars.
    if tars := _by_split(folder, "*.tar"):
        return {name: _load_tars(paths, settings, captions) for name, paths in tars.items()}
    if tables := _by_split(folder, "*.parquet"):
        return _load_tables(tables)
    if not captions:
        features = datasets.Features({"image": datasets.Image(decode=False)})
        return {"train": datasets.Dataset.from_dict({"image": _image_files(folder)}, features)}
    raise InputError(
        f"{folder} has neither metadata.jsonl or metadata.csv (file_name and a caption in each row) nor .tar or "
        ".parquet files; add the captions, or name another folder"
    )


def _load_tables(paths: Mapping[str, Sequence[Path]]) -> Any:
    """Rows of Parquet files by split. On its own, datasets skips files outside of splits and fails on empty files."""
    import pyarrow.parquet as pq

    def has_rows(path: Path) -> bool:
        try:
            return pq.read_metadata(path).num_rows > 0
        except Exception:  # datasets reports it
            return True

    files = {split: [str(path) for path in files if has_rows(path)] for split, files in paths.items()}
    files = {split: names for split, names in files.items() if names}
    return _datasets().load_dataset("parquet", data_files=files) if files else {}


def _by_split(folder: Path, pattern: str) -> dict[str, list[Path]]:
    """Files by split: those in `validation/` or named `validation.tar` or `validation-00000-of-00002.tar`."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob(pattern)):
        top, name = path.relative_to(folder).parts[0], re.sub(r"(-\d+-of-\d+)?\.\w+$", "", path.name)
        split = next((split for split in (top, name) if split in HELD_OUT_SPLITS), "train")
        splits.setdefault(split, []).append(path)
    return splits


def _warn_of_unused_images(folder: Path, splits: Mapping[str, Any]) -> None:
    import pyarrow.compute as pc

    # Count files: several files may share an image_id.
    files = (pc.struct_field(rows.data.column("image"), "path") for rows in splits.values())
    used = sum(len(pc.unique(paths)) for paths in files)
    if unused := max(0, len(_image_files(folder)) - used):
        logger.warning("%d images in %s have no row in the metadata and are not used", unused, folder)


def _damaged_parquet(folder: Path) -> Path | None:
    import pyarrow.parquet as pq

    for path in sorted(folder.rglob("*.parquet")):
        try:
            pq.read_metadata(path)
        except Exception:
            return path
    return None


def _metadata(folder: Path) -> Path | None:
    return next((file for name in METADATA_FILES for file in folder.rglob(name)), None)


def _patterns(folder: Path) -> dict[str, str]:
    """The files of each split. On its own, datasets takes `my test.png` for a test split and skips other files."""
    splits = [name for name in ("train", *HELD_OUT_SPLITS) if (folder / name).is_dir()]
    without = [name for name in splits if _metadata(folder / name) is None]
    if without and any((folder / name).is_file() for name in METADATA_FILES):
        raise InputError(
            f"{folder} has metadata for the folders {', '.join(without)} together; put a metadata file with its own "
            "rows into each folder"
        )
    return {name: f"{name}/**" for name in splits} if "train" in splits else {"train": "**"}


def _image_files(folder: Path) -> list[str]:
    """Image files in a folder and below it, sorted, without hidden ones."""
    suffixes = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    files = []
    for place, folders, names in os.walk(folder.resolve()):  # datasets names files by their real path
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")]
        files += [os.path.join(place, name) for name in names]
    return sorted(files)


def _undecoded(rows: Any) -> Any:
    """Rows whose images stay undecoded, so that workers decode them."""
    image = _datasets().Image
    for name, feature in rows.features.items():
        if isinstance(feature, image):
            rows = rows.cast_column(name, image(decode=False))
    return rows


def _load_tars(paths: Sequence[Path], settings: DataSettings, captions: bool) -> Any:
    """Rows of WebDataset tars: files whose names differ only in the suffix are one example: `1.jpg`, `1.txt`, `1.json`.

    datasets' own reader infers the columns' types from the first five examples, and fails on other types: a png among
    jpgs, or an error message in the json.
    """
    datasets = _datasets()
    columns = {name: None for example in islice(_examples_of_tars(paths), 10) for name in example}
    captions = captions or not columns.keys().isdisjoint(CAPTION_COLUMNS)
    caption = _caption_column(columns, settings) if captions else None
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "image_id": datasets.Value("string"),
            "__key__": datasets.Value("string"),
            **({caption: datasets.List(datasets.Value("string"))} if caption else {}),
        }
    )
    # datasets caches by the arguments; `stamps` changes them when a file changes.
    arguments = {"paths": [str(path) for path in paths], "stamps": stamps, "caption": caption}
    # By default, datasets holds 1000 images in memory before it writes them.
    return datasets.Dataset.from_generator(
        _rows_of_tars, features=features, gen_kwargs=arguments, writer_batch_size=100
    )


def _rows_of_tars(paths: Sequence[str], stamps: object, caption: str | None) -> Iterator[dict[str, Any]]:
    for example in _examples_of_tars([Path(path) for path in paths]):
        image_id = example.get("image_id")
        row = {
            "image": {"bytes": example.get("image"), "path": None},
            "image_id": None if image_id is None else str(image_id),
            "__key__": example["__key__"],
        }
        if caption:
            captions = example.get(caption)
            captions = captions if isinstance(captions, list) else [captions]
            row[caption] = [text for text in captions if isinstance(text, str)]
        yield row


def _examples_of_tars(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Examples by column: `image`, suffixes of text files, fields of the json, and the name as `__key__`."""
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                yield from _examples_of_tar(tar)
        except tarfile.TarError:
            # tarfile's message may be a list of the formats that it tried.
            raise InputError(
                f"{path} cannot be read (it is no tar, or damaged); download it again or remove it"
            ) from None


def _examples_of_tar(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    suffixes = PIL.Image.registered_extensions()
    current = ""
    example: dict[str, Any] = {}
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not (member.isfile() and stem and suffix):
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if example:
                yield {**example, "__key__": current}
            current, example = key, {}
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
        yield {**example, "__key__": current}


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _caption_column(columns: Mapping[str, Any], settings: DataSettings) -> str:
    """The column with captions. columns: name -> type, or None if the type is unknown."""
    named = settings.caption_column
    column = named or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is None or column not in columns:
        missing = f"no column {named}" if named else "no column with a usual name for captions"
        raise InputError(f"{settings.data} has {missing}, only {', '.join(columns)}; name one as `caption_column`")
    feature = columns[column]
    text = getattr(feature, "feature", feature)
    if feature is not None and getattr(text, "dtype", None) not in ("string", "large_string"):
        raise InputError(
            f"the column {column} of {settings.data} holds no text, but {feature}; name another as `caption_column`"
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
        problem = f"several columns of images ({', '.join(holding)})" if holding else "no column of images"
        raise InputError(f"{settings.data} has {problem} among {', '.join(features)}; name one as `image_column`")
    return (usual or holding)[0]


def _holds_images(feature: Any) -> bool:
    """Whether a column holds images, files as bytes, or structs {bytes, path}."""
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
        # With bytes, the path is only a name, which images of several folders may share.
        is_file = pc.is_null(pc.struct_field(images, "bytes"))
        keys = pc.if_else(is_file, pc.struct_field(images, "path"), None)
    else:
        return numbers
    if pa.types.is_nested(keys.type):
        raise InputError(f"the column image_id holds {keys.type}; it must hold a number or a text for each image")
    chunks = keys.dictionary_encode().unify_dictionaries().chunks
    kinds = np.concatenate([chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in chunks])
    _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
    return np.where(kinds < 0, numbers, numbers[first][inverse]).astype(np.int32)


def _is_held_out(image_ids: np.ndarray, settings: DataSettings) -> np.ndarray:
    """(N,) bool: whether the image of a row is held out."""
    images = np.unique(image_ids)
    number = settings.held_out if settings.held_out >= 1 else math.ceil(settings.held_out * len(images))
    drawn = np.random.default_rng(settings.seed).permutation(images)[: int(number)]
    return np.isin(image_ids, drawn)
