"""The UNet and the ControlNet beside upstream's, and what their configs refuse."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import cases
import unet_cases
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.diffusion.controlnet import ControlNetConfig, ControlNetModel
from flax_qformer.diffusion.unet import UNet2DConditionConfig, UNet2DConditionModel

Golden = Callable[[str], dict[str, Any]]
Tree = Any


def rows(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows of the model's parameters by their paths."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    flat = jax.tree_util.tree_leaves_with_path(shapes)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in flat}
    return {path: parameter_at(path, shape) for path, shape in paths.items()}


def seeded(model: nn.Module, inputs: dict[str, Any]) -> Tree:
    """The parameters of the cases."""
    params: Tree = {}
    for path, row in rows(model, inputs).items():
        value = unet_cases.weight(row.name, row.torch_shape)
        *parents, last = path.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value.transpose(row.order).reshape(row.shape)
    return params


def unet_case(label: str, **changes: Any) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    values = unet_cases.UNETS[label]
    config = dataclasses.replace(UNet2DConditionConfig.from_dict(values), **changes)
    return UNet2DConditionModel(config), unet_cases.inputs(values, label)


def controlnet_case(label: str) -> tuple[ControlNetModel, dict[str, Any]]:
    values = unet_cases.CONTROLNETS[label]
    inputs = {**unet_cases.inputs(unet_cases.UNETS[label], label), **unet_cases.inputs(values, label)}
    return ControlNetModel(ControlNetConfig.from_dict(values)), inputs


def agrees(value: jax.Array, expected: np.ndarray) -> None:
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, atol=cases.ROUNDING * max(1, np.abs(expected).max() / 4), rtol=0)


def gradients_agree(model: nn.Module, params: Tree, inputs: dict[str, Any], label: str, answers: Any) -> None:
    """Compare the gradients of a weighted sum of the outputs, for all parameters and for the text."""

    def loss(params: Tree, text: jax.Array) -> jax.Array:
        outputs = jax.tree.leaves(model.apply({"params": params}, **inputs | {"encoder_hidden_states": text}))
        weights = (cases.draw(f"loss {i}", output.shape) for i, output in enumerate(outputs))
        return sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))

    found, of_text = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, inputs["encoder_hidden_states"])
    expected = answers[f"{label}/text_gradient"]
    assert np.linalg.norm(of_text - expected) < 1e-4 * np.linalg.norm(expected)
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        row = parameter_at(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
        arrays[row.name] = unet_cases.some(row.to_torch(np.asarray(leaf)))
    names = sorted(arrays)
    ends = np.cumsum([arrays[name].size for name in names])
    assert ends[-1] == answers[f"{label}/gradients"].size
    expected = dict(zip(names, np.split(answers[f"{label}/gradients"], ends[:-1]), strict=True))
    error, name = cases.gradient_error(arrays, expected)
    assert error < 1e-4, name


def control(golden: Golden, label: str) -> dict[str, Any]:
    """A UNet's inputs from upstream's ControlNet."""
    answers = golden("diffusion_unet")
    *down, middle = (answers[f"controlnet/{label}/{i}"] for i in range(len(down_names(answers, label))))
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def down_names(answers: dict[str, Any], label: str) -> list[str]:
    return [name for name in answers if name.startswith(f"controlnet/{label}/") and name.rpartition("/")[2].isdigit()]


@pytest.mark.parametrize("label", unet_cases.UNETS)
def test_unet_equals_upstream(golden: Golden, label: str) -> None:
    model, inputs = unet_case(label)
    answers = golden("diffusion_unet")
    if label == "four_levels":
        inputs |= control(golden, label)
    params = seeded(model, inputs)
    agrees(jax.jit(model.apply)({"params": params}, **inputs).sample, answers[f"{label}/sample"])
    gradients_agree(model, params, inputs, label, answers)


@pytest.mark.parametrize("label", unet_cases.CONTROLNETS)
def test_controlnet_equals_upstream(golden: Golden, label: str) -> None:
    model, inputs = controlnet_case(label)
    answers, scaled = golden("diffusion_unet"), inputs | {"conditioning_scale": unet_cases.CONDITIONING_SCALE}
    params = seeded(model, inputs)
    output = jax.jit(model.apply)({"params": params}, **scaled)
    residuals = [*output.down_block_res_samples, output.mid_block_res_sample]
    assert len(residuals) == len(down_names(answers, label))
    for i, residual in enumerate(residuals):
        agrees(residual, answers[f"controlnet/{label}/{i}"])
    gradients_agree(model, params, scaled, f"controlnet/{label}", answers)
