"""The table of the Q-Former: PyTorch name <-> parameter path, and how the axes move. It serves reading and writing.

A row has a parameter's path in Flax, its names in diffusers and in LAVIS, and a rule for its axes, see `convert.axes`:

    "(heads head_dim) width -> width heads head_dim"
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from flax_qformer.convert.axes import Parameter, concrete
from flax_qformer.models.config import Blip2Config

Layout = Literal["diffusers", "lavis"]


@dataclass(frozen=True)
class Row:
    """One kind of parameter; `{i}` in the names is the layer. `lavis_axes` are given if they differ."""

    path: str
    diffusers: str
    lavis: str
    axes: str
    lavis_axes: str | None = None

    def name(self, layout: Layout) -> str:
        return self.diffusers if layout == "diffusers" else self.lavis


def _dense(path: str, diffusers: str, lavis: str, inner: str, outer: str) -> tuple[Row, Row]:
    """An `nn.Linear`, (out, in) in PyTorch and (in, out) in Flax."""
    return (
        Row(f"{path}/kernel", f"{diffusers}.weight", f"{lavis}.weight", f"({outer}) ({inner}) -> {inner} {outer}"),
        Row(f"{path}/bias", f"{diffusers}.bias", f"{lavis}.bias", f"({outer}) -> {outer}"),
    )


def _layer_norm(path: str, diffusers: str, lavis: str, width: str) -> tuple[Row, Row]:
    return (
        Row(f"{path}/scale", f"{diffusers}.weight", f"{lavis}.weight", f"{width} -> {width}"),
        Row(f"{path}/bias", f"{diffusers}.bias", f"{lavis}.bias", f"{width} -> {width}"),
    )


def _attention(path: str, diffusers: str, lavis: str, source: str, heads: str) -> tuple[Row, ...]:
    """A Q-Former attention that reads keys and values from `source`."""
    split = f"{heads} head_dim"
    return (
        *_dense(f"{path}/attention/query", f"{diffusers}.attention.query", f"{lavis}.self.query", "width", split),
        *_dense(f"{path}/attention/key", f"{diffusers}.attention.key", f"{lavis}.self.key", source, split),
        *_dense(f"{path}/attention/value", f"{diffusers}.attention.value", f"{lavis}.self.value", source, split),
        *_dense(f"{path}/output/dense", f"{diffusers}.output.dense", f"{lavis}.output.dense", split, "width"),
        *_layer_norm(f"{path}/output/LayerNorm", f"{diffusers}.output.LayerNorm", f"{lavis}.output.LayerNorm", "width"),
    )


def _feed_forward_rows(suffix: str) -> tuple[Row, ...]:
    here, there, lavis = "encoder/layer_{i}", "encoder.layer.{i}", "Qformer.bert.encoder.layer.{i}"
    first, second = f"intermediate{suffix}", f"output{suffix}"
    return (
        *_dense(f"{here}/{first}/dense", f"{there}.{first}.dense", f"{lavis}.{first}.dense", "width", "inner"),
        *_dense(f"{here}/{second}/dense", f"{there}.{second}.dense", f"{lavis}.{second}.dense", "inner", "width"),
        *_layer_norm(
            f"{here}/{second}/LayerNorm", f"{there}.{second}.LayerNorm", f"{lavis}.{second}.LayerNorm", "width"
        ),
    )


MODEL = (
    Row("query_tokens", "query_tokens", "query_tokens", "1 queries width -> 1 queries width"),
    Row(
        "embeddings/word_embeddings/embedding",
        "embeddings.word_embeddings.weight",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "words width -> words width",
    ),
    Row(
        "embeddings/position_embeddings/embedding",
        "embeddings.position_embeddings.weight",
        "Qformer.bert.embeddings.position_embeddings.weight",
        "positions width -> positions width",
    ),
    *_layer_norm("embeddings/LayerNorm", "embeddings.LayerNorm", "Qformer.bert.embeddings.LayerNorm", "width"),
    Row(
        "visual_encoder/embeddings/class_embedding",
        "visual_encoder.embeddings.class_embedding",
        "visual_encoder.class_embedding",
        "1 1 image_width -> 1 1 image_width",
        "image_width -> 1 1 image_width",
    ),
    Row(
        "visual_encoder/embeddings/position_embedding",
        "visual_encoder.embeddings.position_embedding",
        "visual_encoder.positional_embedding",
        "1 image_tokens image_width -> 1 image_tokens image_width",
        "image_tokens image_width -> 1 image_tokens image_width",
    ),
    Row(
        "visual_encoder/embeddings/patch_embedding/kernel",
        "visual_encoder.embeddings.patch_embedding.weight",
        "visual_encoder.conv1.weight",
        "image_width channels patch_y patch_x -> patch_y patch_x channels image_width",
    ),
    *_layer_norm(
        "visual_encoder/pre_layernorm", "visual_encoder.pre_layernorm", "visual_encoder.ln_pre", "image_width"
    ),
    *_layer_norm("visual_encoder/post_layernorm", "visual_encoder.post_layernorm", "ln_vision", "image_width"),
)

_HERE, _THERE, _LAVIS = (
    "visual_encoder/encoder/layers_{i}",
    "visual_encoder.encoder.layers.{i}",
    "visual_encoder.transformer.resblocks.{i}",
)
_QKV = "3 image_heads image_head_dim"

VISION_LAYER = (
    *_layer_norm(f"{_HERE}/layer_norm1", f"{_THERE}.layer_norm1", f"{_LAVIS}.ln_1", "image_width"),
    Row(
        f"{_HERE}/self_attn/qkv/kernel",
        f"{_THERE}.self_attn.qkv.weight",
        f"{_LAVIS}.attn.in_proj_weight",
        f"({_QKV}) image_width -> image_width {_QKV}",
    ),
    *_dense(
        f"{_HERE}/self_attn/projection",
        f"{_THERE}.self_attn.projection",
        f"{_LAVIS}.attn.out_proj",
        "image_heads image_head_dim",
        "image_width",
    ),
    *_layer_norm(f"{_HERE}/layer_norm2", f"{_THERE}.layer_norm2", f"{_LAVIS}.ln_2", "image_width"),
    *_dense(f"{_HERE}/mlp/fc1", f"{_THERE}.mlp.fc1", f"{_LAVIS}.mlp.c_fc", "image_width", "image_inner"),
    *_dense(f"{_HERE}/mlp/fc2", f"{_THERE}.mlp.fc2", f"{_LAVIS}.mlp.c_proj", "image_inner", "image_width"),
)
VISION_LAYER_QKV_BIAS = (
    Row(
        f"{_HERE}/self_attn/qkv/bias",
        f"{_THERE}.self_attn.qkv.bias",
        f"{_LAVIS}.attn.in_proj_bias",
        f"({_QKV}) -> {_QKV}",
    ),
)

QFORMER_LAYER = (
    *_attention(
        "encoder/layer_{i}/attention",
        "encoder.layer.{i}.attention",
        "Qformer.bert.encoder.layer.{i}.attention",
        "width",
        "kept_heads",
    ),
    *_feed_forward_rows(""),
    *_feed_forward_rows("_query"),
)
QFORMER_CROSS_LAYER = _attention(
    "encoder/layer_{i}/crossattention",
    "encoder.layer.{i}.crossattention",
    "Qformer.bert.encoder.layer.{i}.crossattention",
    "image_width",
    "heads",
)

PROJ_LAYER = (
    *_dense("proj_layer/dense1", "proj_layer.dense1", "proj_layer.dense1", "width", "proj_inner"),
    *_dense("proj_layer/dense2", "proj_layer.dense2", "proj_layer.dense2", "proj_inner", "width"),
    *_layer_norm("proj_layer/LayerNorm", "proj_layer.LayerNorm", "proj_layer.LayerNorm", "width"),
)

_CLS = "cls.predictions"
LM_HEAD = (
    *_dense(
        "lm_head/transform/dense", f"{_CLS}.transform.dense", f"Qformer.{_CLS}.transform.dense", "width", "transformed"
    ),
    *_layer_norm(
        "lm_head/transform/LayerNorm",
        f"{_CLS}.transform.LayerNorm",
        f"Qformer.{_CLS}.transform.LayerNorm",
        "transformed",
    ),
    Row("lm_head/bias", f"{_CLS}.decoder.bias", f"Qformer.{_CLS}.decoder.bias", "words -> words"),
)

BERT_BIAS = Row("lm_head/bert_bias", f"{_CLS}.bias", f"Qformer.{_CLS}.bias", "any -> any")
"""The LM head's bias from before LAVIS added a word and a separate bias of the decoder. Nothing reads it. It may have
any length or be absent, and is kept so that an export is complete."""

PARTS: dict[str, tuple[Row, ...]] = {
    "proj_layer": PROJ_LAYER,
    "vision_proj": _dense("vision_proj", "vision_proj", "vision_proj", "width", "features"),
    "text_proj": _dense("text_proj", "text_proj", "text_proj", "width", "features"),
    "itm_head": _dense("itm_head", "itm_head", "itm_head", "width", "2"),
    "temp": (Row("temp", "temp", "temp", " -> "),),
    "lm_head": LM_HEAD,
}
"""`Blip2QFormerModel` reads the first, `Blip2ForPreTraining` the others; a checkpoint may hold any of them."""

SECTIONS: tuple[tuple[Callable[[Blip2Config], range], tuple[Row, ...]], ...] = (
    (lambda c: range(1), MODEL),
    (lambda c: range(c.vision_config.num_hidden_layers), VISION_LAYER),
    (lambda c: range(c.vision_config.num_hidden_layers if c.vision_config.qkv_bias else 0), VISION_LAYER_QKV_BIAS),
    (lambda c: range(c.qformer_config.num_hidden_layers), QFORMER_LAYER),
    (
        lambda c: range(0, c.qformer_config.num_hidden_layers, c.qformer_config.cross_attention_frequency),
        QFORMER_CROSS_LAYER,
    ),
)
"""Which layers of a model have which rows."""

PREFIX = {"diffusers": "", "lavis": "blip."}
"""Optional prefix of names: LAVIS's BLIP-Diffusion keeps the Q-Former under `blip`, its stage-1 model does not."""

LEFT_OUT = {
    "diffusers": re.compile(r"embeddings\.position_ids"),
    "lavis": re.compile(
        r"Qformer\.bert\.embeddings\.position_ids"
        r"|(unet|vae|text_encoder|controlnet)\..*"
        r"|ctx_embeddings_cache"
    ),
}
"""Tensors that are left out: a constant, and the rest of BLIP-Diffusion."""

TIED = {
    "diffusers": (f"{_CLS}.decoder.weight", "embeddings.word_embeddings.weight"),
    "lavis": (f"Qformer.{_CLS}.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
}
"""The decoder's kernel, and the table of which it is a copy."""


def parameters(config: Blip2Config, layout: Layout, parts: Iterable[str] = ("proj_layer",)) -> Iterator[Parameter]:
    """Every parameter of a model that has these parts, with its name in a layout."""
    once = [(lambda c: range(1), PARTS[part]) for part in parts]
    for layers, rows in (*SECTIONS, *once):
        for i in layers(config):
            sizes = _sizes(config, i)
            for row in rows:
                axes = row.axes if layout == "diffusers" else row.lavis_axes or row.axes
                yield concrete(row.path.format(i=i), row.name(layout).format(i=i), axes, sizes)


def bert_bias(layout: Layout, length: int) -> Parameter:
    return concrete(BERT_BIAS.path, BERT_BIAS.name(layout), BERT_BIAS.axes, {"any": length})


def _sizes(config: Blip2Config, layer: int) -> dict[str, int]:
    vision, qformer = config.vision_config, config.qformer_config
    return {
        "1": 1,
        "2": 2,
        "3": 3,
        "transformed": qformer.hidden_size,
        "features": config.image_text_hidden_size,
        "channels": 3,
        "patch_y": vision.patch_size,
        "patch_x": vision.patch_size,
        "image_tokens": vision.num_positions,
        "image_width": vision.hidden_size,
        "image_inner": vision.intermediate_size,
        "image_heads": vision.num_attention_heads,
        "image_head_dim": vision.head_dim,
        "queries": config.num_query_tokens,
        "words": qformer.vocab_size,
        "positions": qformer.max_position_embeddings,
        "width": qformer.hidden_size,
        "inner": qformer.intermediate_size,
        "proj_inner": 4 * qformer.hidden_size,
        "heads": qformer.num_attention_heads,
        "kept_heads": len(config.kept_heads(layer)),
        "head_dim": qformer.head_dim,
    }
