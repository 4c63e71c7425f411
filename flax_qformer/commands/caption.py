"""Captions of images."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from flax_qformer.commands.options import (
    BATCH_SIZE,
    Images,
    ModelOptions,
    Positive,
    batches,
    check_images,
    load_with_processor,
    whole_number,
)
from flax_qformer.errors import InputError
from flax_qformer.models.captioning import MAX_LENGTH, MIN_LENGTH, NUM_BEAMS, TOP_P
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.progress import print_line

WAY = tyro.conf.create_mutex_group(required=False, title="beam search or random words")
SEED = 0


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(ModelOptions):
    """Write a caption for each image with a stage-1 model, by beam search or, with --nucleus, with random words.

    Attributes:
      images: image files.
      num_beams: beams of the search.
      nucleus: draw words at random instead of beam search.
      top_p: with --nucleus: draw from the likeliest words with this total probability.
      seed: with --nucleus: seed of the random words.
      max_length: largest number of tokens of a caption.
      min_length: smallest number of tokens of a caption.
      batch_size: images that run together.
    """

    images: Images = ()
    num_beams: Annotated[Positive, WAY] = NUM_BEAMS
    nucleus: Annotated[bool, WAY] = False
    top_p: Annotated[float | None, tyro.conf.arg(metavar="P", help_behavior_hint=f"(default: {TOP_P})")] = None
    seed: Annotated[int | None, whole_number(0, 2**32 - 1), tyro.conf.arg(help_behavior_hint=f"(default: {SEED})")] = (
        None
    )
    max_length: Annotated[
        int | None,
        whole_number(1),
        tyro.conf.arg(help_behavior_hint=f"(default: {MAX_LENGTH}, or as many as the model has positions)"),
    ] = None
    min_length: Annotated[
        int | None,
        whole_number(1),
        tyro.conf.arg(help_behavior_hint=f"(default: {MIN_LENGTH}, or --max-length if that is less)"),
    ] = None
    batch_size: Positive = BATCH_SIZE


def run(options: CaptionOptions) -> None:
    check_images(options.images)
    if not options.nucleus and (options.top_p is not None or options.seed is not None):
        raise InputError("--top-p and --seed are for --nucleus, which draws words; add it, or leave them out")
    model, params, processor = load_with_processor(options, Blip2ForPreTraining, "lm_head")
    end = processor.tokenizer.sep_token_id
    max_length = options.max_length or min(MAX_LENGTH, model.config.qformer_config.max_position_embeddings)
    min_length = options.min_length or min(MIN_LENGTH, max_length)
    if min_length > max_length:
        raise InputError(f"--min-length {min_length} is above --max-length, {max_length}; make it less")

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
            min_length=min_length,
            top_p=TOP_P if options.top_p is None else options.top_p,
            method="caption",
            rngs={"sampling": key},
        )

    for rows in batches(len(options.images), options.batch_size):
        pixels = processor([options.images[row] for row in rows])["pixel_values"]
        key = jax.random.fold_in(jax.random.key(SEED if options.seed is None else options.seed), rows[0])
        texts = processor.tokenizer.batch_decode(np.asarray(write(params, pixels, key)), skip_special_tokens=True)
        for row, text in dict(zip(rows, texts, strict=True)).items():
            print_line(f"{options.images[row]}: {text}")
