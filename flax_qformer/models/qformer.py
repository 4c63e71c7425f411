"""Image embeddings and text to query embeddings: the Q-Former."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple, TypeAlias, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flax_qformer.errors import InputError
from flax_qformer.models.attention import (
    CROSS_ATTENTION_MASK,
    SELF_ATTENTION_MASK,
    attention_without_keys,
    dot_product_attention,
    mask_bias,
)
from flax_qformer.models.config import Blip2Config, Blip2QFormerConfig
from flax_qformer.models.inputs import (
    as_array,
    check_cache,
    check_image_mask,
    check_inputs,
    check_length,
    head_mask_per_layer,
    mask_over_tokens,
    optional_arrays,
)
from flax_qformer.models.layers import ACTIVATIONS, INITIALIZER, Block, Embed, check_stacked, scanned
from flax_qformer.models.vision import Blip2VisionModel, VisionOutput, image_hidden_states
from flax_qformer.parallel.mesh import interleaved

T = TypeVar("T")

KeyValue: TypeAlias = tuple[jax.Array, jax.Array]
"""Keys and values of one attention, each (batch, tokens, heads, head_dim)."""


@flax.struct.dataclass
class QFormerOutput:
    """Output of the Q-Former. The N tokens are the queries, if there are any, followed by the text.

    Attributes:
      last_hidden_state: (batch, N, width)
      pooler_output: (batch, width): the first token.
      query_embeddings: (batch, num_query_tokens, width): the queries after `proj_layer`, which a diffusion model reads
        as words (upstream's `return_dict=False`). None without queries.
      hidden_states: (batch, N, width) before the first and after each layer; None unless asked for.
      attentions: (batch, heads, N, N) of each layer; None unless asked for.
      cross_attentions: (batch, heads, num_query_tokens, image tokens) of each layer that cross-attends; None unless
        asked for.
      past_key_values: self-attention keys and values of each layer, each (batch, tokens, heads, head_dim),
        including the given ones; None unless asked for.
      image_key_values: keys and values of the image, of each layer that cross-attends; None unless `past_key_values`
        are asked for; empty if the image was read without computing them.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    query_embeddings: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    past_key_values: tuple[KeyValue, ...] | None = None
    image_key_values: tuple[KeyValue, ...] | None = None


class Blip2TextEmbeddings(Block):
    """The queries, followed by embeddings of words and positions. Source: diffusers `Blip2TextEmbeddings`."""

    config: Blip2QFormerConfig

    @nn.compact
    def __call__(
        self,
        queries: jax.Array | None,
        input_ids: jax.Array | None,
        positions: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """queries: (batch, queries, width), input_ids: (batch, T), either may be None -> (batch, N, width).

        positions: (T,) of the text's tokens.
        """
        c = self.config
        parts = [] if queries is None else [queries.astype(self.dtype)]
        if input_ids is not None:
            words = Embed((c.vocab_size, c.hidden_size), name="word_embeddings", **self.policy)(input_ids)
            # PyTorch's padding_idx: the row of the padding token is never trained.
            is_pad = (input_ids == c.pad_token_id)[..., None]
            words = jnp.where(is_pad, jax.lax.stop_gradient(words), words)
            places = Embed((c.max_position_embeddings, c.hidden_size), name="position_embeddings", **self.policy)
            parts.append(words + places(positions))
        x = self.layer_norm("LayerNorm", c.layer_norm_eps)(jnp.concatenate(parts, axis=1))
        return nn.Dropout(c.hidden_dropout_prob, deterministic=deterministic)(x)


def _one_after_other(past: jax.Array, own: jax.Array) -> jax.Array:
    return jnp.concatenate([past, own], axis=1)


def _around(past: jax.Array, own: jax.Array) -> jax.Array:
    """Rows: past, own, past."""
    return interleaved(past, own, past)


class Blip2QFormerMultiHeadAttention(Block):
    """Attention with separate query, key and value. Source: transformers `Blip2QFormerMultiHeadAttention`.

    `joined` combines cached keys or values with those of the context: self-attention concatenates tokens,
    cross-attention interleaves rows.
    """

    config: Blip2QFormerConfig
    num_heads: int
    joined: Callable[[jax.Array, jax.Array], jax.Array]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None,
        bias: jax.Array | None,
        head_mask: jax.Array | None,
        past: KeyValue | None,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array, KeyValue | None]:
        """x: (batch, queries, width) attends to context: (batch, keys, context width), to cached keys, or to both.

        Returns (batch, queries, heads, head_dim), weights (batch, heads, queries, keys), and the keys and values if
        they were computed.
        """
        c, num_queries = self.config, x.shape[1]
        heads = (self.num_heads, c.head_dim)
        query = self.dense("query", x.shape[-1:], heads)(x) * c.head_dim**-0.5
        if context is None:
            assert past is not None
            key, value = past
        else:
            num_keys = context.shape[1]
            to_key, to_value = (self.dense(name, context.shape[-1:], heads) for name in ("key", "value"))
            is_less_work = num_queries * (num_keys + c.head_dim) < num_keys * c.head_dim
            if is_less_work and deterministic and head_mask is None and past is None:
                attended, weights = attention_without_keys(query, context, to_key, to_value, bias=bias)
                return attended, weights, None
            key, value = to_key(context), to_value(context)
            if past is not None:
                before = (array.astype(self.dtype) for array in past)
                key, value = (self.joined(*pair) for pair in zip(before, (key, value), strict=True))
        dropout = self.attention_dropout(c.attention_probs_dropout_prob, deterministic)
        attended, weights = dot_product_attention(query, key, value, bias=bias, head_mask=head_mask, dropout=dropout)
        return attended, weights, (key, value)


class _ResidualOutput(Block):
    """Projection, dropout, residual, LayerNorm. Source: transformers `Blip2QFormerOutput`, `...SelfOutput`."""

    config: Blip2QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array, deterministic: bool) -> jax.Array:
        """x: (batch, tokens, *inner), residual: (batch, tokens, width) -> (batch, tokens, width)."""
        c = self.config
        x = self.dense("dense", x.shape[2:], (c.hidden_size,))(x)
        x = nn.Dropout(c.hidden_dropout_prob, deterministic=deterministic)(x)
        return self.layer_norm("LayerNorm", c.layer_norm_eps)(x + residual)


class Blip2QFormerAttention(Block):
    """Attention, its projection and the residual. Source: transformers `Blip2QFormerAttention`."""

    config: Blip2QFormerConfig
    num_heads: int
    joined: Callable[[jax.Array, jax.Array], jax.Array]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None,
        bias: jax.Array | None,
        head_mask: jax.Array | None,
        past: KeyValue | None,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array, KeyValue | None]:
        """x: (batch, queries, width) -> the same shape, weights (batch, heads, queries, keys), and keys and values."""
        attention = Blip2QFormerMultiHeadAttention(
            self.config, self.num_heads, self.joined, name="attention", **self.policy
        )
        attended, weights, cache = attention(x, context, bias, head_mask, past, deterministic)
        return _ResidualOutput(self.config, name="output", **self.policy)(attended, x, deterministic), weights, cache


class _Intermediate(Block):
    """Source: transformers `Blip2QFormerIntermediate`."""

    config: Blip2QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, width) -> (batch, tokens, intermediate_size)."""
        c = self.config
        activation = ACTIVATIONS[c.hidden_act]
        return self.dense("dense", (c.hidden_size,), (c.intermediate_size,), activation=activation)(x)


@flax.struct.dataclass
class LayerInputs:
    """Inputs of a layer besides the tokens. The N tokens are `num_queries` queries, followed by the text.

    Attributes:
      image: (batch, image tokens, image width)
      bias: (batch, 1, 1 or N, past + N), added to the scores of self-attention.
      image_bias: (batch, 1, 1 or num_queries, image tokens), added to those of cross-attention.
      head_mask: (batch or 1, heads, 1, 1), factors on the weights of both.
      past: cached keys and values of self-attention.
      image_past: cached keys and values of cross-attention.
      deterministic: turns dropout off.
    """

    image: jax.Array | None
    bias: jax.Array | None
    image_bias: jax.Array | None
    head_mask: jax.Array | None
    past: KeyValue | None
    image_past: KeyValue | None
    num_queries: int = flax.struct.field(pytree_node=False)
    deterministic: bool = flax.struct.field(pytree_node=False)


class LayerOutput(NamedTuple):
    """Output of a layer.

    Attributes:
      states: (batch, N, width)
      queries: (batch, num_queries, width): the first states. The last layer's have a gradient without its text.
      attention: weights of self-attention, (batch, heads, N, past + N).
      cross_attention: weights of cross-attention, (batch, heads, num_queries, image tokens); None without it.
      past: keys and values of self-attention, the cached ones included.
      image_past: keys and values of cross-attention, if they were computed.
    """

    states: jax.Array
    queries: jax.Array
    attention: jax.Array
    cross_attention: jax.Array | None
    past: KeyValue | None
    image_past: KeyValue | None


class Blip2QFormerLayer(Block):
    """Self-attention over all tokens, cross-attention for the queries, and a feed-forward each for queries and text.

    `heads` are the remaining self-attention heads, numbered as in the unpruned layer. Source: diffusers
    `Blip2QFormerLayer`.
    """

    config: Blip2QFormerConfig
    heads: tuple[int, ...]
    cross_attends: bool

    @nn.compact
    def __call__(self, x: jax.Array, inputs: LayerInputs) -> LayerOutput:
        """x: (batch, N, width)."""
        c, cross_weights, image_cache = self.config, None, None
        head_mask = None if inputs.head_mask is None else inputs.head_mask[:, self.heads, :, :]
        attention = Blip2QFormerAttention(c, len(self.heads), _one_after_other, name="attention", **self.policy)
        x, weights, cache = attention(x, x, inputs.bias, head_mask, inputs.past, inputs.deterministic)
        queries, text = x[:, : inputs.num_queries], x[:, inputs.num_queries :]
        if inputs.num_queries:
            if self.cross_attends and (inputs.image is not None or inputs.image_past is not None):
                cross = Blip2QFormerAttention(c, c.num_attention_heads, _around, name="crossattention", **self.policy)
                queries, cross_weights, image_cache = cross(
                    queries, inputs.image, inputs.image_bias, inputs.head_mask, inputs.image_past, inputs.deterministic
                )
            queries = self._feed_forward(queries, "_query", inputs.deterministic)
        if text.shape[1]:
            text = self._feed_forward(text, "", inputs.deterministic)
        states = jnp.concatenate([queries, text], axis=1)
        return LayerOutput(states, queries, weights, cross_weights, cache, image_cache)

    def _feed_forward(self, x: jax.Array, suffix: str, deterministic: bool) -> jax.Array:
        inner = _Intermediate(self.config, name=f"intermediate{suffix}", **self.policy)(x)
        return _ResidualOutput(self.config, name=f"output{suffix}", **self.policy)(inner, x, deterministic)


class Blip2QFormerEncoder(Block):
    """The Q-Former's layers. Source: diffusers `Blip2QFormerEncoder`.

    With the config's `scan_layers` they run in a loop over groups of `cross_attention_frequency` layers. The parameters
    are then those of an encoder of one group, `layers`, with a leading axis.
    """

    config: Blip2Config

    @nn.compact
    def __call__(self, x: jax.Array, inputs: Sequence[LayerInputs]) -> list[LayerOutput]:
        """x: (batch, N, width), and the inputs and outputs of each layer."""
        c = self.config.qformer_config
        check_stacked(self, self.config.scan_layers)
        if self.config.scan_layers:
            return self._scan(x, inputs)
        outputs: list[LayerOutput] = []
        layer_class = nn.remat(Blip2QFormerLayer) if c.gradient_checkpointing else Blip2QFormerLayer
        for i in range(c.num_hidden_layers):
            layer = layer_class(
                c, self.config.kept_heads(i), c.has_cross_attention(i), name=f"layer_{i}", **self.policy
            )
            outputs.append(layer(x, inputs[i]))
            x = outputs[-1].states
        return outputs

    def _scan(self, x: jax.Array, inputs: Sequence[LayerInputs]) -> list[LayerOutput]:
        depth, size = self.config.qformer_config.num_hidden_layers, self.config.qformer_config.cross_attention_frequency
        qformer = dataclasses.replace(self.config.qformer_config, num_hidden_layers=size)
        config = dataclasses.replace(self.config, qformer_config=qformer, scan_layers=False)
        group = Blip2QFormerEncoder(config, name="layers", **self.policy)
        # What all layers share is not stacked.
        shared = dataclasses.replace(inputs[0], head_mask=None, past=None, image_past=None)
        own = [(layer.head_mask, layer.past, layer.image_past) for layer in inputs]
        rows = [jax.tree.map(lambda *layers: jnp.stack(layers), *own[i::size]) for i in range(size)]

        def run(group: Blip2QFormerEncoder, x: jax.Array, rows: list[tuple]) -> list[LayerOutput]:
            names = ("head_mask", "past", "image_past")
            return group(x, [dataclasses.replace(shared, **dict(zip(names, row, strict=True))) for row in rows])

        return scanned(group, depth // size, x, rows, run)


class ProjLayer(Block):
    """A feed-forward on the queries; the residual is its input before the LayerNorm. Source: diffusers `ProjLayer`.

    It is initialised to the identity, so that queries trained without it pass through.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """x: (batch, queries, width) -> the same shape."""
        y = self.layer_norm("LayerNorm", 1e-12)(x)
        y = self.dense("dense1", (self.width,), (4 * self.width,), activation=ACTIVATIONS["quick_gelu"])(y)
        y = self.dense("dense2", (4 * self.width,), (self.width,), kernel_init=nn.initializers.zeros)(y)
        return nn.Dropout(0.1, deterministic=deterministic)(y) + x


class QFormer(Block):
    """The vision tower, the queries and the layers, which `Blip2QFormerModel` and `Blip2ForPreTraining` share.

    `parts` names the other modules of a class.
    """

    config: Blip2Config
    parts: ClassVar[tuple[str, ...]] = ()

    def setup(self) -> None:
        c = self.config
        width = c.qformer_config.hidden_size
        self.visual_encoder = Blip2VisionModel(c.vision_config, c.scan_layers, **self.policy)
        self.query_tokens = self.param("query_tokens", INITIALIZER, (1, c.num_query_tokens, width), self.param_dtype)
        self.embeddings = Blip2TextEmbeddings(c.qformer_config, **self.policy)
        self.encoder = Blip2QFormerEncoder(c, **self.policy)

    def encode_image(
        self,
        pixel_values: jax.Array,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> VisionOutput:
        """Embed images, see `Blip2VisionModel`. The result can be reused as `encoder_hidden_states`."""
        return self.visual_encoder(
            as_array("pixel_values", pixel_values),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            deterministic=deterministic,
        )

    @nn.nowrap
    def check_parts(self, *names: str, other: str) -> None:
        """Raise InputError if the parameters lack a part that is about to run.

        Args:
          names: the top-level names of the part's parameters.
          other: the class that the parameters probably belong to.
        """
        if self.is_mutable_collection("params"):
            return
        missing = [name for name in names if not self.has_variable("params", name)]
        if missing:
            own = type(self).__name__
            raise InputError(
                f"the parameters have no {', '.join(missing)}: they are not those of {own}, perhaps those of {other}; "
                f"load them with `model_class={own}`, or run {other}"
            )

    def read(
        self,
        pixel_values: jax.Array | None = None,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        encoder_hidden_states: jax.Array | VisionOutput | None = None,
        encoder_attention_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        past_key_values: tuple[KeyValue, ...] | None = None,
        image_key_values: tuple[KeyValue, ...] | None = None,
        positions: jax.Array | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> QFormerOutput:
        """Run the layers; arguments, errors and output are those of `Blip2QFormerModel`, without `proj_layer`.

        Args:
          image_key_values: cached keys and values of images, one image for each text. Together with
            `encoder_hidden_states` there are three times as many texts: the second of each three reads
            `encoder_hidden_states`, the first and the third share a cached image.
          positions: (T,) of the text's tokens; by default they follow the cached text.
        """
        input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, head_mask = optional_arrays(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_hidden_states(encoder_hidden_states),
            encoder_attention_mask=encoder_attention_mask,
            head_mask=head_mask,
        )
        if pixel_values is not None:
            if encoder_hidden_states is not None:
                raise InputError("give `pixel_values` or `encoder_hidden_states`, not both")
            encoder_hidden_states = self.encode_image(pixel_values, deterministic=deterministic).last_hidden_state
        num_past = past_key_values[0][0].shape[1] if past_key_values else 0
        check_cache(self.config, encoder_hidden_states, input_ids, past_key_values, image_key_values, use_cache)
        if not image_key_values:
            check_inputs(self.config, encoder_hidden_states, input_ids)
        if positions is None:
            first = max(num_past - self.config.num_query_tokens, 0)
            positions = jnp.arange(first, first + (0 if input_ids is None else input_ids.shape[1]))
            check_length(self.config.qformer_config, first + len(positions))

        queries = None
        if encoder_hidden_states is not None or image_key_values:
            rows = encoder_hidden_states if input_ids is None else input_ids
            assert rows is not None
            queries = jnp.broadcast_to(self.query_tokens, (len(rows), *self.query_tokens.shape[1:]))
        x = self.embeddings(queries, input_ids, positions, deterministic)
        num_queries = 0 if queries is None else queries.shape[1]

        bias = image_bias = None
        if attention_mask is not None:
            mask = mask_over_tokens(attention_mask, (x.shape[0], x.shape[1]), num_queries, num_past)
            bias = mask_bias(mask, SELF_ATTENTION_MASK)
        if encoder_attention_mask is not None and encoder_hidden_states is not None:
            check_image_mask(encoder_attention_mask, encoder_hidden_states, num_queries)
            image_bias = mask_bias(encoder_attention_mask, CROSS_ATTENTION_MASK)
        if head_mask is not None:
            head_mask = head_mask_per_layer(head_mask, self.config.qformer_config, len(x))

        cached_images = iter(image_key_values or ())
        inputs = [
            LayerInputs(
                image=encoder_hidden_states,
                bias=bias,
                image_bias=image_bias,
                head_mask=None if head_mask is None else head_mask[i],
                past=past_key_values[i] if past_key_values else None,
                image_past=next(cached_images, None) if self.config.qformer_config.has_cross_attention(i) else None,
                num_queries=num_queries,
                deterministic=deterministic,
            )
            for i in range(self.config.qformer_config.num_hidden_layers)
        ]
        outputs = self.encoder(x, inputs)
        states = (x, *(layer.states for layer in outputs))
        queries = outputs[-1].queries if outputs else x[:, :num_queries]
        return QFormerOutput(
            last_hidden_state=states[-1],
            pooler_output=states[-1][:, 0],
            query_embeddings=queries if num_queries else None,
            hidden_states=states if output_hidden_states else None,
            attentions=tuple(layer.attention for layer in outputs) if output_attentions else None,
            cross_attentions=_present(layer.cross_attention for layer in outputs) if output_attentions else None,
            past_key_values=_present(layer.past for layer in outputs) if use_cache else None,
            image_key_values=_present(layer.image_past for layer in outputs) if use_cache else None,
        )


class Blip2QFormerModel(QFormer):
    """BLIP-Diffusion's Q-Former with its vision tower.

    Source: diffusers `Blip2QFormerModel`; arXiv 2305.14720 (BLIP-Diffusion), 2301.12597 (BLIP-2).

    Example::

        model = Blip2QFormerModel(config)
        output = model.apply({"params": params}, pixel_values, input_ids, attention_mask)
    """

    parts: ClassVar[tuple[str, ...]] = ("proj_layer",)

    def setup(self) -> None:
        super().setup()
        self.proj_layer = ProjLayer(self.config.qformer_config.hidden_size, **self.policy)

    def __call__(
        self,
        pixel_values: jax.Array | None = None,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        encoder_hidden_states: jax.Array | VisionOutput | None = None,
        encoder_attention_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        past_key_values: tuple[KeyValue, ...] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> QFormerOutput:
        """Read images and text. Without an image there are no queries; without text there are only queries.

        With Q queries and T tokens of text, N = Q + T (Q = 0 without an image):

        Args:
          pixel_values: (batch, image_size, image_size, 3), as `Processor` makes them.
          input_ids: (batch, T) integers.
          attention_mask: ones for tokens to attend to, zeros for masked ones: (batch, T) over the text, or (batch, N)
            or (batch, N, N) over queries and text.
          encoder_hidden_states: (batch, image tokens, vision width), image embeddings instead of pixels; or the output
            of `encode_image`.
          encoder_attention_mask: (batch, image tokens) or (batch, Q, image tokens), ones for tokens that the queries
            attend to.
          head_mask: factors on the attention weights, of self- and cross-attention alike: (heads,), (layers, heads), or
            (layers, batch, heads, 1, 1). Heads are numbered as in the unpruned model.
          past_key_values: those of an earlier call, which the text follows and attends to; give no image then. Masks
            are (batch, T), (batch, past + T) or (batch, T, past + T).
          use_cache: return `past_key_values`.
          output_attentions, output_hidden_states: return those of every layer as well.
          deterministic: False turns dropout on, which needs a `dropout` rng.

        Raises:
          InputError: the inputs do not fit each other or the config.
        """
        output = self.read(
            pixel_values,
            input_ids,
            attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            deterministic=deterministic,
        )
        if output.query_embeddings is None:
            return output
        self.check_parts("proj_layer", other="Blip2ForPreTraining")
        return dataclasses.replace(output, query_embeddings=self.proj_layer(output.query_embeddings, deterministic))


def _present(values: Iterable[T | None]) -> tuple[T, ...]:
    return tuple(value for value in values if value is not None)
