"""Upstream's UNets and ControlNets on the cases of `unet_cases`."""

import inspect
import json
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


def record() -> dict[str, np.ndarray]:
    """The arrays of `diffusion_unet.npz`: feature maps are NHWC, gradients in the order of upstream's names."""
    answers: dict[str, np.ndarray] = {}
    control: dict[str, list[torch.Tensor]] = {}
    for label, config in unet_cases.CONTROLNETS.items():
        controlnet = build(ControlNetModel, config)
        inputs = tensors(unet_cases.inputs(config, label))
        output = controlnet(**inputs, conditioning_scale=unet_cases.CONDITIONING_SCALE)
        control[label] = [*output.down_block_res_samples, output.mid_block_res_sample]
        answers |= {f"controlnet/{label}/{i}": nhwc(value) for i, value in enumerate(control[label])}
        if label in unet_cases.WITH_GRADIENTS["controlnet"]:
            differentiate(answers, f"controlnet/{label}", controlnet, inputs, *control[label])
    for label, config in unet_cases.UNETS.items():
        unet = build(UNet2DConditionModel, config)
        inputs = tensors(unet_cases.inputs(config, label))
        residuals: dict[str, Any] = {}
        if label in unet_cases.CONTROLLED:
            *down, middle = control[label]
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        sample = unet(**inputs, **residuals).sample
        answers[f"{label}/sample"] = nhwc(sample)
        if label in unet_cases.WITH_GRADIENTS["unet"]:
            differentiate(answers, label, unet, inputs, sample)
    for kind in (UNet2DConditionModel, ControlNetModel):
        signature = inspect.signature(kind.__init__).parameters.values()
        defaults = {field.name: field.default for field in signature if field.name != "self"}
        answers[f"{kind.__name__}/defaults"] = np.array(json.dumps(defaults))
    return answers


def differentiate(
    answers: dict[str, np.ndarray],
    label: str,
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    *outputs: torch.Tensor,
) -> None:
    """Record the gradients of a weighted sum of the outputs."""
    weights = (cases.draw(f"loss {i}", nhwc(output).shape) for i, output in enumerate(outputs))
    loss = sum(
        (output.permute(0, 2, 3, 1) * torch.from_numpy(w)).sum() for output, w in zip(outputs, weights, strict=True)
    )
    loss.backward()
    answers[f"{label}/text_gradient"] = inputs["encoder_hidden_states"].grad.numpy()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    answers[f"{label}/gradients"] = np.concatenate([unet_cases.some(gradients[name]) for name in sorted(gradients)])


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Upstream's inputs: float64, images with channels first, text with a gradient."""
    made = {name: torch.from_numpy(value) for name, value in arrays.items()}
    doubles = {name: value.double() for name, value in made.items() if value.is_floating_point()}
    images = {name: value.permute(0, 3, 1, 2) for name, value in doubles.items() if value.dim() == 4}
    return {**made, **doubles, **images, "encoder_hidden_states": doubles["encoder_hidden_states"].requires_grad_()}


def nhwc(value: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().permute(0, 2, 3, 1).numpy())
