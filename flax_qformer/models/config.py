"""Configs of models: frozen dataclasses, read from and written as upstream's `config.json`.

Names and defaults are those of transformers 4.46.3 (`Blip2Config`). Upstream omits fields that have their defaults, so
a missing field means the default here too. Fields that this model does not use (the language model's config,
initializer ranges) are ignored.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from flax_qformer.errors import InputError
from flax_qformer.json_files import read_json
from flax_qformer.models.layers import ACTIVATIONS


@dataclass(frozen=True)
class _Config:
    """Base of the configs: checks its fields when it is built, and reads and writes mappings."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, name = getattr(self, f.name), f"{type(self).__name__}.{f.name}"
            if isinstance(value, np.generic):
                value = value.item()
                object.__setattr__(self, f.name, value)
            low, high = f.metadata.get("range", (-math.inf, math.inf))
            if f.type is int and (type(value) is not int or not low <= value <= high):
                raise InputError(f"{name} is {_short(value)}; it must be a whole number from {low} to {high}")
            if f.type is float and (type(value) not in (int, float) or not low <= value <= high):
                raise InputError(f"{name} is {_short(value)}; it must be a number from {low} to {high}")
            if f.type is bool and type(value) is not bool:
                raise InputError(f"{name} is {_short(value)}; it must be true or false")
            if f.type == (int | None) and not (value is None or (type(value) is int and value >= 0)):
                raise InputError(f"{name} is {_short(value)}; it must be a whole number from 0, or null")
            if f.type == (str | None) and not isinstance(value, str | None):
                raise InputError(f"{name} is {_short(value)}; it must be text")
            if f.name == "hidden_act" and not (isinstance(value, str) and value in ACTIVATIONS):
                raise InputError(f"{name} is {_short(value)}; known are {', '.join(ACTIVATIONS)}")

    def _check_heads(self, hidden_size: int, heads: int) -> None:
        if hidden_size % heads:
            raise InputError(
                f"{type(self).__name__}: {heads} attention heads do not divide hidden_size {hidden_size}; "
                "set num_attention_heads to a divisor of it"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from a mapping as in `config.json`; unknown keys are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."


def _int(default: int, low: int = 1, high: int = 2**31 - 1) -> Any:
    return field(default=default, metadata={"range": (low, high)})


def _float(default: float, low: float = 0.0, high: float = 1.0) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Blip2VisionConfig(_Config):
    """The vision tower: a ViT with LayerNorm before and after its blocks.

    `gradient_checkpointing` recomputes each block in the backward pass instead of keeping its activations.
    """

    hidden_size: int = _int(1408)
    intermediate_size: int = _int(6144)
    num_hidden_layers: int = _int(39, 0, 1000)
    num_attention_heads: int = _int(16)
    image_size: int = _int(224)
    patch_size: int = _int(14)
    hidden_act: str = "gelu"
    layer_norm_eps: float = _float(1e-6)
    attention_dropout: float = _float(0.0)
    qkv_bias: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads(self.hidden_size, self.num_attention_heads)
        if self.patch_size > self.image_size:
            raise InputError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Tokens of one image, the class token and the patches row by row."""
        return self.grid_size**2 + 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Blip2QFormerConfig(_Config):
    """The Q-Former: a BERT whose queries also attend to the image.

    `chunk_size_feed_forward` is accepted and ignored, since it changes no value. Upstream saves memory with it; here
    `gradient_checkpointing` does.
    """

    vocab_size: int = _int(30522)
    hidden_size: int = _int(768)
    num_hidden_layers: int = _int(12, 0, 1000)
    num_attention_heads: int = _int(12)
    intermediate_size: int = _int(3072)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = _float(0.1)
    attention_probs_dropout_prob: float = _float(0.1)
    max_position_embeddings: int = _int(512)
    layer_norm_eps: float = _float(1e-12)
    pad_token_id: int = _int(0, 0)
    bos_token_id: int | None = None
    position_embedding_type: str = "absolute"
    cross_attention_frequency: int = _int(2)
    chunk_size_feed_forward: int = _int(0, 0)
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads(self.hidden_size, self.num_attention_heads)
        if self.position_embedding_type != "absolute":
            raise InputError(
                f"position_embedding_type is {_short(self.position_embedding_type)}; only 'absolute' runs "
                "(upstream cannot cross-attend with relative positions either)"
            )
        if self.pad_token_id >= self.vocab_size:
            raise InputError(f"pad_token_id {self.pad_token_id} is not below vocab_size {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def start_token_id(self) -> int:
        """The id of the token [DEC], which begins captions; tokenizers add it last."""
        return self.vocab_size - 1 if self.bos_token_id is None else self.bos_token_id

    def has_cross_attention(self, layer: int) -> bool:
        return layer % self.cross_attention_frequency == 0


@dataclass(frozen=True)
class Blip2Config(_Config):
    """A whole model. Source: transformers 4.46.3 `Blip2Config`, as diffusers' `Blip2QFormerModel` uses it.

    `pruned_heads` holds (layer, heads) pairs: removed self-attention heads of the Q-Former, numbered as in the unpruned
    model. `prune_heads` sets it; a mapping is accepted too. `tokenizer` is upstream's field: the folder or hub id of
    the tokenizer. `scan_layers` runs the layers of both towers in a loop, which compiles much faster; parameters then
    have the form of `stack_layers`. It is not saved. `newly_initialised` holds (name, kind) pairs, such as ("itm_head",
    "randomly initialised"), of modules that no checkpoint held and no training has changed. `from_pretrained` and
    `save_pretrained` maintain it.
    """

    vision_config: Blip2VisionConfig = Blip2VisionConfig()
    qformer_config: Blip2QFormerConfig = Blip2QFormerConfig()
    num_query_tokens: int = _int(32)
    image_text_hidden_size: int = _int(256)
    pruned_heads: tuple[tuple[int, tuple[int, ...]], ...] = ()
    newly_initialised: tuple[tuple[str, str], ...] = ()
    tokenizer: str | None = None
    scan_layers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        parts: dict[str, type[_Config]] = {"vision_config": Blip2VisionConfig, "qformer_config": Blip2QFormerConfig}
        for name, part in parts.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, part.from_dict(value))
            elif not isinstance(value, part):
                raise InputError(f"{name} is {_short(value)}; it must be an object with the part's fields")
        pairs = self.pruned_heads.items() if isinstance(self.pruned_heads, Mapping) else self.pruned_heads
        try:
            pruned = {int(layer): tuple(sorted(set(map(operator.index, heads)))) for layer, heads in pairs}
        except (TypeError, ValueError):
            raise InputError("pruned_heads must map layer numbers to lists of head numbers") from None
        num_layers, num_heads = self.qformer_config.num_hidden_layers, self.qformer_config.num_attention_heads
        for layer, heads in pruned.items():
            if not 0 <= layer < num_layers:
                raise InputError(f"cannot prune layer {layer}: the Q-Former has layers 0 to {num_layers - 1}")
            wrong = [head for head in heads if not 0 <= head < num_heads]
            if wrong:
                raise InputError(f"cannot prune head {wrong[0]} of layer {layer}: heads are 0 to {num_heads - 1}")
        object.__setattr__(self, "pruned_heads", tuple(sorted((la, he) for la, he in pruned.items() if he)))
        named: Any = self.newly_initialised
        named = list(named.items()) if isinstance(named, Mapping) else named
        entries = named if isinstance(named, tuple | list) else [None]
        if not all(isinstance(pair, tuple | list) and list(map(type, pair)) == [str, str] for pair in entries):
            raise InputError("newly_initialised must map names of modules to how they were initialised")
        object.__setattr__(self, "newly_initialised", tuple(sorted(map(tuple, named))))
        if self.scan_layers:
            self._check_alike()

    def _check_alike(self) -> None:
        """Raise InputError if the layers cannot run in a loop."""
        qformer = self.qformer_config
        reason = ""
        if self.pruned_heads:
            reason = "a pruned model's layers differ from one another"
        elif qformer.num_hidden_layers % qformer.cross_attention_frequency:
            reason = f"{qformer.num_hidden_layers} layers are no groups of {qformer.cross_attention_frequency}"
        elif not qformer.num_hidden_layers or not self.vision_config.num_hidden_layers:
            reason = "a tower has none"
        if reason:
            raise InputError(f"the layers cannot be scanned: {reason}; leave `scan_layers` off")

    def scanned(self) -> Self:
        """The config with `scan_layers` if the layers can run in a loop, else unchanged."""
        try:
            return dataclasses.replace(self, scan_layers=True)
        except InputError:
            return self

    def recomputed(self) -> Self:
        """The config with `gradient_checkpointing` in both towers."""
        return dataclasses.replace(
            self,
            vision_config=dataclasses.replace(self.vision_config, gradient_checkpointing=True),
            qformer_config=dataclasses.replace(self.qformer_config, gradient_checkpointing=True),
        )

    def kept_heads(self, layer: int) -> tuple[int, ...]:
        """Remaining self-attention heads of a Q-Former layer, numbered as in the unpruned model."""
        pruned = dict(self.pruned_heads).get(layer, ())
        return tuple(head for head in range(self.qformer_config.num_attention_heads) if head not in pruned)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from the contents of a `config.json`.

        Raises:
          InputError: a part that upstream always writes is missing, or a field has an invalid value.
        """
        missing = [name for name in ("vision_config", "qformer_config", "num_query_tokens") if name not in values]
        if missing:
            raise InputError(f"the config has no {' and no '.join(missing)}; it is not that of a Blip2QFormerModel")
        return super().from_dict(values)

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a `config.json`; errors name the file."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The config as upstream's `save_pretrained` writes it, every field spelled out."""
        values = {
            "model_type": "blip-2",
            **super().to_dict(),
            "pruned_heads": {str(layer): list(heads) for layer, heads in self.pruned_heads},
            "newly_initialised": dict(self.newly_initialised),
        }
        del values["scan_layers"]
        if not self.newly_initialised:
            del values["newly_initialised"]
        # Upstream builds its tokenizer from this field, and reads null as a name.
        if self.tokenizer is None:
            del values["tokenizer"]
        return values


BLIP_DIFFUSION = Blip2Config(
    vision_config=Blip2VisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    qformer_config=Blip2QFormerConfig(vocab_size=30523, cross_attention_frequency=1),
    num_query_tokens=16,
)
"""The published geometry: CLIP ViT-L/14 without its last block, and a BERT-base Q-Former.

LAVIS's tower (`clip_vit.py`) normalises with PyTorch's eps of 1e-5. Converted diffusers checkpoints state their own.
"""

BLIP2_VIT_L = dataclasses.replace(
    BLIP_DIFFUSION,
    qformer_config=dataclasses.replace(BLIP_DIFFUSION.qformer_config, cross_attention_frequency=2),
    num_query_tokens=32,
)
"""LAVIS's stage-1 model `pretrain_vitL`."""
