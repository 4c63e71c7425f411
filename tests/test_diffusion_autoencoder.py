"""The autoencoder against upstream's recorded answers, in one piece and in tiles, and the names of its checkpoints."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import cases
from flax_qformer import InputError
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.convert.tables.vae import has_old_names, old_name
from flax_qformer.diffusion.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussianDistribution

PIXELS = {"two_levels": (2, 12, 19, 3), "three_levels": (1, 16, 24, 3), "four_levels": (1, 32, 41, 4)}
TWO_LEVELS = {
    "block_out_channels": [4, 8],
    "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.fixture(scope="module")
def answers(golden: Any) -> dict[str, Any]:
    return golden("diffusion_autoencoder")


def model_of(answers: dict[str, Any], label: str, **details: Any) -> AutoencoderKL:
    return AutoencoderKL(AutoencoderConfig.from_dict(json.loads(str(answers[f"{label}/config"]))), **details)


def params_of(model: AutoencoderKL) -> dict[str, Any]:
    """The weights that upstream had, by its names."""
    side = model.config.downscale
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, model.config.in_channels)))
    rows = [parameter_at(path, leaf.shape) for path, leaf in flatten_dict(shapes["params"], sep="/").items()]
    weights = {row: cases.weight(row.name, row.torch_shape) for row in rows}
    flat = {row.path: jnp.asarray(weight.transpose(row.order).reshape(row.shape)) for row, weight in weights.items()}
    return unflatten_dict(flat, sep="/")


def run(model: AutoencoderKL, params: Any, pixels: Any, latents: Any) -> dict[str, jax.Array]:
    distribution = model.apply({"params": params}, pixels, method="encode")
    decoded = model.apply({"params": params}, latents, method="decode")
    return {"mean": distribution.mean, "logvar": distribution.logvar, "decoded": decoded}


jitted = jax.jit(run, static_argnums=0)


def check(outputs: dict[str, jax.Array], answers: dict[str, Any], label: str) -> None:
    for name, value in outputs.items():
        expected = answers[f"{label}/{name}"]
        assert value.shape == expected.shape
        np.testing.assert_allclose(value, expected, atol=cases.ROUNDING, rtol=0, err_msg=name)


@pytest.mark.parametrize("label", ["two_levels", "three_levels", pytest.param("four_levels", marks=pytest.mark.slow)])
def test_equals_upstream(answers: dict[str, Any], label: str) -> None:
    """With two, three and four levels, with and without attention, and sides that do not divide."""
    model = model_of(answers, label)
    pixels = cases.draw(f"{label} pixels", PIXELS[label])
    latents = cases.draw(f"{label} latents", answers[f"{label}/mean"].shape)
    check(jitted(model, params_of(model), pixels, latents), answers, label)


def test_gradients_equal_upstream(answers: dict[str, Any]) -> None:
    model, label = model_of(answers, "two_levels"), "two_levels"
    pixels = cases.draw(f"{label} pixels", PIXELS[label])
    latents = cases.draw(f"{label} latents", answers[f"{label}/mean"].shape)

    def loss(params: Any) -> jax.Array:
        outputs = run(model, params, pixels, latents)
        weighted = [(value * cases.draw(f"loss {name}", value.shape)).sum() for name, value in outputs.items()]
        return sum(weighted, jnp.zeros(()))

    flat = flatten_dict(jax.jit(jax.grad(loss))(params_of(model)), sep="/")
    rows = [parameter_at(path, value.shape) for path, value in flat.items()]
    by_name = {row.name: row.to_torch(np.asarray(flat[row.path])) for row in rows}
    prefix = f"{label}/gradient/"
    expected = {name.removeprefix(prefix): value for name, value in answers.items() if name.startswith(prefix)}
    assert by_name.keys() == expected.keys()
    error, name = cases.gradient_error(by_name, expected)
    assert error < 1e-4, name


def test_tiles_equal_upstreams(answers: dict[str, Any]) -> None:
    model = model_of(answers, "two_levels", tile_above=16)
    params, pixels = params_of(model), cases.draw("tiled pixels", (1, 26, 12, 3))
    latents = cases.draw("tiled latents", (1, 14, 12, 4))
    check(jitted(model, params, pixels, latents), answers, "tiled")


@pytest.mark.slow
def test_pictures_are_tiled_above_1024_pixels_only() -> None:
    model = AutoencoderKL(AutoencoderConfig.from_dict(TWO_LEVELS | {"sample_size": 512}))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2, 2, 3)))["params"]

    def largest(method: str, *shape: int) -> int:
        """The largest side of an image in the program's convolutions."""
        zeros = jax.ShapeDtypeStruct(shape, jnp.float32)
        program = jax.jit(lambda params, x: model.apply({"params": params}, x, method=method)).lower(params, zeros)
        sides = re.findall(r"stablehlo.convolution.* : \(tensor<1x(\d+)x(\d+)x", program.as_text())
        return max(int(side) for pair in sides for side in pair)

    # Tiles have 512 pixels, and one more where they are padded to be downsampled.
    assert largest("encode", 1, 1024, 64, 3) >= 1024
    assert largest("encode", 1, 1026, 64, 3) <= 513
    assert largest("decode", 1, 32, 512, 4) >= 1024
    assert largest("decode", 1, 32, 513, 4) <= 513


def test_the_log_variance_is_clipped(answers: dict[str, Any]) -> None:
    model = model_of(answers, "two_levels")
    params = params_of(model)
    params["quant_conv"]["bias"] = params["quant_conv"]["bias"].at[4].set(1e3).at[5].set(-1e3)
    pixels = cases.draw("two_levels pixels", PIXELS["two_levels"])
    latents = jnp.zeros(answers["two_levels/mean"].shape)  # the shape of the other tests' program
    logvar = jitted(model, params, pixels, latents)["logvar"]
    assert (logvar[..., 0] == 20).all()
    assert (logvar[..., 1] == -30).all()


def test_samples_follow_mean_and_variance() -> None:
    mean, logvar = jnp.array([[[[2.0, -1.0]]]]), jnp.array([[[[0.0, -4.0]]]])
    distribution = DiagonalGaussianDistribution(mean, logvar)
    samples = jax.vmap(distribution.sample)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(samples.std(0), [[[[1.0, np.exp(-2)]]]], rtol=0.05)
    np.testing.assert_array_equal(distribution.sample(jax.random.key(1)), distribution.sample(jax.random.key(1)))
    np.testing.assert_array_equal(distribution.mode(), mean)


def test_bfloat16_is_close(answers: dict[str, Any]) -> None:
    model = model_of(answers, "two_levels")
    half = model.clone(dtype=jnp.bfloat16)
    pixels = cases.draw("two_levels pixels", PIXELS["two_levels"])
    latents = cases.draw("two_levels latents", answers["two_levels/mean"].shape)
    for name, value in jitted(half, params_of(model), pixels, latents).items():
        assert value.dtype == jnp.bfloat16
        expected = answers[f"two_levels/{name}"]
        assert 0 < np.abs(np.asarray(value, np.float32) - expected).max() < 0.1 * np.abs(expected).max()


def test_old_names_are_recognised_and_written(answers: dict[str, Any]) -> None:
    model = model_of(answers, "two_levels")
    shapes = flatten_dict(params_of(model), sep="/")
    names = [parameter_at(path, value.shape).name for path, value in shapes.items()]
    old = [old_name(name) for name in names]
    assert has_old_names(old)
    assert not has_old_names(names)
    renamed = dict(pair for pair in zip(names, old, strict=True) if pair[0] != pair[1])
    layers = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    assert renamed == {
        f"{side}.mid_block.attentions.0.{new}.{kind}": f"{side}.mid_block.attentions.0.{old}.{kind}"
        for side in ("encoder", "decoder")
        for new, old in layers.items()
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 3, 8, 8), r"\(1, 3, 8, 8\).*channels last"),
        ("encode", (8, 8, 3), "channels last"),
        ("encode", (1, 1, 8, 3), "at least 2"),
        ("encode", (1, 1025, 8, 3), "1025x8.*multiples of 2"),
        ("decode", (1, 4, 8, 8), r"\(batch, height, width, 4\)"),
        ("decode", (1, 600, 2, 4), "sample_size, here 33; it must be a multiple of 8"),
    ],
)
def test_wrong_shapes_are_errors(method: str, shape: tuple[int, ...], message: str) -> None:
    sample_size = 33 if method == "decode" else 32
    model = AutoencoderKL(AutoencoderConfig.from_dict(TWO_LEVELS | {"sample_size": sample_size}))
    with pytest.raises(InputError, match=message):
        model.apply({"params": {}}, jnp.zeros(shape), method=method)


def test_whole_numbers_are_an_error() -> None:
    model = AutoencoderKL(AutoencoderConfig.from_dict(TWO_LEVELS))
    with pytest.raises(InputError, match="uint8"):
        model.apply({"params": {}}, jnp.zeros((1, 8, 8, 3), jnp.uint8), method="encode")


@pytest.mark.parametrize(
    "fields",
    [
        {"act_fn": "relu"},
        {"shift_factor": 0.1},
        {"latents_mean": [0.0]},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"]},
        {"norm_num_groups": 3},
        {"norm_num_groups": 0},
        {"layers_per_block": 10**9},
        {"latent_channels": "4"},
        {"unheard_of": 1},
    ],
)
def test_wrong_configs_are_errors_that_name_the_field(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        AutoencoderConfig.from_dict(TWO_LEVELS | fields)


def test_config_reads_what_it_writes(answers: dict[str, Any]) -> None:
    upstream = json.loads(str(answers["two_levels/config"]))
    config = AutoencoderConfig.from_dict(upstream)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == {name: upstream[name] for name in written}
    assert AutoencoderConfig.from_dict(written) == config
