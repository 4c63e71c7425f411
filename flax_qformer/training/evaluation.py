"""Image-text retrieval: recall at 1, 5 and 10, plain and reranked by ITM."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_qformer.checkpoints.loading import as_dtype, check_heads, from_pretrained, locate_checkpoint
from flax_qformer.data.batches import evaluation_batches, open_source
from flax_qformer.data.sources import DataSettings, Source
from flax_qformer.errors import InputError
from flax_qformer.models.losses import similarities
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.parallel.mesh import BATCH, mesh_context
from flax_qformer.processing.processor import Processor
from flax_qformer.progress import Progress
from flax_qformer.training.settings import EvaluateSettings

logger = logging.getLogger(__name__)

RANKS = (1, 5, 10)

ENOUGH_IMAGES = 10 * max(RANKS)
"""Recall at k among N images is k / N by chance, and always 1 if N is at most k. With this many images, chance recall
is at most a tenth, and the standard error of a measured recall is at most 0.05."""


def evaluate(settings: EvaluateSettings) -> dict[str, float]:
    """Measure image-text retrieval with a model and data; the result is that of `Retrieval.evaluate`.

    Raises:
      InputError: a setting, the data or the model is unfit.
    """
    dtype = as_dtype(settings.dtype)
    files = locate_checkpoint(settings.model)
    model, params = from_pretrained(files, dtype, model_class=Blip2ForPreTraining)
    heads = ("vision_proj", "text_proj", "itm_head") if settings.rerank else ("vision_proj", "text_proj")
    check_heads(model.config, settings.model, *heads)
    processor = Processor.from_pretrained(files, config=model.config, tokenizer=settings.tokenizer)
    source = open_source(settings, "all" if settings.everything else "held_out").select(slice(settings.evaluate_on))
    examples = read_examples(source, processor, settings)
    figures = Retrieval(model, settings.batch_size).evaluate(params, examples, settings.rerank)
    warn_of_few_images(int(figures["images"]))
    return figures


def read_examples(
    source: Source, processor: Processor, settings: DataSettings
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Batches for `Retrieval`, each with the number of its rows that count. Shows progress."""
    with Progress(len(source), "example", "evaluating") as progress:
        for batch, captions in evaluation_batches(source, processor, settings):
            yield batch, len(captions)
            progress.advance(len(captions))


def warn_of_few_images(count: int) -> None:
    """Warn if recall among so few images says little about the model."""
    if count < ENOUGH_IMAGES:
        rank = max(RANKS)
        logger.warning(
            "recall@%d of %d images is %s; hold out at least %d images, and evaluate on all of them",
            rank,
            count,
            "always 1" if count <= rank else f"{rank / count:.2f} by chance",
            ENOUGH_IMAGES,
        )


@dataclass(frozen=True)
class RetrievalResult:
    """The recall of an evaluation, and its scores.

    Attributes:
      figures: recall by name, see `Retrieval.evaluate`.
      image_ids: ids of the images, in the order of the scores.
      text_ids: the id of each text's image.
      text_to_image: (texts, images) scores, reranked if the evaluation reranks.
    """

    figures: dict[str, float]
    image_ids: list[int]
    text_ids: list[int]
    text_to_image: np.ndarray

    def best_images(self, image_id: int, count: int) -> list[int]:
        """Ids of the images with the highest scores for an image's first text, best first."""
        scores = self.text_to_image[self.text_ids.index(image_id)]
        return [self.image_ids[column] for column in np.argsort(-scores, kind="stable")[:count]]


@dataclass(frozen=True)
class _Encoded:
    """Features of the images and texts of an evaluation.

    Attributes:
      image_ids: ids of the images.
      text_ids: the id of each text's image.
      images: (images, queries, width) features.
      texts: (texts, width) features.
      states: (images, tokens, width) outputs of the vision tower, for ITM; empty without reranking.
      tokens: (2, texts, length) token ids and attention mask.
    """

    image_ids: list[int]
    text_ids: list[int]
    images: np.ndarray
    texts: np.ndarray
    states: np.ndarray
    tokens: np.ndarray


class Retrieval:
    """Score images against texts with a model; its functions are compiled once."""

    def __init__(
        self, model: Blip2ForPreTraining, batch_size: int = DataSettings.batch_size, mesh: Mesh | None = None
    ) -> None:
        """With a mesh, batches are sharded over it, and all processes of a job must make the same calls together."""
        self._batch_size = batch_size
        self._sharding = None if mesh is None else NamedSharding(mesh, BATCH)
        replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())

        def apply(*arguments: Any, **details: Any) -> Any:
            with mesh_context(mesh):
                return model.apply(*arguments, **details)

        def image(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
            states = apply({"params": params}, pixels, method="encode_image").last_hidden_state
            return states, apply({"params": params}, encoder_hidden_states=states, method="image_features")

        def text(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return apply({"params": params}, ids, mask, method="text_features")

        def match(params: Any, states: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return apply({"params": params}, None, ids, mask, encoder_hidden_states=states, method="match")

        self._image, self._text, self._match = (
            jax.jit(function, out_shardings=replicated) for function in (image, text, match)
        )
        self._similarities = jax.jit(similarities)

    def evaluate(
        self,
        params: Any,
        batches: Iterable[tuple[Mapping[str, np.ndarray], int]],
        rerank: int = EvaluateSettings.rerank,
    ) -> dict[str, float]:
        """Recall at 1, 5 and 10 in both directions.

        Args:
          batches: pairs of a batch with pixel_values, input_ids, attention_mask and image_id, and the number of its
            rows that count; the rest are padding.
          rerank: candidates of each query that are reordered by similarity plus ITM score; 0 for none.

        Returns:
          Recall from 0 to 1 by name, such as `text_to_image/recall@1` and `image_to_text/reranked_recall@5`, and the
          number of `images` and `texts`.

        Raises:
          InputError: there are fewer than two images.
        """
        return self.search(params, batches, rerank).figures

    def search(
        self,
        params: Any,
        batches: Iterable[tuple[Mapping[str, np.ndarray], int]],
        rerank: int = EvaluateSettings.rerank,
    ) -> RetrievalResult:
        """As `evaluate`, with the scores."""
        data = self._encode(params, batches, bool(rerank))
        scores = self._all_similarities(data.images, data.texts)
        belongs = np.array(data.image_ids)[:, None] == np.array(data.text_ids)
        figures: dict[str, float] = {"images": len(data.image_ids), "texts": len(data.text_ids)}
        figures |= _recalls("image_to_text", scores, belongs) | _recalls("text_to_image", scores.T, belongs.T)
        if not rerank:
            return RetrievalResult(figures, data.image_ids, data.text_ids, scores.T)
        to_text = self._reranked(params, data.states, data.tokens, scores, rerank)
        to_image = self._reranked(params, data.states, data.tokens, scores.T, rerank, by_text=True)
        figures |= _recalls("image_to_text", to_text, belongs, "reranked_")
        figures |= _recalls("text_to_image", to_image, belongs.T, "reranked_")
        return RetrievalResult(figures, data.image_ids, data.text_ids, to_image)

    def _encode(
        self, params: Any, batches: Iterable[tuple[Mapping[str, np.ndarray], int]], keeps_states: bool
    ) -> _Encoded:
        """The features of all images and texts. An image with several captions is encoded once."""
        states, images, texts, tokens = [], [], [], []
        image_ids: dict[int, None] = {}  # in the order of `images`
        text_ids: list[int] = []
        waiting: list[np.ndarray] = []  # images of the next batch

        def encode_waiting() -> None:
            count = len(waiting)
            pixels = np.stack(waiting + waiting[-1:] * (self._batch_size - count))
            state, image = self._image(params, *self._place(pixels))
            if keeps_states:
                states.append(np.asarray(state)[:count])
            images.append(np.asarray(image)[:count])
            waiting.clear()

        for batch, count in batches:
            arrays = batch["input_ids"], batch["attention_mask"]
            texts.append(np.asarray(self._text(params, *self._place(*arrays)))[:count])
            tokens.append(np.stack(arrays)[:, :count])
            numbers = batch["image_id"][:count].tolist()
            text_ids += numbers
            for number, pixels in zip(numbers, batch["pixel_values"], strict=False):
                if number not in image_ids:
                    image_ids[number] = None
                    waiting.append(pixels.copy())  # a view would keep the whole batch in memory
                    if len(waiting) == self._batch_size:
                        encode_waiting()
        if waiting:
            encode_waiting()
        if len(image_ids) < 2:
            raise InputError(
                f"{len(image_ids)} images are too few for retrieval; add images, hold out more with `held_out`, or "
                "include the training images with `everything=True`"
            )
        return _Encoded(
            list(image_ids),
            text_ids,
            np.concatenate(images),
            np.concatenate(texts),
            np.concatenate(states) if keeps_states else np.zeros(0),
            np.concatenate(tokens, axis=1),
        )

    def _place(self, *arrays: np.ndarray) -> Sequence[Any]:
        if self._sharding is None:
            return arrays
        return [jax.make_array_from_callback(array.shape, self._sharding, array.__getitem__) for array in arrays]

    def _all_similarities(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        rows = [self._similarities(images[i : i + 256], texts) for i in range(0, len(images), 256)]
        return np.concatenate([np.asarray(row) for row in rows])

    def _reranked(
        self,
        params: Any,
        states: np.ndarray,
        tokens: np.ndarray,
        scores: np.ndarray,
        rerank: int,
        by_text: bool = False,
    ) -> np.ndarray:
        """Add the ITM score to the `rerank` best candidates of each query, and move the rest below them.

        scores: (queries, candidates) -> (queries, candidates) float64.
        """
        best = np.argsort(-scores, axis=1, kind="stable")[:, : min(rerank, scores.shape[1])]
        rows, columns = np.repeat(np.arange(len(scores)), best.shape[1]), best.reshape(-1)
        image, text = (columns, rows) if by_text else (rows, columns)
        # In float32, rounding after the subtraction would lose the order of the rest.
        result = scores.astype(np.float64) - 1e6
        with Progress(len(rows), "pair", "reranking images" if by_text else "reranking texts") as progress:
            for start in range(0, len(rows), self._batch_size):
                chunk = np.arange(start, start + self._batch_size).clip(max=len(rows) - 1)
                match = self._match(params, *self._place(states[image[chunk]], *tokens[:, text[chunk]]))
                result[rows[chunk], columns[chunk]] = scores[rows[chunk], columns[chunk]] + np.asarray(match)
                progress.advance(min(self._batch_size, len(rows) - start))
        return result


def _recalls(direction: str, scores: np.ndarray, belongs: np.ndarray, kind: str = "") -> dict[str, float]:
    """The share of rows with at least one match among their k best columns.

    scores: (queries, candidates), belongs: (queries, candidates) bool.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max(RANKS)]
    hits = np.take_along_axis(belongs, order, axis=1)
    return {f"{direction}/{kind}recall@{k}": float(hits[:, :k].any(axis=1).mean()) for k in RANKS}
