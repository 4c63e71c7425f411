"""The model of the first stage: a Q-Former with the heads that its three losses need."""

from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flax_qformer.errors import InputError
from flax_qformer.models.captioning import (
    MAX_LENGTH,
    MIN_LENGTH,
    NUM_BEAMS,
    TOP_P,
    Rules,
    search_caption,
    write_caption,
)
from flax_qformer.models.config import Blip2QFormerConfig
from flax_qformer.models.inputs import as_array, check_inputs, check_length
from flax_qformer.models.layers import ACTIVATIONS, Block
from flax_qformer.models.losses import (
    contrastive_loss,
    generation_loss,
    matching_loss,
    negative_logits,
    similarities,
)
from flax_qformer.models.qformer import KeyValue, QFormer
from flax_qformer.models.vision import VisionOutput, image_hidden_states
from flax_qformer.parallel.mesh import interleaved, is_batch_split, pick_rows

TEMPERATURE = 0.07


@flax.struct.dataclass
class PreTrainingOutput:
    """The losses and the arrays that they are computed from, all float32.

    Attributes:
      loss: the sum of the three.
      loss_itc: image-text contrast.
      loss_itm: image-text matching.
      loss_itg: image-grounded text generation.
      image_features: (batch, num_query_tokens, image_text_hidden_size), normalised.
      text_features: (batch, image_text_hidden_size), normalised.
      logits_per_image: (batch, batch), similarity of each image with each text, divided by the temperature;
        `logits_per_text` is its transpose.
      negative_image_index: (batch,) the image that was matched with each text as its negative.
      negative_text_index: (batch,) the text that was matched with each image.
      itm_logits: (3 * batch, 2): positives, texts with negative images, images with negative texts; class 1 is a match.
      itg_logits: (batch, T, vocabulary): logits of the token after each token.
    """

    loss: jax.Array
    loss_itc: jax.Array
    loss_itm: jax.Array
    loss_itg: jax.Array
    image_features: jax.Array
    text_features: jax.Array
    logits_per_image: jax.Array
    negative_image_index: jax.Array
    negative_text_index: jax.Array
    itm_logits: jax.Array
    itg_logits: jax.Array

    @property
    def logits_per_text(self) -> jax.Array:
        return self.logits_per_image.T


class _Transform(Block):
    """Source: LAVIS `BertPredictionHeadTransform`."""

    config: Blip2QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., width) -> the same shape."""
        c = self.config
        x = self.dense("dense", (c.hidden_size,), (c.hidden_size,), activation=ACTIVATIONS[c.hidden_act])(x)
        return self.layer_norm("LayerNorm", c.layer_norm_eps)(x)


class LMHead(Block):
    """States to words. The decoder's kernel is the table of word embeddings. Source: LAVIS `BertLMPredictionHead`."""

    config: Blip2QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
        """x: (..., width), words: (vocabulary, width) -> logits (..., vocabulary), float32."""
        c = self.config
        x = _Transform(c, name="transform", **self.policy)(x)
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), self.param_dtype)
        return jnp.einsum("...d,vd->...v", x, words.astype(self.dtype), preferred_element_type=jnp.float32) + bias


class Blip2ForPreTraining(QFormer):
    """The Q-Former with the heads of the first stage. Source: LAVIS `Blip2Qformer`; arXiv 2301.12597.

    Example::

        model = Blip2ForPreTraining(config)
        output = model.apply({"params": params}, **batch, rngs={"negatives": key})
    """

    parts: ClassVar[tuple[str, ...]] = ("vision_proj", "text_proj", "itm_head", "temp", "lm_head")

    def setup(self) -> None:
        super().setup()
        c, width = self.config, self.config.qformer_config.hidden_size
        self.vision_proj = self.dense(None, (width,), (c.image_text_hidden_size,))
        self.text_proj = self.dense(None, (width,), (c.image_text_hidden_size,))
        self.itm_head = self.dense(None, (width,), (2,))
        self.lm_head = LMHead(c.qformer_config, **self.policy)
        # `encode_image` and `read` also run without heads.
        if self.is_mutable_collection("params") or self.has_variable("params", "temp"):
            self.temp = self.param("temp", nn.initializers.constant(TEMPERATURE), (), self.param_dtype)

    def __call__(
        self,
        pixel_values: jax.Array | None = None,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        negative_image_index: jax.Array | None = None,
        negative_text_index: jax.Array | None = None,
        *,
        image_id: jax.Array | None = None,
        encoder_hidden_states: jax.Array | VisionOutput | None = None,
        deterministic: bool = True,
    ) -> PreTrainingOutput:
        """Compute the losses of pairs of images and texts. Needs a `negatives` rng unless both indices are given.

        Args:
          pixel_values: (batch, image_size, image_size, 3), as `Processor` makes them.
          input_ids: (batch, T), each text in [CLS] ... [SEP] and padding.
          attention_mask: (batch, T), zeros for padding.
          negative_image_index, negative_text_index: (batch,) negatives of texts and of images; drawn by default.
          image_id: (batch,) integers; pairs that share one show the same image.
          encoder_hidden_states: (batch, image tokens, vision width), image embeddings instead of pixels; or the output
            of `encode_image`.
          deterministic: False turns dropout on, which needs a `dropout` rng.

        Raises:
          InputError: the inputs do not fit each other or the config.
        """
        if input_ids is None or (pixel_values is None and encoder_hidden_states is None):
            raise InputError("the losses need pairs: give `pixel_values` and `input_ids`")
        self._check_heads("vision_proj", "text_proj", "itm_head", "lm_head", "temp")
        input_ids = as_array("input_ids", input_ids)
        attention_mask = (
            jnp.ones_like(input_ids) if attention_mask is None else as_array("attention_mask", attention_mask)
        )
        image = self._image(pixel_values, encoder_hidden_states, deterministic)
        check_inputs(self.config, image, input_ids)
        check_length(self.config.qformer_config, input_ids.shape[1])
        if not input_ids.shape[1]:
            raise InputError("`input_ids` have no tokens; a text has [CLS] at least")
        if attention_mask.shape != input_ids.shape:
            raise InputError(f"`attention_mask` has shape {attention_mask.shape}; `input_ids` have {input_ids.shape}")
        for index in (negative_image_index, negative_text_index):
            if index is not None and jnp.shape(index) != (len(image),):
                raise InputError(f"an index of negatives has shape {jnp.shape(index)}; it must be ({len(image)},)")
        caption_ids = input_ids.at[:, 0].set(self.config.qformer_config.start_token_id)
        queries, texts, captions, seen = self._read_apart(image, input_ids, caption_ids, attention_mask, deterministic)
        image_features = self._normalised(self.vision_proj(queries))
        text_features = self._normalised(self.text_proj(texts[:, 0]))
        logits = similarities(image_features, text_features) / self.temp.astype(jnp.float32)

        if negative_image_index is None:
            negative_image_index = self._draw(negative_logits(logits, image_id), axis=0)
        if negative_text_index is None:
            negative_text_index = self._draw(negative_logits(logits, image_id), axis=1)
        # For each pair: itself, with a negative image, with a negative text. Interleaved, they stay on the pair's chip.
        images: jax.Array | None = None
        if not seen:
            images = interleaved(image, pick_rows(image, negative_image_index), image)
        elif is_batch_split() or self.config.qformer_config.gradient_checkpointing:
            # Keys and values are several times as much to send between chips, and recomputed layers would keep them.
            images = pick_rows(image, negative_image_index)
        else:
            seen = jax.tree.map(lambda x: interleaved(x, x[negative_image_index], x), seen)
        itm_logits = self._match(
            images,
            interleaved(input_ids, input_ids, input_ids[negative_text_index]),
            interleaved(attention_mask, attention_mask, attention_mask[negative_text_index]),
            deterministic,
            seen,
        ).reshape(-1, 3, 2)

        itg_logits = self.lm_head(captions, self._words())

        loss_itc = contrastive_loss(logits, image_id)
        loss_itm = matching_loss(itm_logits)
        loss_itg = generation_loss(itg_logits, caption_ids, self.config.qformer_config.pad_token_id)
        return PreTrainingOutput(
            loss=loss_itc + loss_itm + loss_itg,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_itg=loss_itg,
            image_features=image_features,
            text_features=text_features,
            logits_per_image=logits,
            negative_image_index=negative_image_index,
            negative_text_index=negative_text_index,
            itm_logits=itm_logits.swapaxes(0, 1).reshape(-1, 2),
            itg_logits=itg_logits,
        )

    def image_features(
        self,
        pixel_values: jax.Array | None = None,
        *,
        encoder_hidden_states: jax.Array | VisionOutput | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Features to retrieve images by: (batch, num_query_tokens, image_text_hidden_size), normalised, float32."""
        self._check_heads("vision_proj")
        image = self._image(pixel_values, encoder_hidden_states, deterministic)
        queries = self.read(encoder_hidden_states=image, deterministic=deterministic)
        return self._normalised(self.vision_proj(queries.last_hidden_state))

    def text_features(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> jax.Array:
        """Features to retrieve texts by: (batch, image_text_hidden_size), normalised, float32."""
        self._check_heads("text_proj")
        text = self.read(input_ids=input_ids, attention_mask=attention_mask, deterministic=deterministic)
        return self._normalised(self.text_proj(text.pooler_output))

    def match(
        self,
        pixel_values: jax.Array | None = None,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        encoder_hidden_states: jax.Array | VisionOutput | None = None,
    ) -> jax.Array:
        """The ITM score of pairs, (batch,) float32: the logit of a match. Source: LAVIS `compute_itm`."""
        if input_ids is None:
            raise InputError("a match needs a text: give `input_ids`")
        self._check_heads("itm_head")
        image = self._image(pixel_values, encoder_hidden_states, True)
        return self._match(image, input_ids, attention_mask, True)[:, 1]

    def caption(
        self,
        pixel_values: jax.Array | None = None,
        *,
        eos_token_id: int,
        encoder_hidden_states: jax.Array | VisionOutput | None = None,
        use_nucleus_sampling: bool = False,
        num_beams: int = NUM_BEAMS,
        max_length: int = MAX_LENGTH,
        min_length: int = MIN_LENGTH,
        top_p: float = TOP_P,
        repetition_penalty: float = 1.0,
    ) -> jax.Array:
        """Write captions: by beam search, greedily (`num_beams=1`), or by nucleus sampling (needs a `sampling` rng).

        Source: LAVIS `Blip2Qformer.generate`; the names and defaults are LAVIS's.

        Args:
          pixel_values: (batch, image_size, image_size, 3).
          eos_token_id: the tokenizer's `sep_token_id`, which ends a caption.
          encoder_hidden_states: (batch, image tokens, vision width), image embeddings instead of pixels; or the output
            of `encode_image`.
          max_length, min_length: in tokens, [DEC] included.
          top_p: nucleus sampling draws from the fewest tokens whose total probability reaches this.
          repetition_penalty: above 1 makes tokens less likely that are already in the caption.

        Returns:
          (batch, max_length) int32: [DEC], the words, `eos_token_id` and padding.
        """
        c = self.config.qformer_config
        if not 1 <= max_length <= c.max_position_embeddings:
            raise InputError(f"`max_length` is {max_length}; the model has {c.max_position_embeddings} positions")
        if not 0 < top_p <= 1:
            raise InputError(f"`top_p` is {top_p}; it must be above 0 and at most 1")
        if num_beams < 1 or repetition_penalty <= 0:
            raise InputError("`num_beams` must be 1 or more, and `repetition_penalty` above 0")
        self._check_heads("lm_head")
        image = self._image(pixel_values, encoder_hidden_states, True)
        past = self.read(encoder_hidden_states=image, use_cache=True).past_key_values or ()
        # Inside an XLA loop, a module must be a pure function of its variables.
        pure, variables = self.clone(parent=None, name=None), self.variables

        def step(token: jax.Array, mask: jax.Array, past: tuple[KeyValue, ...], position: jax.Array) -> tuple:
            return pure.apply(variables, token, mask, past, position, method="next_token")

        rules = Rules(c.start_token_id, eos_token_id, c.pad_token_id, max_length, min_length, repetition_penalty)
        if use_nucleus_sampling:
            if not self.has_rng("sampling"):
                raise InputError('words are drawn: give `rngs={"sampling": key}`')
            return write_caption(step, past, rules, top_p, self.make_rng("sampling"))
        if num_beams == 1:
            return write_caption(step, past, rules)
        return search_caption(step, past, rules, num_beams)

    def next_token(
        self, token: jax.Array, mask: jax.Array, past_key_values: tuple[KeyValue, ...], position: jax.Array
    ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
        """Logits of the next token, and the keys and values of this token: one step of captioning.

        token: (batch,), mask: (batch, past + 1), position: () -> (batch, vocabulary), and (batch, 1, heads, head_dim)
        for each layer.
        """
        output = self.read(
            input_ids=token[:, None],
            attention_mask=mask,
            past_key_values=past_key_values,
            positions=jnp.reshape(position, 1),
            use_cache=True,
        )
        own = jax.tree.map(lambda x: x[:, -1:], output.past_key_values)
        return self.lm_head(output.pooler_output, self._words()), own

    def _read_apart(
        self, image: jax.Array, input_ids: jax.Array, caption_ids: jax.Array, mask: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple[KeyValue, ...]]:
        """Read the image, the texts and the captions in one pass: the layers run once, on more rows.

        Queries see the image and each other. A text sees itself. A caption sees the queries and its own earlier tokens.
        Source: the masks of arXiv 2301.12597, figure 2; LAVIS runs three passes.

        input_ids, caption_ids, mask: (batch, T) -> the states of queries, texts and captions, (batch, tokens, width)
        each, and keys and values of the image, if they were computed.
        """
        num_queries, length = self.config.num_query_tokens, input_ids.shape[1]
        part = np.repeat(np.arange(3), (num_queries, length, length))
        sees = part[:, None] == part
        sees[-length:, :num_queries] = True
        sees[-length:, -length:] = np.tri(length)
        counts = jnp.concatenate([jnp.ones((len(mask), num_queries)), mask, mask], axis=1)
        output = self.read(
            None,
            jnp.concatenate([input_ids, caption_ids], axis=1),
            # Mask harder than padding, so that an all-padding text stays inside itself.
            jnp.where(sees, counts[:, None, :], -1.0),
            encoder_hidden_states=image,
            positions=jnp.tile(jnp.arange(length), 2),
            use_cache=True,
            deterministic=deterministic,
        )
        queries, texts, captions = jnp.split(output.last_hidden_state, (num_queries, num_queries + length), axis=1)
        return queries, texts, captions, output.image_key_values or ()

    def _match(
        self,
        image: jax.Array | None,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        deterministic: bool,
        image_key_values: tuple[KeyValue, ...] | None = None,
    ) -> jax.Array:
        """(batch, 2): logits of no match and a match, averaged over queries."""
        pair = self.read(
            None,
            input_ids,
            attention_mask,
            encoder_hidden_states=image,
            image_key_values=image_key_values,
            deterministic=deterministic,
        )
        assert pair.query_embeddings is not None
        return self.itm_head(pair.query_embeddings).astype(jnp.float32).mean(axis=1)

    @nn.nowrap
    def _check_heads(self, *names: str) -> None:
        self.check_parts(*names, other="Blip2QFormerModel")

    def _image(
        self, pixel_values: jax.Array | None, states: jax.Array | VisionOutput | None, deterministic: bool
    ) -> jax.Array:
        if states is not None and pixel_values is None:
            return as_array("encoder_hidden_states", image_hidden_states(states))
        if states is not None or pixel_values is None:
            raise InputError("give `pixel_values` or `encoder_hidden_states`, and not both")
        return self.encode_image(pixel_values, deterministic=deterministic).last_hidden_state

    def _words(self) -> jax.Array:
        return self.embeddings.variables["params"]["word_embeddings"]["embedding"]

    def _normalised(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    def _draw(self, logits: jax.Array, axis: int) -> jax.Array:
        if self.is_initializing():
            return jnp.argmax(logits, axis)
        if not self.has_rng("negatives"):
            raise InputError(
                'negatives are drawn: give `rngs={"negatives": key}`, or `negative_image_index` and '
                "`negative_text_index`"
            )
        scores = jax.lax.stop_gradient(logits) + jax.random.gumbel(self.make_rng("negatives"), logits.shape)
        # Two reductions, which each chip runs on its own part; one argmax would gather the parts.
        places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
        return jnp.where(scores == scores.max(axis, keepdims=True), places, logits.shape[axis]).min(axis)
