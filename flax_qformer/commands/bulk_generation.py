"""Pictures of all references, prompts and seeds of lists, and a table of them in Parquet shards."""

import re
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from flax_qformer.checkpoints.model_files import DEFAULT_MODEL, TOKENIZER_FILES, download_weights, locate
from flax_qformer.checkpoints.pipelines import CLIP_TOKENIZER_FILES, locate_pipeline
from flax_qformer.commands.drawing import (
    Drawer,
    DrawOptions,
    finite_error,
    read_parameters,
    save_picture,
    settings_of,
)
from flax_qformer.commands.shards import (
    Columns,
    ShardedRows,
    check_apart_from,
    check_only_shards,
    parameter_files,
    process_share,
    sum_of_files,
    sum_of_ids,
)
from flax_qformer.data.batches import Images, open_images, open_row
from flax_qformer.data.sources import DataSettings
from flax_qformer.errors import InputError
from flax_qformer.parallel.mesh import named_mesh
from flax_qformer.processing.processor import open_image

TABLE, PICTURES = "rows", "pictures"
"""Folders inside the output. The table has its own, so that readers of Parquet folders find no pictures in it."""

WRITERS = 2
"""Threads that encode and write pictures while the devices draw the next batch."""


@dataclass(frozen=True, kw_only=True)
class BulkSettings:
    """Which pictures to make.

    Attributes:
      prompts, seeds: each reference is drawn with every pair of these.
      reference: photos of one subject, whose vectors are averaged; or none, if the subject comes from a file.
      references: instead: a source of photos, each of its own subject, see `DataSettings`.
      image_column: see `DataSettings`.
      output: the folder of the pictures and the table.
      shard_size: rows in a shard of the table.
      process: index of this process and number of processes; by default those of JAX.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: tuple[Path, ...]
    references: str | None
    image_column: str | None
    output: Path
    shard_size: int
    process: tuple[int, int] | None


class Wanted(NamedTuple):
    """A row: the number of its reference, its prompt and its seed."""

    reference: int
    prompt: str
    seed: int


class DrawnRows(NamedTuple):
    """The rows of one batch: numbers, errors or None, ids of references, and the writes of pictures."""

    rows: range
    errors: list[str | None]
    references: list[str]
    writes: list[Future[None]]


class PictureList:
    """The rows: a picture for each reference, prompt and seed, in this order.

    photos: of the subject, if all rows share one; otherwise each reference has its own photo.
    """

    def __init__(
        self, settings: BulkSettings, references: Images | Sequence[Mapping[str, Any]], photos: Sequence[Any]
    ) -> None:
        self.settings, self.references, self._photos = settings, references, photos
        self._shape = (len(references), len(settings.prompts), len(settings.seeds))

    def __len__(self) -> int:
        return int(np.prod(self._shape))

    def __getitem__(self, row: int) -> Wanted:
        reference, prompt, seed = np.unravel_index(row, self._shape)
        return Wanted(int(reference), self.settings.prompts[prompt], self.settings.seeds[seed])

    def photos_of(self, number: int) -> Sequence[Any]:
        """The photos of a reference."""
        if not self.settings.references:
            return self._photos
        reference: Any = self.references[number]
        return [open_row(reference["image"], reference["name"]).convert("RGB")]

    def name(self, row: int) -> str:
        """The row's id, and its picture's name without suffix: unique, and readable in a listing."""
        wanted = self[row]
        words = re.sub(r"\W+", "-", wanted.prompt)[:40].strip("-")
        return f"{row:07}-{words}-{wanted.seed}"

    def picture(self, row: int) -> Path:
        return self.settings.output / PICTURES / f"{self.name(row)}.png"


def generate_all(options: DrawOptions, settings: BulkSettings) -> str:
    """Draw the missing pictures and write the missing shards of their table.

    Returns:
      A line on the shards in the folder.

    Raises:
      InputError: a setting, the photos or the model are unfit, the folder holds something else, or there is no space.
      Stopped: SIGTERM or SIGINT asked to stop; pictures and complete shards are kept.
    """
    process_share(settings.process)
    references: Images | list[dict[str, Any]] = [{"id": ", ".join(map(str, settings.reference or ["subject"]))}]
    photos = [open_image(file) for file in settings.reference]
    if settings.references:
        check_apart_from(settings.references, settings.output)
        references = open_images(DataSettings(settings.references, image_column=settings.image_column))
    picture_list = PictureList(settings, references, photos)
    _check_place(settings.output, picture_list)
    shards = ShardedRows(
        folder=settings.output / TABLE,
        content="pictures",
        unit="picture",
        count=len(picture_list),
        shard_size=settings.shard_size,
        settings=settings_of(options) | {"shard_size": settings.shard_size, "image_column": settings.image_column},
        sum_of_ids=sum_of_ids(references, [*settings.prompts, *map(str, settings.seeds)]),
        sum_of_files=sum_of_files(_pipeline_files(options, settings)),
        process=settings.process,
    )
    mesh = named_mesh(options.mesh, jax.local_devices())
    size = shards.batch_size(options.batch_size, mesh)
    draw = partial(_draw, picture_list, size=size, options=options, mesh=mesh, fingerprint=shards.sum_of_files)
    return shards.write_missing(size, draw, partial(_picture_table, picture_list))


def _check_place(output: Path, picture_list: PictureList) -> None:
    """Check that the output folder holds nothing but this list's pictures and their table."""
    if output.is_dir():
        other = next((path for path in output.iterdir() if path.name not in (TABLE, PICTURES)), None)
        if other and not other.name.startswith("."):
            raise InputError(f"{output} holds other files than pictures of a list, {other.name}; name another `output`")
    check_only_shards(output / TABLE)
    if (output / PICTURES).is_dir():
        expected = {f"{picture_list.name(row)}.png" for row in range(len(picture_list))}
        for path in (output / PICTURES).iterdir():
            if path.name not in expected and not path.name.startswith("."):
                raise InputError(
                    f"{output} holds a picture of other references, prompts or seeds, {path.name}; name another "
                    "`output`"
                )


def _pipeline_files(options: DrawOptions, settings: BulkSettings) -> set[Path]:
    """All files that determine the pictures, besides those of `references`."""
    source = None if options.model == str(DEFAULT_MODEL) else options.model
    pipeline = locate_pipeline(source, with_controlnet=bool(options.control and not options.controlnet))
    files = parameter_files(pipeline.qformer).union(*map(parameter_files, pipeline.parts.values()))
    files |= {pipeline.tokenizer / name for name in CLIP_TOKENIZER_FILES}
    if pipeline.qformer.tokenizer:
        files |= {pipeline.qformer.tokenizer / name for name in TOKENIZER_FILES}
    for controlnet in options.controlnet:
        files |= parameter_files(download_weights(locate(controlnet)))
    files |= {*options.control, *options.lora, *settings.reference}
    files |= {options.subject_file} if options.subject_file else set()
    return {path for path in files if path.is_file()}


def _draw(
    picture_list: PictureList,
    batches: Sequence[range],
    *,
    size: int,
    options: DrawOptions,
    mesh: Mesh,
    fingerprint: int,
) -> Generator[DrawnRows]:
    """Load the pipeline, then draw each batch of `size` rows or fewer; pictures of an earlier run are kept."""
    drawer = Drawer(options, mesh)
    settings = drawer.settings | {"fingerprint of the model's files": fingerprint}
    subjects: dict[int, np.ndarray | str] = {}
    writes: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as writers:
        for rows in batches:
            batch = [picture_list[row] for row in rows]
            ids = {row.reference: str(picture_list.references[row.reference]["id"]) for row in batch}
            files = [picture_list.picture(row) for row in rows]
            parameters = [
                {"prompt": row.prompt, "seed": row.seed, "reference": ids[row.reference]} | settings for row in batch
            ]
            results: Sequence[np.ndarray | str | None] = [None] * len(batch)
            # At most two batches of pictures are in memory, and an error while writing one ends the run.
            for write in writes:
                write.result()
            # A batch is drawn whole: in a smaller one, the same pictures would round differently.
            if not all(map(_is_kept, files, parameters)):
                subjects = {
                    number: subjects[number] if number in subjects else _read_subject(drawer, picture_list, number)
                    for number in ids
                }
                results = _draw_batch(drawer, batch, subjects, size, options.dtype)
            writes = [
                writers.submit(save_picture, file, result, values)
                for file, result, values in zip(files, results, parameters, strict=True)
                if isinstance(result, np.ndarray)
            ]
            errors = [result if isinstance(result, str) else None for result in results]
            yield DrawnRows(rows, errors, [ids[row.reference] for row in batch], writes)


def _read_subject(drawer: Drawer, picture_list: PictureList, number: int) -> np.ndarray | str:
    """The vectors of a reference, or what is wrong with its photo."""
    try:
        photos = picture_list.photos_of(number)
    except Exception as error:
        # On broken files Pillow's decoders raise exceptions of any type.
        return str(error) or repr(error)
    return drawer.subject(photos)


def _draw_batch(
    drawer: Drawer, batch: Sequence[Wanted], subjects: Mapping[int, np.ndarray | str], size: int, dtype: str
) -> list[np.ndarray | str]:
    """The picture of each row, (height, width, 3) float32, or what is wrong with it."""
    results = [subjects[row.reference] for row in batch]
    good = [i for i, result in enumerate(results) if not isinstance(result, str)]
    if good:
        vectors = [np.asarray(results[i]) for i in good]
        pictures = drawer.draw([batch[i].prompt for i in good], vectors, [batch[i].seed for i in good], size)
        for i, picture in zip(good, pictures, strict=True):
            results[i] = finite_error(picture, dtype) or picture
    return results


def _is_kept(file: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether an earlier run wrote this picture.

    Raises:
      InputError: it has other settings.
    """
    before = read_parameters(file)
    if before is None:
        return False
    changed = [name for name in wanted if name != "version" and before.get(name) != wanted[name]]
    if changed:
        changes = "; ".join(f"{name} was {before.get(name)} and is now {wanted[name]}" for name in changed)
        raise InputError(f"{file} was drawn with other settings: {changes}. Set them back, or name another `output`")
    return True


def _picture_table(picture_list: PictureList, start: int, parts: Sequence[DrawnRows]) -> Columns:
    """The columns of a shard, once its pictures are on disk."""
    for part in parts:
        for write in part.writes:
            write.result()
    rows = [row for part in parts for row in part.rows]
    errors = [error for part in parts for error in part.errors]
    files = [f"{PICTURES}/{picture_list.picture(row).name}" for row in rows]
    columns = {
        "id": pa.array([picture_list.name(row) for row in rows], pa.string()),
        "row": pa.array(rows, pa.int64()),
        "reference": pa.array([name for part in parts for name in part.references], pa.string()),
        "prompt": pa.array([picture_list[row].prompt for row in rows], pa.string()),
        "seed": pa.array([picture_list[row].seed for row in rows], pa.int64()),
        "file": pa.array([None if error else file for file, error in zip(files, errors, strict=True)], pa.string()),
        "error": pa.array(errors, pa.string()),
    }
    return columns, {}
