"""Token ids and subject vectors to the states that a UNet reads: CLIP's text encoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flax_qformer.diffusion.config import PartConfig
from flax_qformer.errors import InputError
from flax_qformer.models.attention import CROSS_ATTENTION_MASK, dot_product_attention
from flax_qformer.models.layers import ACTIVATIONS, MLP, Block, Embed
from flax_qformer.parallel.mesh import keep_batch

OLD_EOS_TOKEN_ID = 2
"""`eos_token_id` in CLIP's configs from before 2023, whatever the tokenizer's end of text is."""


@dataclass(frozen=True)
class CLIPTextConfig(PartConfig):
    """Config of `ContextCLIPTextModel`. Names and defaults are those of transformers 4.46.3.

    Like transformers, it ignores unknown fields: every release of transformers writes others.
    """

    FIXED: ClassVar = {"model_type": ("clip_text_model",)}

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
        self._check_numbers("vocab_size", high=2**31 - 1)
        self._check_numbers("num_hidden_layers", low=0, high=1000)
        self._check_choices("hidden_act", ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            self._refuse("hidden_size", f"a multiple of num_attention_heads {self.num_attention_heads}")
        if not 0 <= self.attention_dropout <= 1:
            self._refuse("attention_dropout", "from 0 to 1")
        if not 0 <= self.layer_norm_eps < math.inf:
            self._refuse("layer_norm_eps", "a finite number from 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from the contents of a `config.json`; unknown fields are ignored.

        Raises:
          InputError: a field has a wrong type or an unsupported value, or the model is not a CLIP text model.
        """
        known = cls.__dataclass_fields__.keys() | cls.FIXED.keys()
        return super().from_dict({name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "clip_text_model", **super().to_dict()}


@flax.struct.dataclass
class TextOutput:
    """Output of the text encoder. `length` is that of the text with the inserted vectors.

    Attributes:
      last_hidden_state: (batch, length, width), normalised.
      pooler_output: (batch, width): the last state at the index that the end of text has in `input_ids`. As upstream,
        the index does not count vectors that are inserted before it.
      hidden_states: (batch, length, width) before the first and after each layer, not normalised; None unless asked
        for.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None


class ContextCLIPTextEmbeddings(Block):
    """Tokens, inserted vectors and positions. Source: diffusers `ContextCLIPTextEmbeddings`."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, ctx_embeddings: jax.Array | None, ctx_begin_pos: jax.Array | None
    ) -> jax.Array:
        """input_ids: (batch, tokens), ctx_embeddings: (batch, vectors, width), ctx_begin_pos: (batch,)

        Returns:
          (batch, tokens + vectors, width)
        """
        c = self.config
        tokens = Embed((c.vocab_size, c.hidden_size), name="token_embedding", **self.policy)(input_ids)
        if ctx_embeddings is not None and ctx_begin_pos is not None:
            tokens = insert(tokens, ctx_embeddings.astype(tokens.dtype), ctx_begin_pos)
        positions = Embed((c.max_position_embeddings, c.hidden_size), name="position_embedding", **self.policy)
        return keep_batch(tokens + positions(jnp.arange(tokens.shape[1])))


def insert(tokens: jax.Array, vectors: jax.Array, begin: jax.Array) -> jax.Array:
    """Insert vectors between the tokens of each example, so that the first vector has the index `begin`.

    tokens: (batch, tokens, width), vectors: (batch, vectors, width), begin: (batch,); after the last token at most.

    Returns:
      (batch, tokens + vectors, width)
    """
    num_tokens, num_vectors = tokens.shape[1], vectors.shape[1]
    index = jnp.arange(num_tokens + num_vectors)
    after = index - jnp.minimum(begin, num_tokens)[:, None]
    source = jnp.where(after < 0, index, jnp.where(after < num_vectors, num_tokens + after, index - num_vectors))
    return jnp.take_along_axis(jnp.concatenate([tokens, vectors], axis=1), source[:, :, None], axis=1)


class CLIPAttention(Block):
    """Causal self-attention. Source: transformers `CLIPAttention`."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """x: (batch, length, width) -> the same shape."""
        c, length = self.config, x.shape[1]
        width, heads = (c.hidden_size,), (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (self.dense(name, width, heads)(x) for name in ("q_proj", "k_proj", "v_proj"))
        causal = jnp.where(jnp.tri(length, dtype=bool), 0.0, CROSS_ATTENTION_MASK)[None, None]
        dropout = self.attention_dropout(c.attention_dropout, deterministic)
        context, _ = dot_product_attention(query * heads[1] ** -0.5, key, value, bias=causal, dropout=dropout)
        return self.dense("out_proj", heads, width)(context)


class CLIPEncoderLayer(Block):
    """A pre-norm transformer block. Source: transformers `CLIPEncoderLayer`."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """x: (batch, length, width) -> the same shape."""
        c = self.config
        normed = self.layer_norm("layer_norm1", c.layer_norm_eps)(x)
        x += CLIPAttention(c, name="self_attn", **self.policy)(normed, deterministic)
        normed = self.layer_norm("layer_norm2", c.layer_norm_eps)(x)
        return x + MLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], name="mlp", **self.policy)(normed)


class CLIPEncoder(Block):
    """The text encoder's blocks. Source: transformers `CLIPEncoder`."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> list[jax.Array]:
        """x: (batch, length, width) -> x, and the output of each block."""
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(CLIPEncoderLayer(self.config, name=f"layers_{i}", **self.policy)(states[-1], deterministic))
        return states


class ContextCLIPTextTransformer(Block):
    """Embeddings, blocks and the final norm. Source: diffusers `ContextCLIPTextTransformer`."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        ctx_embeddings: jax.Array | None,
        ctx_begin_pos: jax.Array | None,
        deterministic: bool,
    ) -> TextOutput:
        """input_ids: (batch, tokens), ctx_embeddings: (batch, vectors, width), ctx_begin_pos: (batch,)"""
        c = self.config
        embeddings = ContextCLIPTextEmbeddings(c, name="embeddings", **self.policy)
        x = embeddings(input_ids, ctx_embeddings, ctx_begin_pos)
        states = CLIPEncoder(c, name="encoder", **self.policy)(x, deterministic)
        # Upstream's final norm has PyTorch's eps, not the config's.
        last = self.layer_norm("final_layer_norm", 1e-5)(states[-1])
        # The end of text is the highest id of the vocabulary, or the config's if tokens were added after it.
        ends = input_ids
        if c.eos_token_id is not None and c.eos_token_id != OLD_EOS_TOKEN_ID:
            ends = jnp.where(input_ids == c.eos_token_id, jnp.iinfo(input_ids.dtype).max, input_ids)
        pooled = jnp.take_along_axis(last, jnp.argmax(ends, axis=1)[:, None, None], axis=1)[:, 0]
        return TextOutput(last, pooled, tuple(states))


class ContextCLIPTextModel(Block):
    """CLIP's text encoder, which reads subject vectors as words. Source: diffusers `ContextCLIPTextModel`."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        ctx_embeddings: jax.Array | None = None,
        ctx_begin_pos: jax.Array | int | None = None,
        *,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> TextOutput:
        """Encode texts. Positions are counted after the insertion, and the causal mask covers the whole sequence.

        Args:
          input_ids: (batch, tokens). An id outside the vocabulary gives NaN.
          ctx_embeddings: (batch or 1, vectors, width): vectors of subjects, inserted into the texts.
          ctx_begin_pos: index of the first vector, one number or (batch,). Past the last token, the vectors come last.
          output_hidden_states: return the states of every layer as well.
          deterministic: False turns dropout on, which needs a `dropout` rng.

        Raises:
          InputError: the text with the vectors has more tokens than there are positions, a shape is wrong, or only one
            of `ctx_embeddings` and `ctx_begin_pos` is there.
        """
        c = self.config
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise InputError(
                f"`input_ids` are {input_ids.dtype} of shape {input_ids.shape}; the text encoder takes whole numbers "
                "(batch, tokens)"
            )
        (batch, length), begin = input_ids.shape, None
        if (ctx_embeddings is None) != (ctx_begin_pos is None):
            raise InputError("`ctx_embeddings` and `ctx_begin_pos` belong together; give both or neither")
        if ctx_embeddings is not None and ctx_begin_pos is not None:
            ctx_embeddings = jnp.asarray(ctx_embeddings)
            shape = ctx_embeddings.shape
            if len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != c.hidden_size:
                raise InputError(
                    f"`ctx_embeddings` have shape {shape}; {batch} texts take ({batch} or 1, vectors, {c.hidden_size})"
                )
            ctx_embeddings = jnp.broadcast_to(ctx_embeddings, (batch, *shape[1:]))
            begin = _begin_of_each(ctx_begin_pos, batch)
            length += shape[1]
        if length > c.max_position_embeddings:
            raise InputError(
                f"the text has {length} tokens, with {length - input_ids.shape[1]} subject vectors among them, and the "
                f"text encoder has {c.max_position_embeddings} positions; shorten the text"
            )
        transformer = ContextCLIPTextTransformer(c, name="text_model", **self.policy)
        output: Any = transformer(input_ids, ctx_embeddings, begin, deterministic)
        return output if output_hidden_states else output.replace(hidden_states=None)


def _begin_of_each(begin: Any, batch: int) -> jax.Array:
    """`ctx_begin_pos` of each example, (batch,)."""
    begin = jnp.asarray(begin)
    if begin.ndim > 1 or (begin.ndim == 1 and len(begin) not in (1, batch)) or begin.dtype.kind not in "iu":
        raise InputError(
            f"`ctx_begin_pos` is {begin.dtype} of shape {begin.shape}; {batch} texts take one whole number or {batch}"
        )
    if not isinstance(begin, jax.core.Tracer) and np.asarray(begin).min(initial=0) < 0:
        raise InputError("`ctx_begin_pos` is negative; it counts tokens from the beginning of the text")
    return jnp.broadcast_to(begin, (batch,))
