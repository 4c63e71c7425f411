"""Captions of images."""

import argparse
from typing import Any

import jax
import numpy as np

from flax_qformer.commands.options import (
    add_images,
    add_model,
    add_quiet,
    batches,
    load_with_processor,
    positive,
    seed,
)
from flax_qformer.errors import InputError
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.progress import print_line


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "caption",
        help="captions of images",
        description="Write a caption for each image, with a stage-1 model: by beam search, or drawn with --nucleus.",
    )
    command.set_defaults(run=run)
    add_images(command)
    way = command.add_mutually_exclusive_group()
    way.add_argument(
        "--num-beams", type=positive, default=3, metavar="N", help="beams of the search (default: %(default)s)"
    )
    way.add_argument("--nucleus", action="store_true", help="draw words at random instead of beam search")
    command.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="with --nucleus: draw from the likeliest words with this total probability (default: 0.9)",
    )
    command.add_argument("--seed", type=seed, metavar="N", help="with --nucleus: seed of the random words (default: 0)")
    command.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="most tokens of a caption (default: 30, or as many as the model has positions)",
    )
    command.add_argument(
        "--min-length", type=positive, default=1, metavar="N", help="fewest tokens (default: %(default)s)"
    )
    add_model(command)
    add_quiet(command)


def run(options: argparse.Namespace) -> None:
    if not options.nucleus and (options.top_p is not None or options.seed is not None):
        raise InputError("--top-p and --seed are for --nucleus, which draws words; add it, or leave them out")
    model, params, processor = load_with_processor(options, Blip2ForPreTraining, "lm_head")
    end = processor.tokenizer.sep_token_id
    max_length = options.max_length or min(30, model.config.qformer_config.max_position_embeddings)
    if options.min_length > max_length:
        raise InputError(f"--min-length {options.min_length} is above --max-length, {max_length}; make it less")

    apply: Any = model.apply

    @jax.jit
    def write(params: Any, pixels: jax.Array, key: jax.Array) -> jax.Array:
        return apply(
            {"params": params},
            pixels,
            eos_token_id=end,
            use_nucleus_sampling=options.nucleus,
            num_beams=options.num_beams,
            max_length=max_length,
            min_length=options.min_length,
            top_p=0.9 if options.top_p is None else options.top_p,
            method="caption",
            rngs={"sampling": key},
        )

    for rows in batches(len(options.images), options.batch_size):
        pixels = processor([options.images[row] for row in rows])["pixel_values"]
        key = jax.random.fold_in(jax.random.key(options.seed or 0), rows[0])
        texts = processor.tokenizer.batch_decode(np.asarray(write(params, pixels, key)), skip_special_tokens=True)
        for row, text in dict(zip(rows, texts, strict=True)).items():
            print_line(f"{options.images[row]}: {text}")
