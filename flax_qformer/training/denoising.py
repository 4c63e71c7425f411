"""The loss that trains a diffusion model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_qformer.diffusion.pipeline import BlipDiffusionPipeline
from flax_qformer.errors import InputError


def denoising_loss(
    pipe: BlipDiffusionPipeline,
    params: Mapping[str, Any],
    latents: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    input_ids: jax.Array,
    subject_embeddings: jax.Array | None = None,
) -> jax.Array:
    """Mean squared error of the predicted noise, or of the velocity if the scheduler's config says `v_prediction`.

    Differentiable in `params` (UNet and text encoder) and in `subject_embeddings`. Source: LAVIS `blip_diffusion.py`.

    Args:
      pipe: its modules, scheduler and `ctx_begin_pos` are used.
      params: a tree like `pipe.params`; only `unet` and `text_encoder` are read.
      latents: (batch, h, w, channels), scaled by the autoencoder's `scaling_factor`.
      noise: the same shape, standard normal.
      timesteps: (batch,) integers.
      input_ids: (batch, T) CLIP token ids, padded or not.
      subject_embeddings: (batch or 1, Q, D), inserted at `pipe.ctx_begin_pos`.

    Returns:
      A scalar in float32.

    Raises:
      InputError: the scheduler's config has another `prediction_type`.
    """
    kind = pipe.scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(f"prediction_type is {kind!r:.40}; a loss exists for 'epsilon' and 'v_prediction'")
    latents, noise = jnp.asarray(latents, jnp.float32), jnp.asarray(noise, jnp.float32)
    begin = None if subject_embeddings is None else pipe.ctx_begin_pos
    text = pipe.components["text_encoder"].apply(
        {"params": params["text_encoder"]}, input_ids, subject_embeddings, begin
    )
    noisy = pipe.scheduler.add_noise(None, latents, noise, timesteps)
    predicted = pipe.components["unet"].apply({"params": params["unet"]}, noisy, timesteps, text.last_hidden_state)
    target = noise if kind == "epsilon" else pipe.scheduler.get_velocity(None, latents, noise, timesteps)
    return jnp.mean(jnp.square(predicted.sample.astype(jnp.float32) - target))
