"""Embeddings of all images of a source, as Parquet shards.

The rows of a shard, and of each of its batches, depend only on the source and the settings. So a run resumes by writing
the missing shards, and several processes share the work without communication.
"""

import contextlib
import json
import logging
import math
import re
import zlib
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh, NamedSharding

from flax_qformer.checkpoints.atomic import check_writable, new_file
from flax_qformer.checkpoints.loading import as_dtype, from_pretrained, locate_checkpoint
from flax_qformer.checkpoints.model_files import TOKENIZER_FILES, find_tokenizer
from flax_qformer.compilation import compiler_options
from flax_qformer.convert.files import open_tensors
from flax_qformer.data.batches import Images, image_batches, open_images
from flax_qformer.data.sources import DataSettings
from flax_qformer.errors import InputError, first_line
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.parallel.mesh import BATCH, mesh_context, named_mesh
from flax_qformer.parallel.processes import any_process
from flax_qformer.parallel.stopping import Stopped, stop_signals
from flax_qformer.processing.processor import Processor
from flax_qformer.progress import Progress

logger = logging.getLogger(__name__)

FIXED = ("model", "config", "tokenizer", "text", "truncate", "image_column", "dtype", "embedding_dtype", "shard_size")
"""Settings that determine the embeddings or their shards: a resumed run must not change them."""

ROWS, SUM_OF_IDS, SUM_OF_FILES = "rows", "sum of ids", "sum of the model's files"
"""Fingerprints of the data and the model, kept beside the settings."""

SAMPLE = 2**16
"""Bytes per sample of a model file."""

NOTES = b"flax_qformer"
"""Key of the schema's metadata under which a shard keeps its settings and fingerprints."""


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """Settings of bulk embedding.

    Attributes:
      data, image_column, num_workers: see `DataSettings`; captions are not needed.
      output: the folder of the shards.
      model, config, tokenizer: as `from_pretrained` and `Processor.from_pretrained` take them.
      text: the subject's name, the same for all images.
      truncate: cut a text that is longer than the model reads.
      dtype: of the computation.
      embedding_dtype: of the written embeddings, float16 or float32.
      shard_size: rows in a shard.
      batch_size: images per batch, rounded up to a multiple of the devices.
      mesh: layout of the devices of each process, as for training.
      process: index of this process and number of processes; by default those of JAX.
    """

    data: str
    output: Path
    model: str
    config: str | None
    tokenizer: str | None
    text: str | None
    truncate: bool
    image_column: str | None
    dtype: str
    embedding_dtype: str
    shard_size: int
    batch_size: int
    mesh: str
    num_workers: int
    process: tuple[int, int] | None


class Part(NamedTuple):
    """The rows of one batch: ids, errors or None, and embeddings (n, queries, width)."""

    ids: list[str]
    errors: list[str | None]
    embeddings: np.ndarray


def embed_data(settings: EmbedSettings) -> str:
    """Write the missing shards.

    Returns:
      A line on the shards in the folder.

    Raises:
      InputError: a setting, the data or the model is unfit, the folder holds something else, or there is no space.
      Stopped: SIGTERM or SIGINT asked to stop; complete shards are kept.
    """
    index, count = settings.process or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise InputError(f"there is no process {index} of {count}; number them from 0 to {count - 1}")
    source = DataSettings(settings.data, image_column=settings.image_column, num_workers=settings.num_workers)
    _check_place(settings)
    images = open_images(source)
    notes = {name: getattr(settings, name) for name in FIXED}
    notes |= {ROWS: len(images), SUM_OF_IDS: _sum_of_ids(images), SUM_OF_FILES: _sum_of_files(settings)}
    errors = _errors_of_shards(settings.output, notes)
    rows = range(len(images))
    starts = rows[:: settings.shard_size]
    shards = {
        settings.output / f"{number:05}-of-{len(starts):05}.parquet": rows[start : start + settings.shard_size]
        for number, start in enumerate(starts)
        if number % count == index
    }
    missing = {path: part for path, part in shards.items() if path not in errors}
    if missing:
        check_writable(next(iter(missing)))
    # All processes of a job load the model together.
    if any_process(bool(missing)):
        errors |= _make(missing, images, settings, notes)
    share = f" of {len(starts)}, the share of process {index} of {count}" if count > 1 else ""
    failed = sum(errors[path] for path in shards)
    return f"{settings.output} has {len(shards)} shards{share}: {_total(shards)} rows, {failed} with an error"


def _check_place(settings: EmbedSettings) -> None:
    """Check that the output folder holds nothing but shards, and does not lie inside the data."""
    output, data = settings.output, Path(settings.data)
    if data.exists() and output.resolve().is_relative_to(data.resolve()):
        raise InputError(f"{output} lies inside the data; name an `output` elsewhere")
    for path in output.iterdir() if output.is_dir() else ():
        if not re.fullmatch(r"\..*|\d{5,}-of-\d{5,}\.parquet", path.name):
            raise InputError(f"{output} holds something else than shards, {path.name}; name another `output`")


def _sum_of_ids(images: Images) -> int:
    """Fingerprint of a source: the CRC of a thousand ids, evenly spaced."""
    numbers = {int(number) for number in np.linspace(0, len(images) - 1, 1000)}
    return zlib.crc32("\n".join(images[number]["id"] for number in sorted(numbers)).encode())


def _sum_of_files(settings: EmbedSettings) -> int:
    """Fingerprint of a model: the CRC of its files; large files are sampled a thousand times."""
    source = locate_checkpoint(settings.model, settings.config)
    config = Path(settings.config) if settings.config else source.config
    files = {path for path in (config, source.image_processor) if path}
    if source.params:
        files.update(path for path in source.params.rglob("*") if path.is_file())
    else:
        files.update(tensor.path for path in source.weights for tensor in open_tensors(path).values())
    if settings.text is not None:
        tokenizer = find_tokenizer(settings.tokenizer) if settings.tokenizer else source.tokenizer
        files.update(tokenizer / name for name in TOKENIZER_FILES if tokenizer and (tokenizer / name).is_file())
    total = 0
    for path in sorted(files, key=lambda path: (path.name, path)):  # independent of the folder
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                for start in range(0, size, max(SAMPLE, size // 1000)):
                    file.seek(start)
                    total = zlib.crc32(file.read(SAMPLE), total)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check it and its permissions") from None
    return total


def _errors_of_shards(folder: Path, notes: Mapping[str, Any]) -> dict[Path, int]:
    """The complete shards, and the number of errors in each.

    Raises:
      InputError: one was made with other settings.
    """
    errors = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.schema_arrow.metadata or {}
                before = json.loads(metadata.get(NOTES, "null"))
                column = file.read(columns=["error"])["error"] if before else None
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is not a complete shard (%s): writing it again", path, first_line(error))
            continue
        if column is None:
            raise InputError(f"{path} is no shard of embeddings; name another `output`")
        # Shards of earlier versions have no fingerprint of the model.
        before = {SUM_OF_FILES: notes[SUM_OF_FILES]} | before
        changed = [name for name, value in notes.items() if before.get(name) != value]
        if ROWS in changed or SUM_OF_IDS in changed:
            raise InputError(
                f"the shards in {folder} are of other images ({before.get(ROWS)} then, {notes[ROWS]} now, by their "
                "ids); name another `output`"
            )
        if changed == [SUM_OF_FILES]:
            raise InputError(
                f"the files of {notes['model']} are others than those that the shards in {folder} were made with; "
                "name another `output`"
            )
        changed = [name for name in changed if name in FIXED]
        if changed:
            told = "; ".join(f"`{name}` was {before.get(name)} and is now {notes[name]}" for name in changed)
            raise InputError(
                f"the shards in {folder} cannot be completed with other settings: {told}. Set them back, "
                "or name another `output`"
            )
        errors[path] = len(column) - column.null_count
    return errors


def _make(
    shards: Mapping[Path, range], images: Images, settings: EmbedSettings, notes: Mapping[str, Any]
) -> dict[Path, int]:
    """Write shards; returns the number of errors in each."""
    mesh = named_mesh(settings.mesh, jax.local_devices())
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    # The same for every shard: results of another batch size round differently.
    size = math.ceil(min(settings.batch_size, settings.shard_size, len(images)) / split) * split
    batches = {path: [rows[i : i + size] for i in range(0, len(rows), size)] for path, rows in shards.items()}
    every = [rows for some in batches.values() for rows in some]
    written: dict[Path, Future[int]] = {}
    with (
        stop_signals() as signals,
        contextlib.closing(_embed(images, every, size, settings, mesh)) as parts,
        ThreadPoolExecutor(1) as writer,
        Progress(_total(shards), "image") as progress,
    ):
        for path, some in batches.items():
            shard: list[Part] = []
            while len(shard) < len(some) and not signals:
                shard.append(next(parts))
                progress.advance(len(shard[-1].ids))
            if len(shard) < len(some):
                break
            # At most two shards are in memory, and an error while writing one ends the run.
            for previous in list(written.values())[-1:]:
                previous.result()
            written[path] = writer.submit(_write, path, shards[path].start, shard, notes)
    errors = {path: writing.result() for path, writing in written.items()}
    if len(errors) < len(shards):
        left = len(shards) - len(errors)
        raise Stopped(signals[0], f"stopped with {left} shards to go; the same command goes on with them")
    return errors


def _embed(images: Images, batches: Sequence[range], size: int, settings: EmbedSettings, mesh: Mesh) -> Generator[Part]:
    """Load the model, then yield the rows of each batch, `size` or fewer."""
    model, params = from_pretrained(
        settings.model, as_dtype(settings.dtype), model_class=Blip2QFormerModel, config=settings.config, mesh=mesh
    )
    processor = Processor.from_pretrained(settings.model, config=model.config, tokenizer=settings.tokenizer)
    tokens = processor(text=[settings.text] * size, truncate=settings.truncate) if settings.text is not None else {}
    split = NamedSharding(mesh, BATCH)
    tokens = jax.device_put(tokens, split)

    apply: Any = model.apply

    @partial(jax.jit, compiler_options=compiler_options())
    def run(params: Any, pixel_values: jax.Array, tokens: dict[str, jax.Array]) -> jax.Array:
        with mesh_context(mesh):
            output = apply({"params": params}, pixel_values, **tokens)
        return output.query_embeddings.astype(settings.embedding_dtype)

    def parts() -> Generator[Part]:
        before: tuple[dict[str, Any], jax.Array] | None = None
        decoded = image_batches(images, processor.image_processor, batches, size, settings.num_workers)
        with contextlib.closing(decoded):
            for batch in decoded:
                # The devices compute this batch while the host fetches the previous result and reads the next batch.
                now = batch, run(params, jax.device_put(batch["pixel_values"], split), tokens)
                if before:
                    yield part(*before)
                before = now
        if before:
            yield part(*before)

    def part(batch: dict[str, Any], embeddings: jax.Array) -> Part:
        return Part(batch["id"], batch["error"], np.asarray(embeddings)[: len(batch["id"])])

    return parts()


def _write(path: Path, start: int, parts: Sequence[Part], notes: Mapping[str, Any]) -> int:
    """Write one shard; returns the number of its rows with errors."""
    embeddings = np.concatenate([part.embeddings for part in parts])
    shape = embeddings.shape[1:]
    embeddings = embeddings.reshape(len(embeddings), -1)
    errors = [error for part in parts for error in part.errors]
    for row in np.flatnonzero(~np.isfinite(embeddings).all(axis=1)):
        errors[row] = errors[row] or f"its embedding has values that are not finite in {embeddings.dtype}"
    bad = np.array([error is not None for error in errors])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1], mask=pa.array(bad))
    columns = {
        "id": pa.array([key for part in parts for key in part.ids], pa.string()),
        "row": pa.array(np.arange(start, start + len(bad))),
        "embeddings": vectors,
        "error": pa.array(errors, pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({NOTES: json.dumps({**notes, "shape": shape})})
    with new_file(path) as file:
        # Floats rarely repeat, and nobody queries their extremes.
        pq.write_table(table, file, compression="zstd", use_dictionary=False, write_statistics=False)
    return int(bad.sum())


def _total(shards: Mapping[Path, range]) -> int:
    return sum(map(len, shards.values()))
