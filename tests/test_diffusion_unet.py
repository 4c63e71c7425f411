"""The UNet and the ControlNet beside upstream's, and what their configs refuse."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import unet_cases
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.diffusion.controlnet import ControlNetConfig, ControlNetModel
from flax_qformer.diffusion.unet import UNet2DConditionConfig, UNet2DConditionModel
from flax_qformer.errors import InputError

Golden = Callable[[str], dict[str, Any]]
Tree = Any


def seeded(model: nn.Module, inputs: dict[str, Any]) -> Tree:
    """The parameters of the cases."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]

    def weight(path: Any, leaf: Any) -> np.ndarray:
        row = parameter_at(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
        value = unet_cases.weight(row.name, row.torch_shape).transpose(row.order).reshape(row.shape)
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(weight, shapes)


def unet_case(label: str, **attributes: Any) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    values = unet_cases.UNETS[label]
    return UNet2DConditionModel(UNet2DConditionConfig.from_dict(values), **attributes), unet_cases.inputs(values, label)


def controlnet_case(label: str) -> tuple[ControlNetModel, dict[str, Any]]:
    values = unet_cases.CONTROLNETS[label]
    return ControlNetModel(ControlNetConfig.from_dict(values)), unet_cases.inputs(values, label)


def agrees(value: jax.Array, expected: np.ndarray) -> None:
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, atol=cases.ROUNDING * max(1, np.abs(expected).max() / 4), rtol=0)


def differentiated(model: nn.Module, params: Tree, inputs: dict[str, Any]) -> tuple[list[jax.Array], Tree, jax.Array]:
    """The outputs, and the gradients of a weighted sum of them for the parameters and for the text."""

    def loss(params: Tree, text: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        outputs = jax.tree.leaves(model.apply({"params": params}, **inputs | {"encoder_hidden_states": text}))
        weights = (cases.draw(f"loss {i}", output.shape) for i, output in enumerate(outputs))
        return sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)), outputs

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, outputs = run(params, inputs["encoder_hidden_states"])
    return outputs, *gradients


def gradients_agree(found: Tree, of_text: jax.Array, label: str, answers: dict[str, Any]) -> None:
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


def residuals(answers: dict[str, Any], label: str) -> list[np.ndarray]:
    """Upstream's ControlNet residuals, the mid block's last."""
    prefix = f"controlnet/{label}/"
    numbers = sorted(int(name.removeprefix(prefix)) for name in answers if name[len(prefix) :].isdigit())
    return [answers[f"{prefix}{i}"] for i in numbers]


@pytest.mark.parametrize("label", unet_cases.UNETS)
def test_unet_equals_upstream(golden: Golden, label: str) -> None:
    with_gradients = label in unet_cases.WITH_GRADIENTS["unet"]
    # The ControlNet's gradients are compared without recomputation.
    model, inputs = unet_case(label, gradient_checkpointing=with_gradients)
    answers = golden("diffusion_unet")
    params = seeded(model, inputs)
    if label in unet_cases.CONTROLLED:
        *down, middle = residuals(answers, label)
        inputs |= {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
    if with_gradients:
        (sample,), *gradients = differentiated(model, params, inputs)
        gradients_agree(*gradients, label, answers)
    else:
        sample = jax.jit(model.apply)({"params": params}, **inputs).sample
    agrees(sample, answers[f"{label}/sample"])


@pytest.mark.parametrize("label", unet_cases.CONTROLNETS)
def test_controlnet_equals_upstream(golden: Golden, label: str) -> None:
    model, inputs = controlnet_case(label)
    answers = golden("diffusion_unet")
    params = seeded(model, inputs)
    inputs |= {"conditioning_scale": unet_cases.CONDITIONING_SCALE}
    if label in unet_cases.WITH_GRADIENTS["controlnet"]:
        found, *gradients = differentiated(model, params, inputs)
        gradients_agree(*gradients, f"controlnet/{label}", answers)
    else:
        found = jax.tree.leaves(jax.jit(model.apply)({"params": params}, **inputs))
    for value, expected in zip(found, residuals(answers, label), strict=True):
        agrees(value, expected)


@pytest.mark.slow
def test_gradient_checkpointing_keeps_less() -> None:
    def kept_bytes(gradient_checkpointing: bool) -> int:
        """Bytes that a gradient keeps between the forward and the backward pass."""
        model, _ = unet_case("one_level", gradient_checkpointing=gradient_checkpointing)

        def backward(params: Tree) -> Any:
            return jax.vjp(lambda params: model.apply({"params": params}, **inputs).sample, params)[1]

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(backward, params)))

    model, inputs = unet_case("one_level")
    inputs |= {"sample": jnp.ones((2, 32, 32, 4))}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    assert kept_bytes(True) < kept_bytes(False) / 4


def test_one_timestep_serves_a_batch_in_bfloat16(golden: Golden) -> None:
    model, inputs = unet_case("one_level", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    first = {name: np.repeat(value[:1], 2, axis=0) for name, value in inputs.items()} | {"timestep": 981}
    params = seeded(model, first)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    sample = jax.jit(model.apply)({"params": params}, **first).sample
    assert sample.dtype == jnp.bfloat16
    expected = golden("diffusion_unet")["one_level/sample"][0]
    for value in sample.astype(jnp.float32):
        assert np.linalg.norm(value - expected) < 0.03 * np.linalg.norm(expected)


def test_dropout_changes_the_sample_in_training_only() -> None:
    model, inputs = unet_case("one_level")
    model = UNet2DConditionModel(dataclasses.replace(model.config, dropout=0.5))
    params = seeded(model, inputs)

    @jax.jit
    def run(seed: int) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, **inputs, deterministic=False, rngs=rngs).sample

    assert not np.allclose(run(0), run(1))
    np.testing.assert_array_equal(run(0), run(0))


def test_untrained_controlnet_changes_nothing() -> None:
    values = unet_cases.CONTROLNETS["two_levels"]
    one_level = {"down_block_types": ["DownBlock2D"], "block_out_channels": [8], "mid_block_type": "UNetMidBlock2D"}
    model = ControlNetModel(ControlNetConfig.from_dict({**values, **one_level}))
    inputs = unet_cases.inputs(values, "two_levels")
    output, variables = jax.jit(model.init_with_output)(jax.random.key(0), **inputs)
    assert len(output.down_block_res_samples) == 2
    assert not any(leaf.any() for leaf in jax.tree.leaves(output))
    assert variables["params"]["conv_in"]["kernel"].any()


@pytest.mark.parametrize("kind", [UNet2DConditionConfig, ControlNetConfig])
def test_every_field_of_upstream_is_accounted_for(golden: Golden, kind: Any) -> None:
    name = kind.__name__.replace("Config", "Model")
    upstream = json.loads(str(golden("diffusion_unet")[f"{name}/defaults"]))
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    assert upstream.keys() == fields.keys() | kind.FIXED.keys() | kind.IGNORED
    for field, default in upstream.items():
        if field in fields:
            assert fields[field] == (tuple(default) if isinstance(default, list) else default), field
        elif field in kind.FIXED:
            assert default in kind.FIXED[field], field
    assert kind.from_dict(upstream) == kind()
    assert kind.from_dict(kind().to_dict()) == kind()


UNSUPPORTED = [
    ("act_fn", "gelu"),
    ("addition_embed_type", "text_time"),
    ("attention_head_dim", [8, 8]),
    ("attention_head_dim", 7),
    ("block_out_channels", []),
    ("block_out_channels", [320, "640", 1280, 1280]),
    ("block_out_channels", [320, 640, 1280, 10**9]),
    ("class_embed_type", "timestep"),
    ("cross_attention_dim", [768, 768, 768, 768]),
    ("down_block_types", ["DownBlock2D"]),
    ("down_block_types", ["AttnDownBlock2D"] * 4),
    ("downsample_padding", 2),
    ("encoder_hid_dim", 1024),
    ("flip_sin_to_cos", 1),
    ("freq_shift", 160),
    ("layers_per_block", [2, 2]),
    ("layers_per_block", 0),
    ("mid_block_scale_factor", 1.5),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("norm_eps", float("inf")),
    ("norm_num_groups", 7),
    ("norm_num_groups", None),
    ("num_class_embeds", 10),
    ("only_cross_attention", [True]),
    ("resnet_time_scale_shift", "ada_group"),
    ("transformer_layers_per_block", [[1], [1], [1], [1]]),
    ("transformer_layers_per_block", -1),
    ("a_field_of_tomorrow", True),
]
OF_UNET = [
    ("attention_type", "gated"),
    ("conv_in_kernel", 4),
    ("dropout", 2),
    ("dual_cross_attention", True),
    ("num_attention_heads", 8),
    ("reverse_transformer_layers_per_block", [1, 1, 1, 1]),
    ("time_cond_proj_dim", 256),
    ("time_embedding_type", "fourier"),
    ("up_block_types", ["UpBlock2D"]),
    ("up_block_types", ["AttnUpBlock2D"] * 4),
]
OF_CONTROLNET = [
    ("conditioning_embedding_out_channels", []),
    ("controlnet_conditioning_channel_order", "hsv"),
    ("global_pool_conditions", True),
    ("mid_block_type", None),
    ("num_attention_heads", [8]),
    ("num_attention_heads", 7),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(UNet2DConditionConfig, *case) for case in UNSUPPORTED + OF_UNET]
    + [(ControlNetConfig, *case) for case in UNSUPPORTED + OF_CONTROLNET],
)
def test_config_names_the_field_that_it_refuses(kind: Any, field: str, value: Any) -> None:
    # Heads of the ControlNet are `attention_head_dim` unless `num_attention_heads` is there.
    with pytest.raises(InputError, match=rf"{kind.__name__}.*({field}|attention_head_dim)"):
        kind.from_dict({field: value})


def test_wrong_shapes_are_named() -> None:
    unet, inputs = unet_case("one_level")
    controlnet, control = controlnet_case("every_field")
    middle = jnp.zeros((2, 4, 6, 8))
    wrong = [
        (unet, inputs, {"sample": jnp.ones((2, 4, 6, 3))}, "sample.*3.*, 4"),
        (unet, inputs, {"encoder_hidden_states": jnp.ones((2, 7, 13))}, "encoder_hidden_states.*13.*12"),
        (unet, inputs, {"encoder_hidden_states": jnp.ones((3, 7, 12))}, "encoder_hidden_states.*3.*2, tokens"),
        (unet, inputs, {"mid_block_additional_residual": middle}, "2 down_block_additional_residuals"),
        (unet, inputs, {"down_block_additional_residuals": (middle,) * 2}, "mid_block_additional_residual"),
        (controlnet, control, {"controlnet_cond": jnp.ones((2, 7, 10, 2))}, r"controlnet_cond.*2, 28, 40, 2"),
    ]
    for model, arguments, change, message in wrong:
        with pytest.raises(InputError, match=message):
            jax.eval_shape(lambda m=model, a=arguments | change: m.init(jax.random.key(0), **a))
