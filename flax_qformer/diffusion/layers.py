"""Convolutional layers that the UNet, the ControlNet and the autoencoder share. Images are NHWC, kernels HWIO."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_qformer.models.layers import Block
from flax_qformer.parallel.mesh import keep_batch


class ImageBlock(Block):
    """A module with convolutions and group norms under the dtype policy."""

    @nn.nowrap
    def conv(
        self, name: str, channels: int, size: int = 3, stride: int = 1, padding: int | None = None, **details: Any
    ) -> nn.Conv:
        """A convolution, by default padded to keep the height and width at stride 1. Source: `nn.Conv2d`."""
        around = size // 2 if padding is None else padding
        return nn.Conv(channels, (size, size), stride, padding=around, name=name, **details, **self.policy)

    @nn.nowrap
    def group_norm(self, name: str, groups: int, eps: float) -> nn.GroupNorm:
        """A group norm with float32 statistics. Source: `nn.GroupNorm`."""
        return nn.GroupNorm(groups, epsilon=eps, use_fast_variance=False, name=name, **self.policy)


class ResnetBlock2D(ImageBlock):
    """Two convolutions and a residual; the time embedding is added in between. Source: diffusers `ResnetBlock2D`."""

    channels: int
    groups: int
    eps: float
    dropout: float = 0.0
    scale_shift: bool = False
    """Whether the time embedding scales and shifts the second norm (`time_embedding_norm="scale_shift"`)."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """x: (batch, height, width, any), time: (batch, width of the embedding) -> (batch, height, width, channels)."""
        y = nn.silu(self.group_norm("norm1", self.groups, self.eps)(x))
        y = self.conv("conv1", self.channels)(y)
        scale = shift = None
        if time is not None:
            features = self.channels * (2 if self.scale_shift else 1)
            projected = self.dense("time_emb_proj", (time.shape[-1],), (features,))(nn.silu(time))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(projected, 2, axis=-1)
            else:
                y += projected
        y = self.group_norm("norm2", self.groups, self.eps)(y)
        if scale is not None:
            y = y * (1 + scale) + shift
        y = nn.Dropout(self.dropout, deterministic=deterministic)(nn.silu(y))
        y = self.conv("conv2", self.channels)(y)
        if x.shape[-1] != self.channels:
            x = self.conv("conv_shortcut", self.channels, size=1)(x)
        return keep_batch(x + y)


class Downsample2D(ImageBlock):
    """A convolution of stride 2. Source: diffusers `Downsample2D`."""

    channels: int
    padding: int = 1
    """0 pads only below and on the right, as the autoencoder does."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, height, width, channels) -> (batch, height / 2, width / 2, channels), rounded as upstream does."""
        if not self.padding:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv("conv", self.channels, stride=2, padding=self.padding)(x)


class Upsample2D(ImageBlock):
    """Nearest-neighbour resize and a convolution. Source: diffusers `Upsample2D`."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """x: (batch, height, width, channels) -> twice the height and width, or `size`."""
        batch, height, width, channels = x.shape
        if size is None or size == (2 * height, 2 * width):
            # A broadcast, which XLA fuses into the convolution's input.
            x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
            x = x.reshape(batch, 2 * height, 2 * width, channels)
        else:
            rows, columns = (jnp.arange(new) * old // new for new, old in zip(size, (height, width), strict=True))
            x = x[:, rows][:, :, columns]
        return self.conv("conv", self.channels)(x)
