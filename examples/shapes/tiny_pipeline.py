"""Write the drawing half of the embedded default, beside its trained Q-Former: `python tiny_pipeline.py`.

The parts are tiny, and their weights are random, from a seed: what the pipeline draws is noise. Pictures are 64x64.
"""

import shutil
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from flax_qformer.checkpoints.model_files import DEFAULT_MODEL, DEFAULT_PIPELINE
from flax_qformer.checkpoints.parts import DRAWING_PARTS, DrawingPart, LoadedPart, part_rows
from flax_qformer.checkpoints.pipelines import INDEX, LAVIS_SCHEDULER, pipeline_index
from flax_qformer.checkpoints.writing import write_files, write_tensors
from flax_qformer.diffusion.autoencoder import AutoencoderConfig
from flax_qformer.diffusion.config import PartConfig
from flax_qformer.diffusion.text_encoder import CLIPTextConfig
from flax_qformer.diffusion.unet import UNet2DConditionConfig
from flax_qformer.json_files import json_bytes
from flax_qformer.models.config import Blip2Config
from start import WORDS, draw_weight

START, END = "<|startoftext|>", "<|endoftext|>"
SIDE = 64


def main() -> None:
    shutil.rmtree(DEFAULT_PIPELINE, ignore_errors=True)
    write_files(DEFAULT_PIPELINE, {INDEX: json_bytes(pipeline_index(LAVIS_SCHEDULER["_class_name"]))})
    write_files(DEFAULT_PIPELINE / "scheduler", {"scheduler_config.json": json_bytes(LAVIS_SCHEDULER)})
    vocabulary, merges = byte_pairs(WORDS)
    parts = configs(len(vocabulary))
    for seed, (name, config) in enumerate(parts.items()):
        part = DRAWING_PARTS[name]
        folder = DEFAULT_PIPELINE / name
        write_files(folder, {"config.json": json_bytes(part.config_values(config))})
        loaded = LoadedPart(part, part.config_values(config), config, random_params(part, config, seed))
        write_tensors(folder / f"{part.weights}.safetensors", loaded.tensors())
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}
    files = {
        "vocab.json": json_bytes({token: i for i, token in enumerate(vocabulary)}),
        "merges.txt": ("\n".join(lines) + "\n").encode(),
        "tokenizer_config.json": json_bytes(settings),
    }
    write_files(DEFAULT_PIPELINE / "tokenizer", files)


def configs(vocab_size: int) -> dict[str, PartConfig]:
    width = Blip2Config.from_json(DEFAULT_MODEL / "config.json").qformer_config.hidden_size
    return {
        "text_encoder": CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
        ),
        "unet": UNet2DConditionConfig(
            sample_size=SIDE // 8,
            block_out_channels=(24, 48),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=width,
            norm_num_groups=8,
        ),
        "vae": AutoencoderConfig(
            sample_size=SIDE,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ),
    }


def byte_pairs(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A vocabulary in the form of CLIP's that spells any text, with each of these words as one token.

    Returns:
      The tokens in the order of their ids, and the pairs that merge, first ones first.
    """
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        # The merges of earlier words come first when a text is split, and so they do here.
        for pair in merges:
            pieces = _merged(pieces, pair)
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = _merged(pieces, (pieces[0], pieces[1]))
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    return [*tokens, START, END], list(merges)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def _byte_letters() -> list[str]:
    """CLIP's letter for each byte: itself where it prints, else one from 256 up."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) for byte in printing] + [chr(256 + i) for i in range(len(others))]


def random_params(part: DrawingPart, config: PartConfig, seed: int) -> dict[str, Any]:
    """Random parameters, as `draw_weight` draws them."""
    rng = np.random.default_rng(seed)
    params = {row.path: draw_weight(rng, row, row.shape) for row in part_rows(part, config)}
    return unflatten_dict(params, sep="/")


if __name__ == "__main__":
    main()
