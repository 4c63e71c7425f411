"""How well images and texts find each other: recall, plain and reranked by ITM."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_qformer.errors import InputError
from flax_qformer.models.losses import similarities
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.parallel.mesh import BATCH, on
from flax_qformer.progress import Progress

logger = logging.getLogger(__name__)

RANKS = (1, 5, 10)

ENOUGH_IMAGES = 10 * max(RANKS)
"""Recall at k among N images is k / N by chance, and 1 whatever the model does where N is at most k. From this many
images on, chance finds a tenth at most, and a recall measured on them has a standard error of at most 0.05."""


def warn_of_few_images(count: int) -> None:
    """Warn that recall says little where an evaluation has few images."""
    if count < ENOUGH_IMAGES:
        rank = max(RANKS)
        logger.warning(
            "recall@%d of %d images is %s; hold out at least %d images, and evaluate on them all",
            rank,
            count,
            "always 1" if count <= rank else f"{rank / count:.2f} by chance",
            ENOUGH_IMAGES,
        )


@dataclass(frozen=True)
class Found:
    """What an evaluation finds.

    Attributes:
      figures: recall by name, see `Retrieval.evaluate`.
      image_ids: of the images, in the order of the scores.
      text_ids: of each text, the id of its image.
      text_to_image: (texts, images) scores, reranked if that was asked for.
    """

    figures: dict[str, float]
    image_ids: list[int]
    text_ids: list[int]
    text_to_image: np.ndarray

    def best_images(self, image_id: int, count: int) -> list[int]:
        """Ids of the images that fit best to the first text of an image, the best first."""
        scores = self.text_to_image[self.text_ids.index(image_id)]
        return [self.image_ids[column] for column in np.argsort(-scores, kind="stable")[:count]]


class Retrieval:
    """Compiled functions of a model that score images against texts."""

    def __init__(self, model: Blip2ForPreTraining, batch_size: int = 64, mesh: Mesh | None = None) -> None:
        """With a mesh, batches are split over it; of several processes, all ask for the same together."""
        self._batch_size = batch_size
        self._split = None if mesh is None else NamedSharding(mesh, BATCH)
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

        def apply(*arguments: Any, **details: Any) -> Any:
            with on(mesh):
                return model.apply(*arguments, **details)

        def image(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
            states = apply({"params": params}, pixels, method="encode_image").last_hidden_state
            return states, apply({"params": params}, encoder_hidden_states=states, method="image_features")

        def text(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return apply({"params": params}, ids, mask, method="text_features")

        def match(params: Any, states: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return apply({"params": params}, None, ids, mask, encoder_hidden_states=states, method="match")

        self._image, self._text, self._match = (
            jax.jit(function, out_shardings=whole) for function in (image, text, match)
        )
        self._similarities = jax.jit(similarities)

    def evaluate(
        self, params: Any, batches: Iterable[tuple[Mapping[str, np.ndarray], int]], rerank: int = 16
    ) -> dict[str, float]:
        """Recall at 1, 5 and 10 in both directions, of pairs of images and texts.

        Args:
          batches: a batch with pixel_values, input_ids, attention_mask and image_id, and how many of its rows count.
          rerank: so many candidates of each query are ordered anew by similarity plus ITM score; 0 leaves that out.

        Returns:
          Shares, as `text_to_image/recall@1`, `image_to_text/reranked_recall@5`, and the numbers of images and texts.

        Raises:
          InputError: there are fewer than two images.
        """
        return self.search(params, batches, rerank).figures

    def search(self, params: Any, batches: Iterable[tuple[Mapping[str, np.ndarray], int]], rerank: int = 16) -> Found:
        """As `evaluate`, with the scores that the recall is of."""
        states, images, texts, tokens = [], [], [], []
        image_ids: dict[int, None] = {}  # in the order of `images`
        text_ids: list[int] = []
        # However many captions an image has, it goes through the model once; those that wait become a batch.
        waiting: list[np.ndarray] = []

        def read_images() -> None:
            count = len(waiting)
            pixels = np.stack(waiting + waiting[-1:] * (self._batch_size - count))
            state, image = self._image(params, *self._place(pixels))
            if rerank:
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
                    waiting.append(pixels.copy())  # not to keep the whole batch
                    if len(waiting) == self._batch_size:
                        read_images()
        if waiting:
            read_images()
        if len(image_ids) < 2:
            raise InputError(
                f"{len(image_ids)} images are too few to search among; add images, hold out more by `held_out`, or "
                "take those for training as well by `everything=True`"
            )
        scores = self._all_similarities(np.concatenate(images), np.concatenate(texts))
        belongs = np.array(list(image_ids))[:, None] == np.array(text_ids)
        figures: dict[str, float] = {"images": len(image_ids), "texts": len(text_ids)}
        figures |= _recalls("image_to_text", scores, belongs) | _recalls("text_to_image", scores.T, belongs.T)
        if rerank:
            arrays = (np.concatenate(states), np.concatenate(tokens, axis=1))
            to_text = self._reranked(params, *arrays, scores, rerank)
            to_image = self._reranked(params, *arrays, scores.T, rerank, by_text=True)
            figures |= _recalls("image_to_text", to_text, belongs, "reranked_")
            figures |= _recalls("text_to_image", to_image, belongs.T, "reranked_")
        return Found(figures, list(image_ids), text_ids, to_image if rerank else scores.T)

    def _place(self, *arrays: np.ndarray) -> Sequence[Any]:
        if self._split is None:
            return arrays
        return [jax.make_array_from_callback(array.shape, self._split, array.__getitem__) for array in arrays]

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
        """scores: (queries, candidates) -> the same, the best of each row raised above the rest by their ITM score."""
        best = np.argsort(-scores, axis=1, kind="stable")[:, : min(rerank, scores.shape[1])]
        rows, columns = np.repeat(np.arange(len(scores)), best.shape[1]), best.reshape(-1)
        image, text = (columns, rows) if by_text else (rows, columns)
        # In float32 the rest would lose its order.
        result = scores.astype(np.float64) - 1e6
        with Progress(len(rows), "pair", "reranking images" if by_text else "reranking texts") as progress:
            for start in range(0, len(rows), self._batch_size):
                chunk = np.arange(start, start + self._batch_size).clip(max=len(rows) - 1)
                match = self._match(params, *self._place(states[image[chunk]], *tokens[:, text[chunk]]))
                result[rows[chunk], columns[chunk]] = scores[rows[chunk], columns[chunk]] + np.asarray(match)
                progress.advance(min(self._batch_size, len(rows) - start))
        return result


def _recalls(direction: str, scores: np.ndarray, belongs: np.ndarray, kind: str = "") -> dict[str, float]:
    """The share of rows that have what belongs to them among the best."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max(RANKS)]
    hits = np.take_along_axis(belongs, order, axis=1)
    return {f"{direction}/{kind}recall@{k}": float(hits[:, :k].any(axis=1).mean()) for k in RANKS}
