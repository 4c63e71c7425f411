"""Small UNets and ControlNets, with weights and inputs, for upstream and for us."""

from typing import Any

import numpy as np

import cases

SD1: dict[str, Any] = {
    "in_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}

UNETS: dict[str, dict[str, Any]] = {
    "two_levels": {
        **SD1,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "downsample_padding": 0,
        "sample_size": 8,
    },
    # Stable Diffusion 2's form, and every other field that has a choice.
    "every_field": {
        **SD1,
        "in_channels": 5,
        "out_channels": 3,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [12, 16],
        "layers_per_block": [2, 1],
        "attention_head_dim": [3, 4],
        "transformer_layers_per_block": [1, 2],
        "only_cross_attention": [True, False],
        "use_linear_projection": True,
        "upcast_attention": True,
        "resnet_time_scale_shift": "scale_shift",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "center_input_sample": True,
        "norm_eps": 1e-4,
        "time_embedding_dim": 20,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
    },
    "one_level": {
        **SD1,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "block_out_channels": [8],
        "mid_block_type": "UNetMidBlock2D",
    },
}
UNETS["no_middle"] = {**UNETS["two_levels"], "mid_block_type": None, "downsample_padding": 1}

SIZES = {"two_levels": (8, 8), "every_field": (7, 10), "one_level": (4, 6), "no_middle": (5, 3)}
"""Height and width of the latents of each UNet."""

CONTROLNETS: dict[str, dict[str, Any]] = {
    "two_levels": {**SD1, "downsample_padding": 0, "conditioning_embedding_out_channels": [4, 6]},
    "every_field": {
        **SD1,
        "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "block_out_channels": [12, 16],
        "num_attention_heads": [3, 4],
        "mid_block_type": "UNetMidBlock2D",
        "resnet_time_scale_shift": "scale_shift",
        "conditioning_channels": 2,
        "controlnet_conditioning_channel_order": "bgr",
        "conditioning_embedding_out_channels": [4, 6, 8],
    },
}

CONDITIONING_SCALE = 0.7

CONTROLLED = ("two_levels",)
"""UNets that get the residuals of the ControlNet with the same label."""

WITH_GRADIENTS = {"unet": ("no_middle",), "controlnet": ("every_field",)}
"""Cases whose gradients are recorded, too; they take long to compile."""


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """`cases.weight`, for which these models' embeddings are layers like others."""
    return cases.weight(name.replace("embedding", "layer"), shape)


def inputs(config: dict[str, Any], label: str) -> dict[str, np.ndarray]:
    """Noisy latents (NHWC), a timestep for each, and text of seven tokens; for a ControlNet also a picture."""
    height, width = SIZES[label]
    arrays = {
        "sample": cases.draw(f"{label} sample", (2, height, width, config["in_channels"])),
        "timestep": np.array([981, 3]),
        "encoder_hidden_states": cases.draw(f"{label} text", (2, 7, config["cross_attention_dim"])),
    }
    if "conditioning_embedding_out_channels" in config:
        scale = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        shape = (2, scale * height, scale * width, config.get("conditioning_channels", 3))
        arrays["controlnet_cond"] = cases.draw(f"{label} picture", shape)
    return arrays


def full_inputs() -> dict[str, np.ndarray]:
    """Latents (NHWC), a timestep and text for the published UNet, and a picture for the published autoencoder."""
    return {
        "latents": cases.draw("full latents", (1, 32, 32, 4)),
        "timestep": np.array([501]),
        "text": cases.draw("full text", (1, 77, 768)),
        "pixels": np.clip(0.5 * cases.draw("full picture", (1, 256, 256, 3)), -1, 1),
    }


def some(gradient: np.ndarray) -> np.ndarray:
    """About a dozen numbers of a gradient in upstream's shape."""
    return np.ascontiguousarray(gradient.ravel()[:: max(1, gradient.size // 12) | 1])
