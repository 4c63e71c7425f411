"""Prompts to token ids of the text encoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def build_prompts(prompts: Sequence[str], targets: Sequence[str], strength: float, repetitions: int) -> list[str]:
    """Name the subject in each prompt, and repeat it `strength * repetitions` times, at least once, to strengthen it.

    Source: diffusers `BlipDiffusionPipeline._build_prompt`.
    """
    count = max(1, int(strength * repetitions))
    named = (f"a {target} {prompt.strip()}" for prompt, target in zip(prompts, targets, strict=True))
    return [", ".join([prompt] * count) for prompt in named]


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> np.ndarray:
    """Token ids (texts, length) int32, cut or padded to the length.

    tokenizer: transformers' `CLIPTokenizer`.
    """
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return np.asarray(tokens["input_ids"], np.int32)
