"""Pixels to image embeddings: the vision tower."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flax_qformer.errors import InputError
from flax_qformer.models.attention import dot_product_attention
from flax_qformer.models.config import Blip2VisionConfig
from flax_qformer.models.inputs import check_pixels
from flax_qformer.models.layers import ACTIVATIONS, INITIALIZER, MLP, Block, check_stacked, scanned


@flax.struct.dataclass
class VisionOutput:
    """Output of the vision tower.

    Attributes:
      last_hidden_state: (batch, tokens, width), normalised: the class token, then the patches row by row.
      pooler_output: (batch, width): the class token, normalised once more.
      hidden_states: (batch, tokens, width) before the first and after each layer; None unless asked for.
      attentions: (batch, heads, tokens, tokens) of each layer; None unless asked for.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class Blip2VisionEmbeddings(Block):
    """Patches, class token and positions. Source: diffusers `Blip2VisionEmbeddings`."""

    config: Blip2VisionConfig

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """pixel_values: (batch, image_size, image_size, 3) -> (batch, tokens, width)."""
        c = self.config
        batch, grid, patch, width = pixel_values.shape[0], c.grid_size, c.patch_size, c.hidden_size
        # A convolution whose stride is its kernel is a product over patches; pixels beyond the last patch are unused.
        pixels = pixel_values[:, : grid * patch, : grid * patch].reshape(batch, grid, patch, grid, patch, 3)
        patches = self.dense("patch_embedding", (patch, patch, 3), (width,), use_bias=False)(pixels.swapaxes(2, 3))
        class_token = self.param("class_embedding", INITIALIZER, (1, 1, width), self.param_dtype)
        positions = self.param("position_embedding", INITIALIZER, (1, c.num_positions, width), self.param_dtype)
        class_token = jnp.broadcast_to(class_token.astype(self.dtype), (batch, 1, width))
        tokens = jnp.concatenate([class_token, patches.reshape(batch, grid**2, width)], axis=1)
        return tokens + positions.astype(self.dtype)


class Blip2Attention(Block):
    """Self-attention with fused query, key and value. Source: transformers `Blip2Attention`."""

    config: Blip2VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        """x: (batch, tokens, width) -> the same shape, and weights (batch, heads, tokens, tokens)."""
        c = self.config
        heads = (c.num_attention_heads, c.head_dim)
        qkv = self.dense("qkv", (c.hidden_size,), (3, *heads), use_bias=c.qkv_bias)(x)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        dropout = self.attention_dropout(c.attention_dropout, deterministic)
        context, weights = dot_product_attention(query * c.head_dim**-0.5, key, value, dropout=dropout)
        return self.dense("projection", heads, (c.hidden_size,))(context), weights


class VisionLayerOutput(NamedTuple):
    """Output of a block: states (batch, tokens, width), and attention weights (batch, heads, tokens, tokens)."""

    states: jax.Array
    attention: jax.Array


class Blip2EncoderLayer(Block):
    """A pre-norm transformer block. Source: transformers `Blip2EncoderLayer`."""

    config: Blip2VisionConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> VisionLayerOutput:
        """x: (batch, tokens, width)."""
        c = self.config
        normed = self.layer_norm("layer_norm1", c.layer_norm_eps)(x)
        attended, weights = Blip2Attention(c, name="self_attn", **self.policy)(normed, self.deterministic)
        x += attended
        normed = self.layer_norm("layer_norm2", c.layer_norm_eps)(x)
        mlp = MLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], name="mlp", **self.policy)
        return VisionLayerOutput(x + mlp(normed), weights)


class Blip2Encoder(Block):
    """The vision tower's blocks. Source: transformers `Blip2Encoder`.

    `scan_layers` runs them in a loop. The parameters are then those of a one-layer encoder, `layers`, with a leading
    axis of depth.
    """

    config: Blip2VisionConfig
    scan_layers: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> list[VisionLayerOutput]:
        """x: (batch, tokens, width) -> the output of each block."""
        c, outputs = self.config, []
        check_stacked(self, self.scan_layers)
        if self.scan_layers:
            one = Blip2Encoder(dataclasses.replace(c, num_hidden_layers=1), name="layers", **self.policy)
            return scanned(one, c.num_hidden_layers, x, None, lambda encoder, x, _: encoder(x, deterministic))
        layer_class = nn.remat(Blip2EncoderLayer) if c.gradient_checkpointing else Blip2EncoderLayer
        for i in range(c.num_hidden_layers):
            outputs.append(layer_class(c, deterministic, name=f"layers_{i}", **self.policy)(x))
            x = outputs[-1].states
        return outputs


class Blip2VisionModel(Block):
    """The vision tower. Source: diffusers `Blip2VisionModel`, after CLIP's ViT (arXiv 2103.00020)."""

    config: Blip2VisionConfig
    scan_layers: bool = False

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> VisionOutput:
        """Embed images.

        Args:
          pixel_values: (batch, image_size, image_size, 3), normalised as `Processor` does.
          output_attentions, output_hidden_states: return those of every layer as well.
          deterministic: False turns dropout on, which needs a `dropout` rng.

        Raises:
          InputError: the shape of the pixels is not the config's, or they are integers.
        """
        c = self.config
        check_pixels(pixel_values)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (c.image_size, c.image_size, 3):
            raise InputError(
                f"`pixel_values` have shape {pixel_values.shape}; this model takes (batch, {c.image_size}, "
                f"{c.image_size}, 3), channels last: let Processor make them"
            )
        x = Blip2VisionEmbeddings(c, name="embeddings", **self.policy)(pixel_values)
        x = self.layer_norm("pre_layernorm", c.layer_norm_eps)(x)
        layers = Blip2Encoder(c, self.scan_layers, name="encoder", **self.policy)(x, deterministic)
        states = (x, *(layer.states for layer in layers))
        post_layernorm = self.layer_norm("post_layernorm", c.layer_norm_eps)
        last = post_layernorm(states[-1])
        return VisionOutput(
            last_hidden_state=last,
            pooler_output=post_layernorm(last[:, 0]),
            hidden_states=states if output_hidden_states else None,
            attentions=tuple(layer.attention for layer in layers) if output_attentions else None,
        )


def image_hidden_states(image: Any) -> Any:
    """The embeddings of an image, which is an array of them or the vision tower's output."""
    return image.last_hidden_state if isinstance(image, VisionOutput) else image
