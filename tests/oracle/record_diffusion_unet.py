"""Upstream's UNets and ControlNets on the cases of `unet_cases`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

import cases
import unet_cases


def build(kind: type[torch.nn.Module], config: dict[str, Any]) -> torch.nn.Module:
    model = kind(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(unet_cases.weight(name, tuple(parameter.shape))))
    return model


def record_diffusion_unet(folder: Path) -> None:
    """Write `diffusion_unet.npz`: feature maps are NHWC, gradients in the order of upstream's names."""
    answers: dict[str, np.ndarray] = {}
    for label, config in unet_cases.UNETS.items():
        unet = build(UNet2DConditionModel, config)
        inputs = tensors(unet_cases.inputs(config, label))
        inputs["encoder_hidden_states"].requires_grad_()
        residuals = {}
        if label in unet_cases.CONTROLNETS and label == "four_levels":
            residuals = control(answers, label, inputs)
        sample = unet(**inputs, **residuals).sample
        answers[f"{label}/sample"] = nhwc(sample)
        differentiate(answers, label, unet, inputs, sample)
    label = "three_levels"
    control(answers, label, tensors(unet_cases.inputs(unet_cases.CONTROLNETS[label], label)))
    cases.save(folder / "diffusion_unet.npz", answers)


def control(answers: dict[str, np.ndarray], label: str, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Record a ControlNet, and return its residuals for a UNet."""
    config = unet_cases.CONTROLNETS[label]
    controlnet = build(ControlNetModel, config)
    picture = tensors(unet_cases.inputs(config, label))["controlnet_cond"]
    text = inputs["encoder_hidden_states"].detach().requires_grad_()
    inputs = {**inputs, "controlnet_cond": picture, "encoder_hidden_states": text}
    output = controlnet(**inputs, conditioning_scale=unet_cases.CONDITIONING_SCALE)
    residuals = [*output.down_block_res_samples, output.mid_block_res_sample]
    answers |= {f"controlnet/{label}/{i}": nhwc(value) for i, value in enumerate(residuals)}
    differentiate(answers, f"controlnet/{label}", controlnet, inputs, *residuals)
    *down, middle = (value.detach() for value in residuals)
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def differentiate(
    answers: dict[str, np.ndarray],
    label: str,
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    *outputs: torch.Tensor,
) -> None:
    """Record the gradients of a weighted sum of the outputs."""
    weights = (cases.draw(f"loss {i}", nhwc(output).shape) for i, output in enumerate(outputs))
    loss = sum((output.permute(0, 2, 3, 1) * torch.from_numpy(w)).sum() for output, w in zip(outputs, weights))
    loss.backward()
    answers[f"{label}/text_gradient"] = inputs["encoder_hidden_states"].grad.numpy()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    answers[f"{label}/gradients"] = np.concatenate([unet_cases.some(gradients[name]) for name in sorted(gradients)])


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    made = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return {
        name: value if value.dim() == 1 else (value.permute(0, 3, 1, 2) if value.dim() == 4 else value).double()
        for name, value in made.items()
    }


def nhwc(value: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().permute(0, 2, 3, 1).numpy())
