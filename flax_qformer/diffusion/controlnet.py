"""The ControlNet: a copy of the UNet's first half that reads a picture, such as edges, and steers the UNet with it."""

from dataclasses import dataclass
from itertools import pairwise

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_qformer.diffusion.layers import ImageBlock
from flax_qformer.diffusion.unet import EncoderConfig, LatentEncoder
from flax_qformer.errors import InputError


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """A ControlNet for Stable Diffusion 1.x and 2.x. Source: diffusers 0.32.2 `ControlNetModel`."""

    FIXED = {**EncoderConfig.FIXED, "global_pool_conditions": (False,)}

    layers_per_block: int = 2
    conditioning_channels: int = 3
    num_attention_heads: int | tuple[int, ...] | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    def _check(self) -> None:
        if self.num_attention_heads is not None:
            self._check_numbers("num_attention_heads")
            self._check_length("num_attention_heads")
        self._check_numbers("conditioning_channels", "conditioning_embedding_out_channels")
        if not self.conditioning_embedding_out_channels:
            self._refuse("conditioning_embedding_out_channels", "at least one number")
        if self.mid_block_type is None:
            self._refuse("mid_block_type", "that of a mid block")
        self._check_choices("controlnet_conditioning_channel_order", ("rgb", "bgr"))
        super()._check()

    @property
    def heads(self) -> int | tuple[int, ...]:
        return self.num_attention_heads or self.attention_head_dim

    @property
    def conditioning_scale(self) -> int:
        """Pixels of the conditioning picture along one side of a latent pixel."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


@flax.struct.dataclass
class ControlNetOutput:
    """What the UNet adds to its feature maps; those of several ControlNets are summed.

    Attributes:
      down_block_res_samples: one for each skip connection, (batch, height, width, channels).
      mid_block_res_sample: for the mid block's output.
    """

    down_block_res_samples: tuple[jax.Array, ...]
    mid_block_res_sample: jax.Array


class ConditioningEmbedding(ImageBlock):
    """Reduces a picture to the size of the latents. Source: diffusers `ControlNetConditioningEmbedding`."""

    config: ControlNetConfig

    @nn.compact
    def __call__(self, picture: jax.Array) -> jax.Array:
        """picture: (batch, scale * height, scale * width, any) -> (batch, height, width, first of block_out_channels).

        The scale is `ControlNetConfig.conditioning_scale`.
        """
        widths = self.config.conditioning_embedding_out_channels
        x = nn.silu(self.conv("conv_in", widths[0])(picture))
        for i, (width, next_width) in enumerate(pairwise(widths)):
            x = nn.silu(self.conv(f"blocks_{2 * i}", width)(x))
            x = nn.silu(self.conv(f"blocks_{2 * i + 1}", next_width, stride=2)(x))
        return self.conv("conv_out", self.config.block_out_channels[0], kernel_init=nn.initializers.zeros)(x)


class ControlNetModel(LatentEncoder):
    """Source: diffusers 0.32.2 `ControlNetModel`; arXiv 2302.05543.

    Example::

        controlnet = ControlNetModel(config)
        residuals = controlnet.apply({"params": params}, latents, timestep, encoder_hidden_states, edges)
    """

    config: ControlNetConfig

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timestep: ArrayLike,
        encoder_hidden_states: jax.Array,
        controlnet_cond: jax.Array,
        conditioning_scale: ArrayLike = 1.0,
    ) -> ControlNetOutput:
        """Compute the UNet's additional residuals.

        Args:
          sample: (batch, height, width, in_channels), noisy latents.
          timestep: one for all, or (batch,).
          encoder_hidden_states: (batch, tokens, cross_attention_dim), the text.
          controlnet_cond: (batch, scale * height, scale * width, conditioning_channels), pixels in [0, 1]; the scale is
            `ControlNetConfig.conditioning_scale`.
          conditioning_scale: factor on all residuals.

        Raises:
          InputError: a shape is wrong.
        """
        config: ControlNetConfig = self.config
        self.check_inputs(sample, encoder_hidden_states)
        batch, height, width, _ = sample.shape
        scale = config.conditioning_scale
        expected = (batch, scale * height, scale * width, config.conditioning_channels)
        if controlnet_cond.shape != expected:
            raise InputError(
                f"controlnet_cond has the shape {controlnet_cond.shape}; for these latents it is {expected}"
            )
        if config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond[..., ::-1]
        time = self.embed_time(timestep, batch, 4 * config.block_out_channels[0])
        x = self.conv("conv_in", config.block_out_channels[0])(sample)
        x += ConditioningEmbedding(config, name="controlnet_cond_embedding", **self.policy)(controlnet_cond)
        encoded = self.encode(x, time, encoder_hidden_states)

        def residual(name: str, features: jax.Array) -> jax.Array:
            # Zero at first, so that an untrained ControlNet changes nothing.
            zero_conv = self.conv(name, features.shape[-1], size=1, kernel_init=nn.initializers.zeros)
            features = zero_conv(features)
            return features * jnp.asarray(conditioning_scale, features.dtype)

        down = tuple(residual(f"controlnet_down_blocks_{i}", skip) for i, skip in enumerate(encoded.skips))
        return ControlNetOutput(down, residual("controlnet_mid_block", encoded.middle))
