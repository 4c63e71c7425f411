"""The denoising loop as one compiled program, and the programs before and after it.

Prompts, subjects, seeds, the guidance scale and the number of steps are arguments of the loop, so none of them needs
another compilation.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from flax_qformer.compilation import compiler_options
from flax_qformer.diffusion.controlnet import ControlNetOutput
from flax_qformer.parallel.mesh import BATCH, interleaved, keep_batch

Array: TypeAlias = jax.Array | np.ndarray


@flax.struct.dataclass
class Conditions:
    """Inputs of the denoising loop that are the same in all steps.

    Attributes:
      text: (batch, T, D), from the text encoder.
      negative: the negative prompts, same shape. None turns guidance off.
      guidance_scale: scalar float32.
      control_images: for each ControlNet (batch or 1, height, width, 3), in [0, 1].
      control_scales: (steps, ControlNets) float32, the factor on a ControlNet's residuals in each step.
      seed: scalar uint32, from which schedulers that add noise derive the key of each step.
    """

    text: jax.Array
    negative: jax.Array | None
    guidance_scale: ArrayLike
    control_images: tuple[Array, ...]
    control_scales: Array
    seed: ArrayLike


@functools.cache
def denoising_loop(unet: Any, controlnets: tuple[Any, ...], scheduler: Any) -> Callable[..., tuple[jax.Array, Any]]:
    """The compiled loop (params, conditions, latents, state, first, last) -> latents and state after these steps.

    params: trees `unet` and, for each ControlNet, one in the tuple `controlnet`.
    latents: (batch, h, w, channels) float32.
    state: of the scheduler, padded to a fixed length.
    first, last: the range of steps; one call can run all steps, or several calls some each.
    """

    def run(
        params: dict[str, Any],
        conditions: Conditions,
        latents: jax.Array,
        state: Any,
        first: jax.Array,
        last: jax.Array,
    ) -> tuple[jax.Array, Any]:
        text, negative = conditions.text, conditions.negative
        is_guided = negative is not None
        # A picture's negative and positive rows are adjacent, so they stay on one device.
        text = text if negative is None else interleaved(negative, text)
        key = jax.random.key(conditions.seed)

        def step(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            latents, state = carry
            timestep = state.timesteps[i]
            sample = scheduler.scale_model_input(state, latents, timestep)
            sample = interleaved(sample, sample) if is_guided else sample
            control = _control(controlnets, params, conditions, i, sample, timestep, text)
            residuals = () if control is None else (control.down_block_res_samples, control.mid_block_res_sample)
            predicted = unet.apply({"params": params["unet"]}, sample, timestep, text, *residuals).sample
            predicted = predicted.astype(jnp.float32)
            if is_guided:
                away, towards = jnp.moveaxis(predicted.reshape(-1, 2, *predicted.shape[1:]), 1, 0)
                predicted = away + conditions.guidance_scale * (towards - away)
            output = scheduler.step(state, predicted, timestep, latents, jax.random.fold_in(key, i))
            return keep_batch(output.prev_sample), output.state

        latents, state = jax.lax.fori_loop(first, last, step, (latents, state))
        if jax.sharding.get_abstract_mesh().auto_axes:
            state = jax.lax.with_sharding_constraint(state, state_specs(state, latents.shape))
        return latents, state

    return jax.jit(run, compiler_options=compiler_options())


def state_specs(state: Any, shape: tuple[int, ...]) -> Any:
    """Partition specs of a scheduler's state: its samples are sharded by batch, the rest is replicated.

    shape: (batch, h, w, channels), of the latents.
    """

    def of(leaf: Any) -> PartitionSpec:
        leading = leaf.ndim - len(shape)
        return PartitionSpec(*[None] * leading, *BATCH) if leaf.shape[leading:] == shape else PartitionSpec()

    return jax.tree.map(of, state)


def _control(
    controlnets: tuple[Any, ...],
    params: dict[str, Any],
    conditions: Conditions,
    i: jax.Array,
    sample: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
) -> ControlNetOutput | None:
    """The sum of the ControlNets' residuals, or None without ControlNets."""
    outputs = []
    for number, controlnet in enumerate(controlnets):
        image = conditions.control_images[number]
        image = jnp.broadcast_to(image, (len(conditions.text), *image.shape[1:]))
        image = image if conditions.negative is None else interleaved(image, image)
        tree = {"params": params["controlnet"][number]}
        outputs.append(controlnet.apply(tree, sample, timestep, text, image, conditions.control_scales[i, number]))
    return jax.tree.map(lambda *residuals: sum(residuals), *outputs) if outputs else None


@partial(jax.jit, static_argnames=("text_encoder", "begin", "repeats"))
def encode_prompts(
    text_encoder: Any,
    params: dict[str, Any],
    input_ids: jax.Array,
    subjects: jax.Array,
    negative_ids: jax.Array | None,
    *,
    begin: int,
    repeats: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Encode prompts with subject vectors and negative prompts without; each row is repeated `repeats` times.

    input_ids: (prompts, T), subjects: (prompts, Q, D), negative_ids: (prompts, T + Q).

    Returns:
      The prompts' states and the negative prompts' states, (prompts * repeats, T + Q, D) each; None without
      `negative_ids`.
    """

    def encode(ids: jax.Array, *subject: Any) -> jax.Array:
        states = text_encoder.apply({"params": params}, ids, *subject).last_hidden_state
        return keep_batch(jnp.repeat(states, repeats, axis=0))

    negative = None if negative_ids is None else encode(negative_ids)
    return encode(input_ids, subjects, begin), negative


@partial(jax.jit, static_argnames=("shape",))
def draw_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (keys, *shape), a sample from each key, so that a picture does not depend on its batch."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@functools.cache
def decoder(vae: Any) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
    """The compiled function (params, latents) -> pictures (batch, height, width, 3) float32 in [0, 1]."""

    def decode(params: dict[str, Any], latents: jax.Array) -> jax.Array:
        pixels = vae.apply({"params": params}, latents / vae.config.scaling_factor, method="decode")
        return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)

    return jax.jit(decode, compiler_options=compiler_options())
