"""Checks of a model's inputs, before it runs."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_qformer.errors import InputError, first_line
from flax_qformer.models.config import Blip2Config, Blip2QFormerConfig

PIXEL_LIMIT = 20.0
"""Normalised pixels stay within about 3 of zero; above this they are raw, such as 0 to 255."""


def as_array(name: str, value: Any) -> jax.Array:
    """An argument as an array.

    Raises:
      InputError: it is text, a mapping, or a list of rows of different lengths.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` is no array of numbers ({first_line(error)}); let `Processor` make it") from None


def optional_arrays(**values: Any) -> Iterator[jax.Array | None]:
    """Arguments as arrays, see `as_array`; None stays None."""
    return (None if value is None else as_array(name, value) for name, value in values.items())


def check_pixels(pixel_values: jax.Array | np.ndarray) -> None:
    """Refuse integers, and warn once per process of values that are not normalised.

    Under `jax.jit`, only the dtype is checked.

    Raises:
      InputError: the pixels are not floating point.
    """
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise InputError(
            f"`pixel_values` are {pixel_values.dtype}; they must be normalised floats: let `Processor` make them"
        )
    if isinstance(pixel_values, jax.core.Tracer):
        return
    if isinstance(pixel_values, jax.Array) and not pixel_values.is_fully_addressable:
        return
    if np.abs(np.asarray(pixel_values)).max(initial=0) > PIXEL_LIMIT:
        _warn_of_raw_pixels()


@functools.cache
def _warn_of_raw_pixels() -> None:
    warnings.warn(
        f"`pixel_values` lie beyond {PIXEL_LIMIT:g}, but normalised pixels lie within 3 of zero; let `Processor` make "
        "them",
        stacklevel=1,
    )


def check_cache(
    config: Blip2Config,
    image: jax.Array | None,
    input_ids: jax.Array | None,
    past_key_values: Any,
    image_key_values: Any,
    use_cache: bool,
) -> None:
    """Raise InputError if cached keys and values do not fit the model, the image or the text."""
    layers = config.qformer_config.num_hidden_layers
    if past_key_values is not None and len(past_key_values) != layers:
        raise InputError(f"`past_key_values` are of {len(past_key_values)} layers; the model has {layers}")
    rows_past, num_past = past_key_values[0][0].shape[:2] if past_key_values else (0, 0)
    if num_past and image is not None:
        raise InputError("`past_key_values` hold the queries: give the text that follows them, and no image")
    if use_cache and past_key_values is None and image is None and image_key_values is None:
        raise InputError("`use_cache` is for an image and what follows: give `pixel_values` or `encoder_hidden_states`")
    if num_past and input_ids is not None and rows_past != len(input_ids):
        raise InputError(f"{rows_past} rows of `past_key_values` and {len(input_ids)} texts; give as many of each")


def check_inputs(config: Blip2Config, image: jax.Array | None, input_ids: jax.Array | None) -> None:
    """Raise InputError if image embeddings and text do not fit the config or each other."""
    if image is None and input_ids is None:
        raise InputError("nothing to read: give `pixel_values` or `encoder_hidden_states`, `input_ids`, or both")
    if image is not None and (image.ndim != 3 or image.shape[-1] != config.vision_config.hidden_size):
        raise InputError(
            f"`encoder_hidden_states` have shape {image.shape}; "
            f"they must be (batch, image tokens, {config.vision_config.hidden_size})"
        )
    if input_ids is None:
        return
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise InputError(
            f"`input_ids` are {input_ids.dtype} of shape {input_ids.shape}; they must be whole numbers (batch, tokens)"
        )
    if image is None and not input_ids.shape[1]:
        raise InputError("`input_ids` have no tokens; give some, or an image")
    if image is not None and len(image) != len(input_ids):
        raise InputError(f"{len(image)} images and {len(input_ids)} texts: repeat one of them so that they pair up")


def check_length(config: Blip2QFormerConfig, length: int) -> None:
    """Raise InputError if a text has more tokens than the model has positions."""
    if length > config.max_position_embeddings:
        raise InputError(
            f"the text has {length} tokens, the model {config.max_position_embeddings} positions: truncate the text"
        )


def check_image_mask(mask: jax.Array, image: jax.Array, num_queries: int) -> None:
    batch, tokens, _ = image.shape
    if mask.shape not in ((batch, tokens), (batch, num_queries, tokens)):
        raise InputError(
            f"`encoder_attention_mask` has shape {mask.shape}; it must be ({batch}, {tokens}) over the image, or "
            f"({batch}, {num_queries}, {tokens}) over queries and image"
        )


def mask_over_tokens(mask: jax.Array, shape: tuple[int, int], num_queries: int, num_past: int) -> jax.Array:
    """Extend a mask over the text to cached tokens, queries and text. A mask over all of these is unchanged."""
    batch, total = shape
    text, keys = total - num_queries, num_past + total
    if mask.shape == (batch, text):
        return jnp.concatenate([jnp.ones((batch, keys - text)), mask], axis=1)
    if mask.shape not in ((batch, keys), (batch, total, keys)):
        raise InputError(
            f"`attention_mask` has shape {mask.shape}; it must be ({batch}, {text}) over the text, or "
            f"({batch}, {keys}) or ({batch}, {total}, {keys}) over {num_queries + num_past} queries and text"
        )
    return mask


def head_mask_per_layer(head_mask: jax.Array, config: Blip2QFormerConfig, batch: int) -> jax.Array:
    """Bring a head mask to (layers, batch or 1, heads, 1, 1)."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if head_mask.shape == (heads,):
        head_mask = jnp.broadcast_to(head_mask, (layers, heads))
    if head_mask.shape == (layers, heads):
        return head_mask[:, None, :, None, None]
    if head_mask.shape in ((layers, batch, heads, 1, 1), (layers, 1, heads, 1, 1)):
        return head_mask
    raise InputError(
        f"`head_mask` has shape {head_mask.shape}; it must be ({heads},), ({layers}, {heads}) "
        f"or ({layers}, {batch}, {heads}, 1, 1)"
    )
