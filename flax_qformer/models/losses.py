"""The three losses that train a Q-Former, on arrays. Source: LAVIS `blip2_qformer.py`, arXiv 2301.12597."""

import jax
import jax.numpy as jnp

from flax_qformer.errors import InputError

LABEL_SMOOTHING = 0.1
SAME_IMAGE = -10000.0
"""Logit of a pair that must not be drawn as a negative."""


def similarities(image_features: jax.Array, text_features: jax.Array) -> jax.Array:
    """Similarity of each image with each text: the maximum over the image's queries.

    image_features: (images, queries, width), text_features: (texts, width), both normalised -> (images, texts).
    """
    return jnp.einsum("iqd,td->iqt", image_features, text_features).max(axis=1)


def contrastive_loss(logits: jax.Array, image_id: jax.Array | None = None) -> jax.Array:
    """ITC: the cross-entropy of finding an image's text and a text's image, with label smoothing.

    Args:
      logits: (batch, batch), images by texts: similarities over the temperature.
      image_id: (batch,) numbers of the images; pairs of the same image share the target equally.
    """
    same = _same_image(len(logits), image_id).astype(jnp.float32)
    # Reduce along columns: the rows of a transposed matrix would move between the chips.
    texts, images = (_cross_entropy(logits, same / same.sum(axis, keepdims=True), axis).mean() for axis in (1, 0))
    return (texts + images) / 2


def negative_logits(logits: jax.Array, image_id: jax.Array | None = None) -> jax.Array:
    """Logits (batch, batch) of drawing a column as a row's negative, or a row as a column's; never the same image."""
    return jnp.where(_same_image(len(logits), image_id), SAME_IMAGE, logits)


def matching_loss(logits: jax.Array) -> jax.Array:
    """ITM: the cross-entropy of telling pairs that match from pairs that do not.

    logits: (batch, 3, 2): the first of each three pairs matches; class 1 is a match.
    """
    scores = jax.nn.log_softmax(logits)
    return -jnp.stack([scores[:, 0, 1], scores[:, 1, 0], scores[:, 2, 0]]).mean()


def generation_loss(logits: jax.Array, input_ids: jax.Array, pad_token_id: int) -> jax.Array:
    """ITG: the cross-entropy of each token given the ones before it, with label smoothing; padding does not count.

    logits: (batch, T, vocabulary), input_ids: (batch, T).
    """
    labels = input_ids[:, 1:]
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    counts = labels != pad_token_id
    return (_cross_entropy(logits[:, :-1], targets) * counts).sum() / counts.sum()


def _same_image(size: int, image_id: jax.Array | None) -> jax.Array:
    if image_id is None:
        return jnp.eye(size, dtype=bool)
    if image_id.shape != (size,):
        raise InputError(f"`image_id` has shape {image_id.shape}; it must be ({size},), a number for each image")
    return image_id[:, None] == image_id[None, :]


def _cross_entropy(logits: jax.Array, targets: jax.Array, axis: int = -1) -> jax.Array:
    """Cross-entropy with smoothed targets, summed over the axis of the classes."""
    smoothed = (1 - LABEL_SMOOTHING) * targets + LABEL_SMOOTHING / logits.shape[axis]
    return -(smoothed * jax.nn.log_softmax(logits, axis)).sum(axis)
