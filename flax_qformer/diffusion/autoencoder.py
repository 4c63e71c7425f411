"""Pixels to latents and back: Stable Diffusion's autoencoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flax_qformer.diffusion.config import PartConfig
from flax_qformer.diffusion.layers import Downsample2D, ImageBlock, ResnetBlock2D, Upsample2D
from flax_qformer.errors import InputError
from flax_qformer.models.attention import dot_product_attention
from flax_qformer.parallel.mesh import keep_batch

EPS = 1e-6
"""Epsilon of the autoencoder's group norms."""

OVERLAP = 4
"""Neighbouring tiles overlap by their side divided by this."""


@dataclass(frozen=True)
class AutoencoderConfig(PartConfig):
    """Config of `AutoencoderKL`. Names and defaults are those of diffusers 0.32.2."""

    FIXED: ClassVar = {
        "act_fn": ("silu", "swish"),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    IGNORED: ClassVar = frozenset({"force_upcast"})

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if not levels or getattr(self, name) != (block,) * levels:
                self._refuse(name, f"{block!r} for each of the {levels} block_out_channels")
        self._check_numbers("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        self._check_numbers("block_out_channels")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            self._refuse("block_out_channels", f"multiples of norm_num_groups {self.norm_num_groups}")

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


@flax.struct.dataclass
class DiagonalGaussianDistribution:
    """The distribution of a picture's latents. mean, logvar: (batch, height, width, latent_channels), not scaled."""

    mean: jax.Array
    logvar: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Latents drawn with a key of `jax.random`."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> jax.Array:
        """The most likely latents."""
        return self.mean


class AttentionBlock(ImageBlock):
    """Self-attention of one head over all pixels. Source: diffusers `Attention`, before 0.18 `AttentionBlock`."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, height, width, channels) -> the same shape."""
        batch, height, width, channels = x.shape
        heads = (1, channels)
        tokens = self.group_norm("group_norm", self.groups, EPS)(x).reshape(batch, height * width, channels)
        query, key, value = (self.dense(name, (channels,), heads)(tokens) for name in ("to_q", "to_k", "to_v"))
        context, _ = dot_product_attention(query * channels**-0.5, key, value)
        return keep_batch(x + self.dense("to_out_0", heads, (channels,))(context).reshape(x.shape))


class UNetMidBlock2D(ImageBlock):
    """Two residual blocks with attention in between. Source: diffusers `UNetMidBlock2D`."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, height, width, channels) -> the same shape."""
        groups, channels = self.config.norm_num_groups, self.config.block_out_channels[-1]
        x = ResnetBlock2D(channels, groups, EPS, name="resnets_0", **self.policy)(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(groups, name="attentions_0", **self.policy)(x)
        return ResnetBlock2D(channels, groups, EPS, name="resnets_1", **self.policy)(x)


class DownEncoderBlock2D(ImageBlock):
    """Residual blocks, and a downsampling except in the last block. Source: diffusers `DownEncoderBlock2D`."""

    config: AutoencoderConfig
    level: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, height, width, any) -> (batch, height / 2, width / 2, channels of the level)."""
        c, channels = self.config, self.config.block_out_channels[self.level]
        for i in range(c.layers_per_block):
            x = ResnetBlock2D(channels, c.norm_num_groups, EPS, name=f"resnets_{i}", **self.policy)(x)
        if self.level < len(c.block_out_channels) - 1:
            x = Downsample2D(channels, padding=0, name="downsamplers_0", **self.policy)(x)
        return x


class UpDecoderBlock2D(ImageBlock):
    """Residual blocks, and an upsampling except at the highest resolution. Source: diffusers `UpDecoderBlock2D`."""

    config: AutoencoderConfig
    level: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, height, width, any) -> (batch, 2 height, 2 width, channels of the level)."""
        c, channels = self.config, self.config.block_out_channels[self.level]
        for i in range(c.layers_per_block + 1):
            x = ResnetBlock2D(channels, c.norm_num_groups, EPS, name=f"resnets_{i}", **self.policy)(x)
        if self.level:
            x = Upsample2D(channels, name="upsamplers_0", **self.policy)(x)
        return x


class Encoder(ImageBlock):
    """Source: diffusers `Encoder`."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, height, width, in_channels) -> (batch, latent height, latent width, 2 latent_channels)."""
        c = self.config
        x = self.conv("conv_in", c.block_out_channels[0])(x)
        for level in range(len(c.block_out_channels)):
            x = DownEncoderBlock2D(c, level, name=f"down_blocks_{level}", **self.policy)(x)
        x = UNetMidBlock2D(c, name="mid_block", **self.policy)(x)
        x = nn.silu(self.group_norm("conv_norm_out", c.norm_num_groups, EPS)(x))
        return self.conv("conv_out", 2 * c.latent_channels)(x)


class Decoder(ImageBlock):
    """Source: diffusers `Decoder`."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, latent height, latent width, latent_channels) -> (batch, height, width, out_channels)."""
        c, last = self.config, len(self.config.block_out_channels) - 1
        x = self.conv("conv_in", c.block_out_channels[last])(x)
        x = UNetMidBlock2D(c, name="mid_block", **self.policy)(x)
        for i in range(last + 1):
            x = UpDecoderBlock2D(c, last - i, name=f"up_blocks_{i}", **self.policy)(x)
        x = nn.silu(self.group_norm("conv_norm_out", c.norm_num_groups, EPS)(x))
        return self.conv("conv_out", c.out_channels)(x)


class AutoencoderKL(ImageBlock):
    """Stable Diffusion's autoencoder. Source: diffusers `AutoencoderKL`.

    Pictures with a side above `tile_above` pixels are encoded and decoded in overlapping tiles of the config's
    `sample_size`, one tile at a time, as upstream does after `enable_tiling()`. `config.scaling_factor` is not applied:
    the UNet works on `scaling_factor * latents`.
    """

    config: AutoencoderConfig
    tile_above: int = 1024

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, **self.policy)
        self.decoder = Decoder(c, **self.policy)
        if c.use_quant_conv:
            self.quant_conv = self.conv("quant_conv", 2 * c.latent_channels, size=1)
        if c.use_post_quant_conv:
            self.post_quant_conv = self.conv("post_quant_conv", c.latent_channels, size=1)

    def encode(self, pixels: jax.Array) -> DiagonalGaussianDistribution:
        """The distribution of the latents of pictures.

        Args:
          pixels: (batch, height, width, in_channels) in [-1, 1].

        Returns:
          mean and log variance, (batch, height / downscale, width / downscale, latent_channels), rounded down.

        Raises:
          InputError: the shape or dtype is wrong, or the picture needs tiles and the sizes do not allow them.
        """
        c = self.config
        _check_images("pixels", pixels, c.in_channels, smallest=c.downscale)
        if max(pixels.shape[1:3]) > self.tile_above and not self.is_initializing():
            tile = self._latent_tile()
            if any(side % c.downscale for side in pixels.shape[1:3]):
                raise InputError(
                    f"the picture has {pixels.shape[1]}x{pixels.shape[2]} pixels; above {self.tile_above} both sides "
                    f"must be multiples of {c.downscale}"
                )
            moments = self._in_tiles(AutoencoderKL._moments, pixels, tile * c.downscale, tile)
        else:
            moments = self._moments(pixels)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return DiagonalGaussianDistribution(mean, jnp.clip(logvar, -30, 20))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pictures from latents.

        Args:
          latents: (batch, height, width, latent_channels), not scaled.

        Returns:
          (batch, height * downscale, width * downscale, out_channels), about [-1, 1].

        Raises:
          InputError: the shape or dtype is wrong, or the picture needs tiles and `sample_size` does not allow them.
        """
        c = self.config
        _check_images("latents", latents, c.latent_channels, smallest=1)
        if max(latents.shape[1:3]) * c.downscale > self.tile_above:
            tile = self._latent_tile()
            return self._in_tiles(AutoencoderKL._pixels, latents, tile, tile * c.downscale)
        return self._pixels(latents)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encode and decode: pixels (batch, height, width, in_channels) -> (batch, height, width, out_channels)."""
        return self.decode(self.encode(pixels).mode())

    def _moments(self, pixels: jax.Array) -> jax.Array:
        moments = self.encoder(pixels)
        return self.quant_conv(moments) if self.config.use_quant_conv else moments

    def _pixels(self, latents: jax.Array) -> jax.Array:
        return self.decoder(self.post_quant_conv(latents) if self.config.use_post_quant_conv else latents)

    def _latent_tile(self) -> int:
        """The side of a tile of latents.

        Raises:
          InputError: tiles of `sample_size` pixels do not overlap by whole latents.
        """
        c = self.config
        side = c.sample_size if isinstance(c.sample_size, int) else c.sample_size[0]
        if side < 1 or side % (OVERLAP * c.downscale):
            raise InputError(
                f"pictures above {self.tile_above} pixels are computed in tiles of sample_size, here {side}; it must "
                f"be a multiple of {OVERLAP * c.downscale}"
            )
        return side // c.downscale

    def _in_tiles(self, method: Callable[..., jax.Array], x: jax.Array, side: int, out_side: int) -> jax.Array:
        """Apply a method to overlapping tiles of x, and blend the results. side, out_side: of an input and output tile.

        Tiles at the edges are smaller. Those of one shape run in one loop, so that XLA compiles them once and holds
        the activations of one.
        """
        module, variables = self.unbind()
        step, blended = side - side // OVERLAP, out_side // OVERLAP
        tops, lefts = (range(0, length, step) for length in x.shape[1:3])
        alike: dict[tuple[int, ...], dict[tuple[int, int], jax.Array]] = {}
        for top in tops:
            for left in lefts:
                tile = x[:, top : top + side, left : left + side]
                alike.setdefault(tile.shape, {})[top, left] = tile
        done: dict[tuple[int, int], jax.Array] = {}
        for tiles in alike.values():
            results = jax.lax.map(
                lambda tile: module.apply(variables, tile, method=method), jnp.stack([*tiles.values()])
            )
            done |= zip(tiles, results, strict=True)
        for top in tops:
            for left in lefts:
                if top:
                    done[top, left] = _blend(done[top - step, left], done[top, left], blended, axis=1)
                if left:
                    done[top, left] = _blend(done[top, left - step], done[top, left], blended, axis=2)
        kept = out_side - blended
        rows = [jnp.concatenate([done[top, left][:, :kept, :kept] for left in lefts], axis=2) for top in tops]
        return jnp.concatenate(rows, axis=1)


def _blend(before: jax.Array, tile: jax.Array, length: int, axis: int) -> jax.Array:
    """Fade from the end of the tile before to the beginning of this one along an axis."""
    length = min(length, before.shape[axis], tile.shape[axis])
    share = jnp.expand_dims(jnp.arange(length, dtype=tile.dtype) / length, [i for i in range(4) if i != axis])
    end = jax.lax.slice_in_dim(before, before.shape[axis] - length, None, axis=axis)
    begin, rest = jnp.split(tile, [length], axis)
    return jnp.concatenate([end * (1 - share) + begin * share, rest], axis)


def _check_images(name: str, x: jax.Array, channels: int, smallest: int) -> None:
    if x.ndim != 4 or x.shape[3] != channels or min(x.shape[1:3]) < smallest:
        raise InputError(
            f"`{name}` have shape {x.shape}; they must be (batch, height, width, {channels}), channels last, and at "
            f"least {smallest} high and wide"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"`{name}` are {x.dtype}; they must be floats")
