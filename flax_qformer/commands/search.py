"""Images that fit a text."""

import argparse
from functools import partial
from typing import Any

import jax
import numpy as np

from flax_qformer.commands.options import (
    TEXT_MULTIPLE,
    add_images,
    add_model,
    add_quiet,
    batches,
    load_with_processor,
    positive,
)
from flax_qformer.models.losses import similarities
from flax_qformer.models.pretraining import Blip2ForPreTraining


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "search",
        help="images that fit a text",
        description="Order images by how well they fit each text: the similarity of a stage-1 model's features.",
    )
    command.set_defaults(run=run)
    add_images(command)
    command.add_argument("--text", nargs="+", action="extend", required=True, metavar="TEXT", help="what to look for")
    command.add_argument(
        "--truncate", action="store_true", help="cut a text that is longer than the model reads, at its right end"
    )
    command.add_argument(
        "--top", type=positive, default=5, metavar="N", help="images to name for each text (default: %(default)s)"
    )
    add_model(command)
    add_quiet(command)


def run(options: argparse.Namespace) -> None:
    model, params, processor = load_with_processor(options, Blip2ForPreTraining, "vision_proj", "text_proj")
    tokens = processor(text=options.text, truncate=options.truncate, pad_to_multiple_of=TEXT_MULTIPLE)
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
    for text, column in zip(options.text, scores.T, strict=True):
        print(text)
        for row in np.argsort(-column)[: options.top]:
            print(f"  {column[row]:.3f}  {options.images[row]}")
