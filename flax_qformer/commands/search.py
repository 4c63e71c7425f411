"""Images that fit a text."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from flax_qformer.commands.options import (
    BATCH_SIZE,
    TEXT_MULTIPLE,
    Images,
    ModelOptions,
    Positive,
    Texts,
    batches,
    check_images,
    load_with_processor,
    texts_of,
)
from flax_qformer.errors import InputError
from flax_qformer.models.losses import similarities
from flax_qformer.models.pretraining import Blip2ForPreTraining


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ModelOptions):
    """Order images by how well they fit each text: the similarity of a stage-1 model's features.

    Attributes:
      images: image files.
      text: what to look for: one or more texts. (required)
      truncate: cut a text that is longer than the model reads, at its right end.
      top: images to name for each text.
      batch_size: images that run together.
    """

    images: Images = ()
    text: Texts = ()
    truncate: bool = False
    top: Positive = 5
    batch_size: Positive = BATCH_SIZE


def run(options: SearchOptions) -> None:
    check_images(options.images)
    queries = texts_of(options.text)
    if not queries:
        raise InputError("no text is named; put what to look for after `text`")
    model, params, processor = load_with_processor(options, Blip2ForPreTraining, "vision_proj", "text_proj")
    tokens = processor(text=queries, truncate=options.truncate, pad_to_multiple_of=TEXT_MULTIPLE)
    apply: Any = model.apply
    variables = {"params": params}
    texts = jax.jit(partial(apply, method="text_features"))(variables, **tokens)

    @jax.jit
    def score(variables: Any, pixels: jax.Array, texts: jax.Array) -> jax.Array:
        return similarities(apply(variables, pixels, method="image_features"), texts)

    found = []
    for rows in batches(len(options.images), options.batch_size):
        pixels = processor([options.images[row] for row in rows])["pixel_values"]
        found.append(np.asarray(score(variables, pixels, texts)))
    scores = np.concatenate(found)[: len(options.images)]
    for text, column in zip(queries, scores.T, strict=True):
        print(text)
        for row in np.argsort(-column)[: options.top]:
            print(f"  {column[row]:.3f}  {options.images[row]}")
