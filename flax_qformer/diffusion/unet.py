"""The UNet that predicts the noise in a latent picture, and the blocks that it shares with the ControlNet.

Feature maps are (batch, height, width, channels).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_qformer.diffusion.config import PartConfig
from flax_qformer.diffusion.layers import Downsample2D, ImageBlock, ResnetBlock2D, Upsample2D
from flax_qformer.errors import InputError
from flax_qformer.models.attention import dot_product_attention
from flax_qformer.models.layers import ACTIVATIONS, Block

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")


@dataclass(frozen=True)
class Level:
    """Sizes of the blocks at one resolution."""

    channels: int
    layers: int
    heads: int
    transformer_layers: int
    only_cross_attention: bool


@dataclass(frozen=True)
class EncoderConfig(PartConfig):
    """The fields that configs of the UNet and the ControlNet share.

    A tuple has one entry for each level, from the finest resolution to the coarsest. `attention_head_dim` is upstream's
    misnomer: it is the number of heads. `upcast_attention` changes nothing, because softmax is float32 in any dtype.
    """

    FIXED = {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None,),
        "class_embed_type": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_scale_factor": (1,),
        "num_class_embeds": (None,),
    }
    # Fields of embeddings that are off.
    IGNORED = frozenset(
        {"addition_embed_type_num_heads", "addition_time_embed_dim", "projection_class_embeddings_input_dim"}
    )

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*(DOWN_BLOCKS[0],) * 3, DOWN_BLOCKS[1])
    mid_block_type: str | None = MID_BLOCKS[0]
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        """Raise InputError if a number is out of range or fields contradict each other."""
        if not self.block_out_channels:
            self._refuse("block_out_channels", "at least one number")
        self._check_numbers("in_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
        self._check_numbers("cross_attention_dim", "attention_head_dim")
        self._check_numbers("transformer_layers_per_block", low=0)
        for name in ("down_block_types", "only_cross_attention", "layers_per_block"):
            self._check_length(name)
        for name in ("transformer_layers_per_block", "attention_head_dim"):
            self._check_length(name)
        self._check_choices("down_block_types", DOWN_BLOCKS)
        self._check_choices("mid_block_type", (*MID_BLOCKS, None))
        self._check_choices("downsample_padding", (0, 1))
        self._check_choices("resnet_time_scale_shift", ("default", "scale_shift"))
        if not 0 <= self.norm_eps < math.inf:
            self._refuse("norm_eps", "a finite number from 0")
        if not 0 <= self.freq_shift < self.block_out_channels[0] / 2:
            self._refuse("freq_shift", "from 0 to half of the first number in block_out_channels")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            self._refuse("norm_num_groups", f"a common divisor of block_out_channels {self.block_out_channels}")
        for level, attends in zip(self.levels, self.attending, strict=True):
            if attends and level.channels % level.heads:
                self._refuse("attention_head_dim", f"numbers of heads that divide {self.block_out_channels}")

    @property
    def heads(self) -> int | tuple[int, ...]:
        """Attention heads, of all levels or of each."""
        return self.attention_head_dim

    @property
    def levels(self) -> tuple[Level, ...]:
        """Sizes at each resolution, from the finest."""

        def each(value: Any) -> tuple[Any, ...]:
            return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

        fields = (self.layers_per_block, self.heads, self.transformer_layers_per_block, self.only_cross_attention)
        return tuple(Level(*sizes) for sizes in zip(self.block_out_channels, *map(each, fields), strict=True))

    @property
    def attending(self) -> tuple[bool, ...]:
        """Whether any block of a level has attention, by level."""
        *finer, last = (kind == DOWN_BLOCKS[0] for kind in self.down_block_types)
        return (*finer, last or self.mid_block_type == MID_BLOCKS[0])

    def _check_length(self, name: str) -> None:
        """Raise InputError unless a tuple has an entry for each level."""
        value = getattr(self, name)
        if isinstance(value, tuple) and len(value) != len(self.block_out_channels):
            self._refuse(name, f"as long as block_out_channels, which has {len(self.block_out_channels)} entries")


@dataclass(frozen=True)
class UNet2DConditionConfig(EncoderConfig):
    """The UNet of Stable Diffusion 1.x and 2.x. Source: diffusers 0.32.2 `UNet2DConditionModel`.

    `sample_size` is the size of the latents that the UNet was trained on. It changes nothing here.
    """

    FIXED = {
        **EncoderConfig.FIXED,
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "num_attention_heads": (None,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }
    # Upstream reads this field only for mid blocks that are not supported here.
    IGNORED = EncoderConfig.IGNORED | {"mid_block_only_cross_attention"}

    sample_size: int | tuple[int, ...] | None = None
    out_channels: int = 4
    center_input_sample: bool = False
    up_block_types: tuple[str, ...] = (UP_BLOCKS[1], *(UP_BLOCKS[0],) * 3)
    dropout: float = 0.0
    time_embedding_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    def _check(self) -> None:
        self._check_numbers("out_channels", "conv_in_kernel", "conv_out_kernel")
        for name in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, name) % 2 == 0:
                self._refuse(name, "odd")
        if self.time_embedding_dim is not None:
            self._check_numbers("time_embedding_dim")
        if not 0 <= self.dropout <= 1:
            self._refuse("dropout", "from 0 to 1")
        self._check_length("up_block_types")
        self._check_choices("up_block_types", UP_BLOCKS)
        super()._check()

    @property
    def attending(self) -> tuple[bool, ...]:
        ascending = (kind == UP_BLOCKS[0] for kind in reversed(self.up_block_types))
        return tuple(down or up for down, up in zip(super().attending, ascending, strict=True))


@flax.struct.dataclass
class UNet2DConditionOutput:
    """sample: (batch, height, width, out_channels), the predicted noise or velocity."""

    sample: jax.Array


class UNetAttention(Block):
    """Attention of tokens to a context. Source: diffusers `Attention`."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x: (batch, tokens, width), context: (batch, keys, any width) -> (batch, tokens, width)."""
        width = x.shape[-1]
        split = (self.heads, width // self.heads)
        query = self.dense("to_q", (width,), split, use_bias=False)(x) * split[1] ** -0.5
        key, value = (
            self.dense(name, (context.shape[-1],), split, use_bias=False)(context) for name in ("to_k", "to_v")
        )
        attended, _ = dot_product_attention(query, key, value)
        return self.dense("to_out_0", split, (width,))(attended)


class GEGLU(Block):
    """A linear layer; one half of its output is gated by the GELU of the other. Source: diffusers `GEGLU`."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., any) -> (..., width)."""
        linear, gate = jnp.split(self.dense("proj", (x.shape[-1],), (2 * self.width,))(x), 2, axis=-1)
        return linear * ACTIVATIONS["gelu"](gate.astype(jnp.float32)).astype(self.dtype)


class FeedForward(Block):
    """Two linear layers with GEGLU in between. Source: diffusers `FeedForward`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., width) -> the same shape."""
        width = x.shape[-1]
        inner = GEGLU(4 * width, name="net_0", **self.policy)(x)
        return self.dense("net_2", (4 * width,), (width,))(inner)


class BasicTransformerBlock(Block):
    """Self-attention, attention to the text, feed-forward, each after a LayerNorm. Source: the class of that name."""

    heads: int
    only_cross_attention: bool
    """Whether the first attention attends to the text, too."""

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x: (batch, tokens, width), context: (batch, text tokens, cross_attention_dim) -> the shape of x."""
        y = self.layer_norm("norm1", 1e-5)(x)
        x += UNetAttention(self.heads, name="attn1", **self.policy)(y, context if self.only_cross_attention else y)
        y = self.layer_norm("norm2", 1e-5)(x)
        x += UNetAttention(self.heads, name="attn2", **self.policy)(y, context)
        return x + FeedForward(name="ff", **self.policy)(self.layer_norm("norm3", 1e-5)(x))


class Transformer2DModel(ImageBlock):
    """Transformer blocks over the pixels of a feature map. Source: the class of that name."""

    config: EncoderConfig
    level: Level

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x: (batch, height, width, channels), context: (batch, tokens, cross_attention_dim) -> the shape of x."""
        batch, height, width, channels = x.shape
        # A 1x1 convolution is a dense layer whose kernel has two more axes.
        window = () if self.config.use_linear_projection else (1, 1)
        y = self.group_norm("norm", self.config.norm_num_groups, 1e-6)(x)
        y = y.reshape(batch, height * width, *window, channels)
        y = self.dense("proj_in", (*window, channels), (channels,))(y)
        for i in range(self.level.transformer_layers):
            block = BasicTransformerBlock(
                self.level.heads, self.level.only_cross_attention, name=f"transformer_blocks_{i}", **self.policy
            )
            y = block(y, context)
        y = self.dense("proj_out", (*window, channels), (channels,))(y.reshape(batch, -1, *window, channels))
        return x + y.reshape(x.shape)


RecomputedResnet = nn.remat(ResnetBlock2D, static_argnums=(3,))
RecomputedTransformer = nn.remat(Transformer2DModel)


class UNetBlock(ImageBlock):
    """Base of the down, mid and up blocks: residual blocks at one resolution, with a transformer each or without.

    Arguments of all: x (batch, height, width, any), time (batch, width of the embedding), context (batch, tokens,
    cross_attention_dim).
    """

    config: EncoderConfig
    level: Level
    attends: bool
    dropout: float
    gradient_checkpointing: bool

    @nn.nowrap
    def resnet(self, i: int, x: jax.Array, time: jax.Array, deterministic: bool) -> jax.Array:
        block = (RecomputedResnet if self.gradient_checkpointing else ResnetBlock2D)(
            self.level.channels,
            self.config.norm_num_groups,
            self.config.norm_eps,
            self.dropout,
            self.config.resnet_time_scale_shift == "scale_shift",
            name=f"resnets_{i}",
            **self.policy,
        )
        return block(x, time, deterministic)

    @nn.nowrap
    def transformer(self, i: int, x: jax.Array, context: jax.Array) -> jax.Array:
        block = RecomputedTransformer if self.gradient_checkpointing else Transformer2DModel
        return block(self.config, self.level, name=f"attentions_{i}", **self.policy)(x, context)


class DownBlock2D(UNetBlock):
    """Source: diffusers `DownBlock2D` and `CrossAttnDownBlock2D`."""

    is_last: bool

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array, deterministic: bool) -> list[jax.Array]:
        """The feature map after each layer, then the downsampled one unless this is the last block.

        They are (batch, height, width, channels of the level); height and width are halved in the downsampled one.
        """
        skips = []
        for i in range(self.level.layers):
            x = self.resnet(i, x, time, deterministic)
            if self.attends:
                x = self.transformer(i, x, context)
            skips.append(x)
        if not self.is_last:
            downsample = Downsample2D(
                self.level.channels, self.config.downsample_padding, name="downsamplers_0", **self.policy
            )
            skips.append(downsample(x))
        return skips


class MidBlock2D(UNetBlock):
    """Source: diffusers `UNetMidBlock2DCrossAttn`, and without attention `UNetMidBlock2D`."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array, deterministic: bool) -> jax.Array:
        """Returns the shape of x."""
        x = self.resnet(0, x, time, deterministic)
        if self.attends:
            x = self.transformer(0, x, context)
            x = self.resnet(1, x, time, deterministic)
        return x


class UpBlock2D(UNetBlock):
    """Source: diffusers `UpBlock2D` and `CrossAttnUpBlock2D`."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        size: tuple[int, int] | None,
        time: jax.Array,
        context: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Concatenate a skip to the input of each layer, the last skip first; upsample to `size` unless it is None.

        Returns:
          (batch, *size, channels of the level)
        """
        for i, skip in enumerate(reversed(skips)):
            x = self.resnet(i, jnp.concatenate([x, skip], axis=-1), time, deterministic)
            if self.attends:
                x = self.transformer(i, x, context)
        return x if size is None else Upsample2D(self.level.channels, name="upsamplers_0", **self.policy)(x, size)


def sinusoids(timesteps: jax.Array, width: int, flip_sin_to_cos: bool, freq_shift: int) -> jax.Array:
    """(batch,) timesteps -> (batch, width) sines and cosines, float32. Source: diffusers `get_timestep_embedding`."""
    half = width // 2
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    # An error in the last place would shift the phase at timestep 1000 by 1e-4; this rounds once, as upstream does.
    angles = timesteps.astype(jnp.float32)[:, None] * np.exp(exponents.astype(np.float64)).astype(np.float32)
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, width % 2)))


class TimestepEmbedding(Block):
    """Source: diffusers `TimestepEmbedding`."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, any) -> (batch, width)."""
        x = self.dense("linear_1", (x.shape[-1],), (self.width,), activation=nn.silu)(x)
        return self.dense("linear_2", (self.width,), (self.width,))(x)


class Encoded(NamedTuple):
    """Feature maps of the down blocks and the mid block."""

    skips: list[jax.Array]
    """The input of the first block, and what each layer and each downsampling returns."""
    middle: jax.Array


AnyBlock = TypeVar("AnyBlock", bound=UNetBlock)


class LatentEncoder(ImageBlock):
    """Base of the UNet and the ControlNet: time embedding, down blocks and mid block.

    `gradient_checkpointing` recomputes residual blocks and transformers in the backward pass.
    """

    config: EncoderConfig
    gradient_checkpointing: bool = False

    @nn.nowrap
    def block(self, kind: type[AnyBlock], name: str, level: Level, attends: bool, **details: Any) -> AnyBlock:
        # The ControlNet has no dropout.
        dropout = getattr(self.config, "dropout", 0.0)
        return kind(
            self.config, level, attends, dropout, self.gradient_checkpointing, name=name, **details, **self.policy
        )

    @nn.nowrap
    def embed_time(self, timestep: ArrayLike, batch: int, width: int) -> jax.Array:
        """A number or (batch,) numbers -> (batch, width), computed in float32."""
        timesteps = jnp.broadcast_to(jnp.asarray(timestep), (batch,))
        config = self.config
        waves = sinusoids(timesteps, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        return TimestepEmbedding(width, name="time_embedding", dtype=jnp.float32, param_dtype=self.param_dtype)(waves)

    @nn.nowrap
    def encode(self, x: jax.Array, time: jax.Array, context: jax.Array, deterministic: bool = True) -> Encoded:
        """Run the down blocks and the mid block on x (batch, height, width, first of block_out_channels)."""
        config, levels = self.config, self.config.levels
        skips = [x]
        for i, (kind, level) in enumerate(zip(config.down_block_types, levels, strict=True)):
            block = self.block(
                DownBlock2D, f"down_blocks_{i}", level, kind == DOWN_BLOCKS[0], is_last=i == len(levels) - 1
            )
            skips += block(skips[-1], time, context, deterministic)
        middle = skips[-1]
        if config.mid_block_type is not None:
            level = dataclasses.replace(levels[-1], only_cross_attention=False)
            mid_block = self.block(MidBlock2D, "mid_block", level, config.mid_block_type == MID_BLOCKS[0])
            middle = mid_block(middle, time, context, deterministic)
        return Encoded(skips, middle)

    @nn.nowrap
    def check_inputs(self, sample: jax.Array, encoder_hidden_states: jax.Array) -> None:
        """Raise InputError if latents or text have the wrong shape."""
        channels, width = self.config.in_channels, self.config.cross_attention_dim
        if sample.ndim != 4 or sample.shape[-1] != channels:
            raise InputError(f"sample has the shape {sample.shape}; it must be (batch, height, width, {channels})")
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[::2] != (len(sample), width):
            raise InputError(
                f"encoder_hidden_states has the shape {encoder_hidden_states.shape}; "
                f"it must be ({len(sample)}, tokens, {width}), as the batch and cross_attention_dim are"
            )


class UNet2DConditionModel(LatentEncoder):
    """The UNet of Stable Diffusion. Source: diffusers 0.32.2 `UNet2DConditionModel`.

    Example::

        unet = UNet2DConditionModel(config)
        noise = unet.apply({"params": params}, latents, timestep, encoder_hidden_states).sample
    """

    config: UNet2DConditionConfig

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timestep: ArrayLike,
        encoder_hidden_states: jax.Array,
        down_block_additional_residuals: tuple[jax.Array, ...] | None = None,
        mid_block_additional_residual: jax.Array | None = None,
        deterministic: bool = True,
    ) -> UNet2DConditionOutput:
        """Predict the noise in latents.

        Args:
          sample: (batch, height, width, in_channels), noisy latents of any size.
          timestep: one for all, or (batch,).
          encoder_hidden_states: (batch, tokens, cross_attention_dim), the text.
          down_block_additional_residuals: one for each skip connection, as a ControlNet returns them.
          mid_block_additional_residual: the same for the mid block's output.

        Raises:
          InputError: a shape is wrong, or the residuals do not belong to this UNet.
        """
        config: UNet2DConditionConfig = self.config
        self.check_inputs(sample, encoder_hidden_states)
        time = self.embed_time(timestep, len(sample), config.time_embedding_dim or 4 * config.block_out_channels[0])
        if config.center_input_sample:
            sample = 2 * sample - 1
        x = self.conv("conv_in", config.block_out_channels[0], config.conv_in_kernel)(sample)
        encoded = self.encode(x, time, encoder_hidden_states, deterministic)
        skips, x = encoded.skips, encoded.middle
        if down_block_additional_residuals is not None or mid_block_additional_residual is not None:
            residuals: list[Any] = [*(down_block_additional_residuals or ()), mid_block_additional_residual]
            features = [*skips, x]
            if [getattr(residual, "shape", None) for residual in residuals] != [y.shape for y in features]:
                raise InputError(
                    f"the UNet needs {len(skips)} down_block_additional_residuals and a mid_block_additional_residual "
                    "with the shapes of its own feature maps; take those of a ControlNet with the UNet's config"
                )
            *skips, x = (y + residual.astype(y.dtype) for y, residual in zip(features, residuals, strict=True))
        for i, (kind, level) in enumerate(zip(config.up_block_types, reversed(config.levels), strict=True)):
            skips, joined = skips[: -level.layers - 1], skips[-level.layers - 1 :]
            # Upsampling ends at the size of the next skip, which is odd if the size did not divide evenly.
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            block = self.block(UpBlock2D, f"up_blocks_{i}", level, kind == UP_BLOCKS[0])
            x = block(x, joined, size, time, encoder_hidden_states, deterministic)
        x = nn.silu(self.group_norm("conv_norm_out", config.norm_num_groups, config.norm_eps)(x))
        return UNet2DConditionOutput(self.conv("conv_out", config.out_channels, config.conv_out_kernel)(x))
