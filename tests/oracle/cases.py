"""Inputs and weights of all cases, for upstream and for us: numpy only, from seeds that no numpy release changes."""

import copy
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

_BASE: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "qformer_config": {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 24,
        "cross_attention_frequency": 1,
    },
    "num_query_tokens": 5,
}


def _geometry(vision: dict[str, Any], qformer: dict[str, Any], num_query_tokens: int) -> dict[str, Any]:
    return {
        "vision_config": {**_BASE["vision_config"], **vision},
        "qformer_config": {**_BASE["qformer_config"], **qformer},
        "num_query_tokens": num_query_tokens,
    }


GEOMETRIES: dict[str, dict[str, Any]] = {
    "frequency_1": _BASE,
    # No qkv bias, odd head counts, an image side that the patch size does not divide, upstream's eps, chunks.
    "frequency_2": _geometry(
        {
            "hidden_size": 30,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "image_size": 30,
            "patch_size": 7,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": False,
        },
        {
            "hidden_size": 28,
            "num_hidden_layers": 4,
            "num_attention_heads": 7,
            "hidden_act": "gelu_new",
            "cross_attention_frequency": 2,
            "chunk_size_feed_forward": 1,
        },
        3,
    ),
    # One head, one query, a padding token other than 0, layers after the last cross-attention.
    "frequency_3": _geometry(
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "relu"},
        {
            "hidden_size": 20,
            "num_hidden_layers": 5,
            "num_attention_heads": 5,
            "hidden_act": "silu",
            "cross_attention_frequency": 3,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 7,
        },
        1,
    ),
}
"""Small models, as `config.json` has them."""

PRUNED: dict[str, dict[int, list[int]]] = {
    "frequency_1": {0: [1], 2: [0, 2]},
    "frequency_2": {1: [0, 3, 6], 3: list(range(7))},
}

IMAGE_SIZES = (21, 28, 61, 112)
"""To which positions are interpolated."""

LENGTHS = (6, 9, 2)
"""Tokens of the texts in a batch; the shorter ones are padded."""

TEXTS = (
    "dog",
    "A red circle left of a blue square!",
    "  Two   BLACK cats,under the tréé\n",
    "",
    "[DEC] a photo of [MASK] and [SEP]",
    "中文 mixed with teapot's emoji 🙂",
    "x" * 30,
    "can't e-mail #1 (3.14%)",
)
"""What is tokenised with the vocabulary of the embedded model."""

IMAGE_MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "I;16",
)

ROUNDING = 2e-5
"""How far float32 on CPU may be from upstream, values being around 4."""


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers, seeded by a name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter by upstream's name: random everywhere, scaled so that activations stay around 1."""
    value = draw(name, shape)
    if name.endswith(".bias"):
        return 0.1 * value
    if "norm" in name.lower():
        return 1 + 0.1 * value
    if ("embedding" in name and "patch" not in name) or name == "query_tokens":
        return 0.5 * value
    return value * np.float32(max(np.prod(shape[1:]), 1) ** -0.5)


def batch(geometry: str) -> dict[str, np.ndarray]:
    """A batch of images and padded texts, with every mask that a model accepts."""
    config = GEOMETRIES[geometry]
    vision, qformer, queries = config["vision_config"], config["qformer_config"], config["num_query_tokens"]
    size, heads, layers = vision["image_size"], qformer["num_attention_heads"], qformer["num_hidden_layers"]
    rng = np.random.RandomState(zlib.crc32(geometry.encode()))
    images, length, total = len(LENGTHS), max(LENGTHS), max(LENGTHS) + queries
    image_tokens = (size // vision["patch_size"]) ** 2 + 1
    attention_mask = (np.arange(length) < np.array(LENGTHS)[:, None]).astype(np.int64)
    input_ids = rng.randint(8, qformer["vocab_size"], (images, length))
    input_ids = np.where(attention_mask == 1, input_ids, qformer.get("pad_token_id", 0))
    mask_3d = (rng.uniform(size=(images, total, total)) < 0.7) | np.eye(total, dtype=bool)
    image_mask_3d = rng.uniform(size=(images, queries, image_tokens)) < 0.7
    image_mask_3d[..., 0] = True
    image_mask = (rng.uniform(size=(images, image_tokens)) < 0.6).astype(np.int64)
    image_mask[-1] = 0  # an image that is fully masked
    return {
        "pixel_values": draw(f"{geometry} pixels", (images, size, size, 3)),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mask_3d": mask_3d.astype(np.int64),
        "image_mask": image_mask,
        "image_mask_3d": image_mask_3d.astype(np.int64),
        "head_mask_1d": rng.uniform(size=heads).astype(np.float32),
        "head_mask_2d": (rng.uniform(size=(layers, heads)) < 0.6).astype(np.float32),
    }


def dropouts(geometry: str) -> dict[str, dict[str, Any]]:
    """The geometry with one dropout, named by `name`, switched on.

    Dropout with rate 1 is deterministic, and shows each place that has dropout.
    """
    rates = {
        "hidden": ("qformer_config", "hidden_dropout_prob"),
        "attention": ("qformer_config", "attention_probs_dropout_prob"),
        "vision": ("vision_config", "attention_dropout"),
    }
    configs = {label: copy.deepcopy(GEOMETRIES[geometry]) for label in rates}
    for label, config in configs.items():
        for other, (part, name) in rates.items():
            config[part][name] = float(other == label)
    return configs


IN_LOSS = ("last_hidden_state", "query_embeddings")


def loss(outputs: Mapping[str, Any], array: Callable[[np.ndarray], Any] = np.asarray) -> Any:
    """The differentiated loss: a weighted sum of the outputs; `array` converts the weights to the outputs' type."""
    weights = {name: array(draw(f"loss {name}", tuple(outputs[name].shape))) for name in IN_LOSS}
    return sum((outputs[name] * weights[name]).sum() for name in IN_LOSS)


def image(mode: str, height: int = 57, width: int = 83) -> PIL.Image.Image:
    """An image with edges and noise, in a mode of Pillow."""
    rng = np.random.RandomState(zlib.crc32(mode.encode()))
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, ((x // 9 + y // 9) % 2) * 255, (x + y) % 256], axis=-1)
    pixels = np.clip(smooth + rng.randint(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    rgb = PIL.Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    if mode in ("I", "F", "I;16"):
        values = pixels[..., 0].astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode])
        return PIL.Image.fromarray(values * (3 if mode == "I;16" else 1))
    if mode == "LAB":
        return PIL.Image.merge("LAB", rgb.split())
    if mode == "RGBA":
        return PIL.Image.fromarray(pixels)
    return PIL.Image.fromarray(pixels).convert("RGBa") if mode == "RGBa" else rgb.convert(mode)


KEY_BIASES = ("key.bias", "k_proj.bias", "to_k.bias")
"""Ends of the names of attention's key biases in upstream's parts."""


def gradient_error(gradients: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest relative error of a gradient, and the parameter's name.

    Key biases have no gradient, because softmax cancels them; both sides hold rounding errors, compared with the rest.
    """
    norms = {name: float(np.linalg.norm(value)) for name, value in expected.items()}
    rest = max(norms.values())
    errors = {
        name: float(np.linalg.norm(gradients[name] - value)) / (rest if name.endswith(KEY_BIASES) else norms[name])
        for name, value in expected.items()
        if value.size
    }
    return max((error, name) for name, error in errors.items())


def full_batch() -> dict[str, np.ndarray]:
    """Two images and padded texts for the published geometry."""
    rng = np.random.RandomState(0)
    attention_mask = (np.arange(7) < np.array([[7], [4]])).astype(np.int32)
    input_ids = (rng.randint(1000, 30000, (2, 7)) * attention_mask).astype(np.int32)
    return {
        "pixel_values": draw("full pixels", (2, 224, 224, 3)),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
    }


def sample(name: str, gradient: np.ndarray) -> np.ndarray:
    """A few thousand numbers of a gradient; for an embedding table, from the rows that were used."""
    if name.endswith("embeddings.weight"):
        gradient = gradient[np.abs(gradient).max(axis=1) > 0]
    return np.ascontiguousarray(gradient.ravel()[:: max(1, gradient.size // 2000) | 1])


def save(file: Path, answers: dict[str, np.ndarray]) -> None:
    """Save upstream's answers; float64 answers as float32."""
    floats = {name: value.astype(np.float32) for name, value in answers.items() if value.dtype == np.float64}
    np.savez_compressed(file, **answers | floats)
    print(f"{file.stem}: {len(answers)} arrays")
