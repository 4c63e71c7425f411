"""Small pipelines, with weights and inputs, for upstream and for us."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import cases
import unet_cases

WIDTH, QUERIES = 24, 5
"""Width of the text encoder's states and of the subject vectors, and the number of vectors."""

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that CLIP's vocabulary writes as themselves; it shifts the others beyond 255."""

MERGES = ("d o", "do g</w>", "c a", "ca t</w>", "i n</w>", "t h", "th e</w>", "w a")


def vocabulary() -> dict[str, int]:
    """A vocabulary in CLIP's form: bytes, bytes that end a word, merges, start and end."""
    others = [byte for byte in range(256) if byte not in BYTES]
    alphabet = [chr(byte) for byte in BYTES] + [chr(256 + i) for i in range(len(others))]
    merged = ["".join(merge.split()) for merge in MERGES]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def write_tokenizer(folder: Path) -> None:
    """The files of a `CLIPTokenizer`, as upstream publishes them."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def qformer(vocabulary_size: int) -> dict[str, Any]:
    """The Q-Former's config for the embedded model's vocabulary."""
    config = json.loads(json.dumps(cases.GEOMETRIES["frequency_1"]))
    config["qformer_config"]["vocab_size"] = vocabulary_size
    return config


TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": len(vocabulary()),
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "projection_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "bos_token_id": len(vocabulary()) - 2,
    "eos_token_id": len(vocabulary()) - 1,
    "pad_token_id": len(vocabulary()) - 1,
}

VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
    "sample_size": 16,
}
"""Its latents have half the height and width of pictures."""

_UNET: dict[str, Any] = {
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}


def _unet(*channels: int) -> dict[str, Any]:
    attending = len(channels) - 1
    return {
        **_UNET,
        "block_out_channels": list(channels),
        "down_block_types": ["CrossAttnDownBlock2D"] * attending + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attending,
    }


UNETS = {"two": _unet(8, 16), "three": _unet(8, 8, 16), "four": _unet(8, 8, 8, 8)}

CONTROLNET: dict[str, Any] = {
    **_UNET,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "conditioning_embedding_out_channels": [4, 6],
}

SCHEDULER: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {**SCHEDULER, "skip_prk_steps": True, "set_alpha_to_one": False},
    "DDIMScheduler": {**SCHEDULER, "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1},
    "DPMSolverMultistepScheduler": SCHEDULER,
}


@dataclass(frozen=True)
class Drawing:
    """A call of a pipeline."""

    unet: str
    scheduler: str
    steps: int
    guidance: float
    size: tuple[int, int]
    prompts: tuple[str, ...] = ("in the water",)
    negative: str = ""
    controlled: bool = False


DRAWINGS = {
    "pndm": Drawing("three", "PNDMScheduler", 4, 3.0, (16, 16), negative="cat, cat"),
    "ddim_unguided": Drawing("two", "DDIMScheduler", 3, 1.0, (10, 14), ("in the water", " a very long text" * 20)),
    "dpm": Drawing("four", "DPMSolverMultistepScheduler", 3, 2.0, (18, 26), ("dog", "the cat ")),
    "control": Drawing("two", "PNDMScheduler", 3, 2.0, (12, 16), controlled=True),
}
SOURCE, TARGET = "dog", "cat"
STRENGTH, REPETITIONS = 0.5, 5


def photos(drawing: Drawing) -> list[PIL.Image.Image]:
    """One photo for each prompt."""
    return [cases.image("RGB", 40 + 10 * i, 60) for i in range(len(drawing.prompts))]


def conditioning(drawing: Drawing) -> PIL.Image.Image:
    """An image of another size than the picture."""
    return cases.image("RGB", 31, 45)


def latents(label: str) -> np.ndarray:
    """Noise (prompts, height / 2, width / 2, 4)."""
    drawing = DRAWINGS[label]
    height, width = drawing.size
    return cases.draw(f"latents {label}", (len(drawing.prompts), height // 2, width // 2, 4))


def weight(part: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of a part by upstream's name."""
    kind = unet_cases.weight if part in ("unet", "controlnet") else cases.weight
    return kind(name, shape)


def loss_inputs() -> dict[str, np.ndarray]:
    """Arguments of the denoising loss; the text is not padded to the encoder's length."""
    ids = np.random.RandomState(5).randint(0, len(vocabulary()) - 2, (2, 9))
    ids[:, 0], ids[0, -1], ids[1, 6:] = len(vocabulary()) - 2, len(vocabulary()) - 1, len(vocabulary()) - 1
    return {
        "latents": cases.draw("loss latents", (2, 8, 6, 4)),
        "noise": cases.draw("loss noise", (2, 8, 6, 4)),
        "timesteps": np.array([7, 950]),
        "input_ids": ids,
        "subject_embeddings": cases.draw("loss subjects", (1, QUERIES, WIDTH)),
    }
