"""Upstream's answers for `AutoencoderKL`, small models. The configs are saved with the answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

import cases


def _levels(*channels: int, **fields: Any) -> dict[str, Any]:
    blocks = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    types = {name: [block] * len(channels) for name, block in blocks.items()}
    return {"block_out_channels": list(channels), "norm_num_groups": 2, **types, **fields}


CONFIGS: dict[str, dict[str, Any]] = {
    "two_levels": _levels(4, 8, sample_size=16),
    "three_levels": _levels(
        4,
        8,
        12,
        layers_per_block=2,
        latent_channels=3,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ),
    "four_levels": _levels(2, 4, 4, 8, in_channels=4),
}
PIXELS = {"two_levels": (2, 12, 19), "three_levels": (1, 16, 24), "four_levels": (1, 32, 41)}
"""Batch, height and width. Some sides do not divide by the downscale."""
TILED_PIXELS, TILED_LATENTS = (1, 26, 12), (1, 14, 12)
"""Pictures of several tiles for `two_levels`, of 16 pixels or 8 latents. Those at the edges are smaller."""


def record_diffusion_autoencoder(folder: Path) -> None:
    """Write `diffusion_autoencoder.npz`."""
    answers: dict[str, np.ndarray] = {}
    for label, values in CONFIGS.items():
        model = AutoencoderKL(**values).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(cases.weight(name, tuple(parameter.shape))))
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        answers[f"{label}/config"] = np.array(json.dumps(config))
        channels, latent_channels = model.config.in_channels, model.config.latent_channels
        pixels = image(f"{label} pixels", (*PIXELS[label], channels))
        distribution = model.encode(pixels).latent_dist
        latents = image(f"{label} latents", nhwc(distribution.mean).shape)
        decoded = model.decode(latents).sample
        outputs = {"mean": distribution.mean, "logvar": distribution.logvar, "decoded": decoded}
        for name, value in outputs.items():
            answers[f"{label}/{name}"] = nhwc(value)
        if label != "two_levels":
            continue

        sum((value * image(f"loss {name}", nhwc(value).shape)).sum() for name, value in outputs.items()).backward()
        for name, parameter in model.named_parameters():
            answers[f"{label}/gradient/{name}"] = parameter.grad.numpy()
        model.enable_tiling()
        with torch.no_grad():
            moments = model.encode(image("tiled pixels", (*TILED_PIXELS, channels))).latent_dist
            answers["tiled/mean"], answers["tiled/logvar"] = nhwc(moments.mean), nhwc(moments.logvar)
            latents = image("tiled latents", (*TILED_LATENTS, latent_channels))
            answers["tiled/decoded"] = nhwc(model.decode(latents).sample)
    cases.save(folder / "diffusion_autoencoder.npz", answers)


def image(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Seeded numbers, drawn in our layout (batch, height, width, channels), in upstream's layout."""
    return torch.from_numpy(cases.draw(name, shape)).to(torch.get_default_dtype()).permute(0, 3, 1, 2)


def nhwc(value: torch.Tensor) -> np.ndarray:
    return value.detach().permute(0, 2, 3, 1).numpy()
