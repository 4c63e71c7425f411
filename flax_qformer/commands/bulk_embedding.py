"""Embeddings of all images of a source, as Parquet shards."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding

from flax_qformer.checkpoints.loading import as_dtype, from_pretrained, locate_checkpoint
from flax_qformer.checkpoints.model_files import TOKENIZER_FILES, find_tokenizer
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
from flax_qformer.compilation import compiler_options
from flax_qformer.data.batches import Images, image_batches, open_images
from flax_qformer.data.sources import DataSettings
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.parallel.mesh import BATCH, mesh_context, named_mesh
from flax_qformer.processing.processor import Processor

FIXED = ("model", "config", "tokenizer", "text", "truncate", "image_column", "dtype", "embedding_dtype", "shard_size")
"""Settings that determine the embeddings or their shards: a resumed run must not change them."""


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


class EmbeddedRows(NamedTuple):
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
    process_share(settings.process)
    source = DataSettings(settings.data, image_column=settings.image_column, num_workers=settings.num_workers)
    check_apart_from(settings.data, settings.output)
    check_only_shards(settings.output)
    images = open_images(source)
    shards = ShardedRows(
        folder=settings.output,
        content="embeddings",
        unit="image",
        count=len(images),
        shard_size=settings.shard_size,
        settings={name: getattr(settings, name) for name in FIXED},
        sum_of_ids=sum_of_ids(images),
        sum_of_files=sum_of_files(_model_files(settings)),
        process=settings.process,
    )
    mesh = named_mesh(settings.mesh, jax.local_devices())
    size = shards.batch_size(settings.batch_size, mesh)
    return shards.write_missing(
        size, partial(_embed, images, size=size, settings=settings, mesh=mesh), _embedding_table
    )


def _model_files(settings: EmbedSettings) -> set[Path]:
    source = locate_checkpoint(settings.model, settings.config)
    if settings.config:
        source = replace(source, config=Path(settings.config))
    files = parameter_files(source)
    if source.image_processor:
        files.add(source.image_processor)
    if settings.text is not None:
        tokenizer = find_tokenizer(settings.tokenizer) if settings.tokenizer else source.tokenizer
        files.update(tokenizer / name for name in TOKENIZER_FILES if tokenizer and (tokenizer / name).is_file())
    return files


def _embed(
    images: Images, batches: Sequence[range], *, size: int, settings: EmbedSettings, mesh: Mesh
) -> Generator[EmbeddedRows]:
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

    def parts() -> Generator[EmbeddedRows]:
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

    def part(batch: dict[str, Any], embeddings: jax.Array) -> EmbeddedRows:
        return EmbeddedRows(batch["id"], batch["error"], np.asarray(embeddings)[: len(batch["id"])])

    return parts()


def _embedding_table(start: int, parts: Sequence[EmbeddedRows]) -> Columns:
    """The columns of one shard."""
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
    return columns, {"shape": shape}
