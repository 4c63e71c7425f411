"""Rows as Parquet shards: written atomically, resumed after a stop, shared by several processes.

The rows of a shard, and of each of its batches, depend only on the list of rows and the settings. So a run resumes by
writing the missing shards, and several processes share the work without communication.
"""

import contextlib
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from flax_qformer.checkpoints.atomic import check_writable, new_file
from flax_qformer.checkpoints.model_files import ModelFiles
from flax_qformer.convert.files import open_tensors
from flax_qformer.data.batches import Images
from flax_qformer.errors import InputError, first_line
from flax_qformer.parallel.processes import any_process
from flax_qformer.parallel.stopping import Stopped, stop_signals
from flax_qformer.progress import Progress

logger = logging.getLogger(__name__)

ROWS, SUM_OF_IDS, SUM_OF_FILES = "rows", "sum of ids", "sum of the model's files"
"""Fingerprints of the rows and the model, kept beside the settings."""

SAMPLE = 2**16
"""Bytes per sample of a model file."""

NOTES = b"flax_qformer"
"""Key of the schema's metadata under which a shard keeps its settings and fingerprints."""


Batch = TypeVar("Batch")
"""The rows of one batch."""

Columns = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The columns of a shard by name, and what else its notes say."""


@dataclass(frozen=True, kw_only=True)
class ShardedRows:
    """The rows to make, and the folder of their shards.

    Attributes:
      folder: of the shards.
      content: what the rows hold, as messages name it: "embeddings".
      unit: what a row is about, as messages name it: "image".
      count: number of rows.
      shard_size: rows in a shard.
      settings: those that determine the rows or their shards; a resumed run must not change them. `model` is one.
      sum_of_ids: fingerprint of the list of rows, see `sum_of_ids`.
      sum_of_files: fingerprint of the model, see `sum_of_files`.
      process: index of this process and number of processes; by default those of JAX.
    """

    folder: Path
    content: str
    unit: str
    count: int
    shard_size: int
    settings: Mapping[str, Any]
    sum_of_ids: int
    sum_of_files: int
    process: tuple[int, int] | None = None

    def batch_size(self, wanted: int, mesh: Mesh) -> int:
        """Rows in a batch, a multiple of the devices: the same for every shard, since another batch size rounds
        differently."""
        split = mesh.shape["data"] * mesh.shape["fsdp"]
        return math.ceil(min(wanted, self.shard_size, self.count) / split) * split

    def write_missing(
        self,
        batch_size: int,
        make: Callable[[Sequence[range]], Generator[Batch]],
        table: Callable[[int, Sequence[Batch]], Columns],
    ) -> str:
        """Write this process's missing shards.

        Args:
          batch_size: rows that run together.
          make: from the row numbers of all batches to a generator with a part for each. It is called only if
            shards are missing, in all processes of a job together, and is closed early when a signal arrives.
          table: the columns of a shard from the number of its first row and its parts. `error` is one of them, null
            for good rows.

        Returns:
          A line on the shards in the folder.

        Raises:
          InputError: shards in the folder have other settings, rows or model, or there is no space.
          Stopped: SIGTERM or SIGINT asked to stop; complete shards are kept.
        """
        index, count = process_share(self.process)
        errors = self._errors()
        rows = range(self.count)
        starts = rows[:: self.shard_size]
        shards = {
            self.folder / f"{number:05}-of-{len(starts):05}.parquet": rows[start : start + self.shard_size]
            for number, start in enumerate(starts)
            if number % count == index
        }
        missing = {path: part for path, part in shards.items() if path not in errors}
        if missing:
            check_writable(next(iter(missing)))
        # All processes of a job load the model together.
        if any_process(bool(missing)):
            errors |= self._make(missing, batch_size, make, table)
        share = f" of {len(starts)}, the share of process {index} of {count}" if count > 1 else ""
        failed = sum(errors[path] for path in shards)
        return f"{self.folder} has {len(shards)} shards{share}: {_total(shards)} rows, {failed} with an error"

    def _errors(self) -> dict[Path, int]:
        """The complete shards, and the number of errors in each."""
        errors = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                with pq.ParquetFile(path) as file:
                    metadata = file.schema_arrow.metadata or {}
                    before = json.loads(metadata.get(NOTES, "null"))
                    column = file.read(columns=["error"])["error"] if before else None
            except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
                logger.warning("%s is not a complete shard (%s): writing it again", path, first_line(error))
                continue
            if column is None:
                raise InputError(f"{path} is no shard of {self.content}; name another `output`")
            self._check_notes(before)
            errors[path] = len(column) - column.null_count
        return errors

    def _check_notes(self, before: Mapping[str, Any]) -> None:
        """Check that a shard with these notes belongs to this list."""
        # Shards of earlier versions have no fingerprint of the model.
        before = {SUM_OF_FILES: self.sum_of_files, **before}
        if (before.get(ROWS), before.get(SUM_OF_IDS)) != (self.count, self.sum_of_ids):
            raise InputError(
                f"the shards in {self.folder} are of other {self.unit}s ({before.get(ROWS)} then, {self.count} now, by "
                "their ids); name another `output`"
            )
        changed = [name for name, value in self._notes().items() if before.get(name) != value]
        if changed == [SUM_OF_FILES]:
            raise InputError(
                f"the files of {self.settings['model']} are others than those that the shards in {self.folder} were "
                "made with; name another `output`"
            )
        changed = [name for name in changed if name in self.settings]
        if changed:
            changes = "; ".join(f"`{name}` was {before.get(name)} and is now {self.settings[name]}" for name in changed)
            raise InputError(
                f"the shards in {self.folder} cannot be completed with other settings: {changes}. Set them back, or "
                "name another `output`"
            )

    def _notes(self) -> dict[str, Any]:
        # As JSON returns them: tuples become lists.
        settings = json.loads(json.dumps(dict(self.settings)))
        return {**settings, ROWS: self.count, SUM_OF_IDS: self.sum_of_ids, SUM_OF_FILES: self.sum_of_files}

    def _make(
        self,
        shards: Mapping[Path, range],
        batch_size: int,
        make: Callable[[Sequence[range]], Generator[Batch]],
        table: Callable[[int, Sequence[Batch]], Columns],
    ) -> dict[Path, int]:
        """Write shards; returns the number of errors in each."""
        batches = {
            path: [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)] for path, rows in shards.items()
        }
        written: dict[Path, Future[int]] = {}
        with (
            stop_signals() as signals,
            contextlib.closing(make([rows for some in batches.values() for rows in some])) as parts,
            ThreadPoolExecutor(1) as writer,
            Progress(_total(shards), self.unit) as progress,
        ):
            for path, some in batches.items():
                shard: list[Batch] = []
                while len(shard) < len(some) and not signals:
                    shard.append(next(parts))
                    progress.advance(len(some[len(shard) - 1]))
                if len(shard) < len(some):
                    break
                # At most two shards are in memory, and an error while writing one ends the run.
                for previous in list(written.values())[-1:]:
                    previous.result()
                written[path] = writer.submit(self._write, path, shards[path].start, shard, table)
        errors = {path: writing.result() for path, writing in written.items()}
        if len(errors) < len(shards):
            left = len(shards) - len(errors)
            raise Stopped(signals[0], f"stopped with {left} shards to go; run the same command to write them")
        return errors

    def _write(
        self, path: Path, start: int, parts: Sequence[Batch], table: Callable[[int, Sequence[Batch]], Columns]
    ) -> int:
        """Write one shard; returns the number of its rows with errors."""
        columns, notes = table(start, parts)
        rows = pa.table(columns).replace_schema_metadata({NOTES: json.dumps({**self._notes(), **notes})})
        with new_file(path) as file:
            # Floats rarely repeat, and nobody queries their extremes.
            pq.write_table(rows, file, compression="zstd", use_dictionary=False, write_statistics=False)
        return len(rows) - rows["error"].null_count


def process_share(process: tuple[int, int] | None) -> tuple[int, int]:
    """The index of this process and the number of processes; by default those of JAX.

    Raises:
      InputError: there is no such process.
    """
    index, count = process or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise InputError(f"there is no process {index} of {count}; number them from 0 to {count - 1}")
    return index, count


def check_apart_from(data: str, output: Path) -> None:
    """Check that the output folder does not lie inside the data."""
    if Path(data).exists() and output.resolve().is_relative_to(Path(data).resolve()):
        raise InputError(f"{output} lies inside the data; name an `output` elsewhere")


def check_only_shards(folder: Path) -> None:
    """Check that a folder of shards holds nothing else."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not re.fullmatch(r"\..*|\d{5,}-of-\d{5,}\.parquet", path.name):
            raise InputError(f"{folder} holds other files than shards, {path.name}; name another `output`")


def sum_of_ids(images: Images | Sequence[Mapping[str, Any]], more: Iterable[str] = ()) -> int:
    """Fingerprint of a source: the CRC of a thousand ids, evenly spaced, and of more texts."""
    numbers = {int(number) for number in np.linspace(0, len(images) - 1, 1000)}
    return zlib.crc32("\n".join([*(images[number]["id"] for number in sorted(numbers)), *more]).encode())


def parameter_files(files: ModelFiles) -> set[Path]:
    """The files of a model's config and parameters."""
    found = {files.config} if files.config else set()
    if files.params:
        return found.union(path for path in files.params.rglob("*") if path.is_file())
    return found.union(tensor.path for path in files.weights for tensor in open_tensors(path).values())


def sum_of_files(files: Iterable[Path]) -> int:
    """Fingerprint of a model: the CRC of its files; large files are sampled a thousand times."""
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


def _total(shards: Mapping[Path, range]) -> int:
    return sum(map(len, shards.values()))
