"""The schedulers against diffusers 0.32.2, step by step, with a linear model in place of the UNet."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import flax_qformer as fq
import scheduler_cases
from flax_qformer.diffusion import schedulers
from flax_qformer.diffusion.schedulers import SCHEDULERS, scheduler_from_config
from flax_qformer.errors import InputError

LENGTH = 60
"""To which states are padded: the longest run has 59 timesteps."""


@pytest.fixture(scope="module")
def recorded(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden("diffusion_schedulers")


@partial(jax.jit, static_argnums=0, static_argnames=("eta", "use_clipped_model_output"))
def one_step(scheduler: Any, state: Any, i: Any, sample: Any, noise: Any, **arguments: Any) -> Any:
    timestep = state.timesteps[i]
    scaled = scheduler.scale_model_input(state, sample, timestep)
    output = scheduler_cases.model(scaled, timestep, *scheduler_cases.model_weights())
    if scheduler.step.__kwdefaults__:
        arguments["variance_noise"] = noise
    return scheduler.step(state, output, timestep, sample, **arguments)


def run(scheduler: Any, state: Any, **arguments: Any) -> np.ndarray:
    """The samples after each step of a state."""
    sample, samples = jnp.asarray(scheduler_cases.start()), []
    noise = scheduler_cases.noise()
    for i in range(int(state.num_timesteps)):
        out = one_step(scheduler, state, i, sample, noise[i], **arguments)
        sample, state = out.prev_sample, out.state
        samples.append(np.asarray(sample))
    return np.stack(samples)


def started(scheduler: Any, n: int) -> Any:
    return scheduler.set_timesteps(scheduler.create_state(), n, scheduler_cases.SHAPE)


@pytest.mark.parametrize("label", scheduler_cases.CONFIGS)
def test_each_step_is_upstreams(label: str, recorded: dict[str, Any]) -> None:
    name, values, arguments = scheduler_cases.config(label)
    scheduler = SCHEDULERS[name].from_config(values)
    stride = len(scheduler.alphas_cumprod) // 15
    np.testing.assert_allclose(scheduler.alphas_cumprod[::stride], recorded[f"{label}/alphas_cumprod"], rtol=2e-7)
    for n in scheduler_cases.runs(label):
        state = started(scheduler, n)
        np.testing.assert_array_equal(state.timesteps, recorded[f"{label}/{n}/timesteps"])
        if f"{label}/{n}/sigmas" in recorded:
            np.testing.assert_allclose(state.sigmas, recorded[f"{label}/{n}/sigmas"][:-1], rtol=2e-7)
        samples = run(scheduler, scheduler.padded(state, LENGTH), **arguments)[:: scheduler_cases.every(n)]
        expected = recorded[f"{label}/{n}/samples"]
        scale = np.abs(expected).max(axis=(1, 2, 3, 4), keepdims=True)
        np.testing.assert_allclose(samples / scale, expected / scale, rtol=0, atol=cases.ROUNDING, err_msg=f"{n}")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_training_noise_and_velocity_are_upstreams(name: str, recorded: dict[str, Any]) -> None:
    scheduler = SCHEDULERS[name].from_config(scheduler_cases.SD)
    original, noise = scheduler_cases.training_batch()
    timesteps = jnp.asarray(scheduler_cases.TRAINING_TIMESTEPS)
    # Upstream's DPM-Solver adds noise by its position in a run; training needs the noise of a timestep.
    source = "DDPMScheduler" if name == "DPMSolverMultistepScheduler" else name
    noisy = jax.jit(partial(scheduler.add_noise, None))(original, noise, timesteps)
    np.testing.assert_allclose(noisy, recorded[f"{source}/add_noise"], rtol=0, atol=1e-6)
    velocity = scheduler.get_velocity(scheduler.create_state(), original, noise, timesteps)
    np.testing.assert_allclose(velocity, recorded["DDPMScheduler/get_velocity"], rtol=0, atol=1e-6)
    same_for_all = scheduler.add_noise(None, original, noise, 417)
    np.testing.assert_array_equal(same_for_all[2], noisy[2])


RUNNING = {
    "pndm": fq.PNDMScheduler(skip_prk_steps=True),
    "pndm_prk": fq.PNDMScheduler(),
    "ddim": fq.DDIMScheduler(),
    "ddpm": fq.DDPMScheduler(),
    "dpm": fq.DPMSolverMultistepScheduler(),
    "sde": fq.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
}


@pytest.mark.parametrize("label", RUNNING)
def test_one_compiled_loop_serves_any_number_of_steps(label: str) -> None:
    scheduler = RUNNING[label]
    compilations = 0

    @jax.jit
    def loop(state: Any, sample: jax.Array) -> jax.Array:
        nonlocal compilations
        compilations += 1

        def body(i: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            state, sample = carry
            out = one_step(scheduler, state, i, sample, jnp.asarray(scheduler_cases.noise())[i])
            return out.state, out.prev_sample

        return jax.lax.fori_loop(0, state.num_timesteps, body, (state, sample))[1]

    for n in (4, 7):
        state = started(scheduler, n)
        assert len(state.timesteps) == state.num_timesteps
        alone = run(scheduler, state)[-1]
        looped = loop(scheduler.padded(state, LENGTH), scheduler_cases.start())
        np.testing.assert_allclose(looped, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    assert compilations == 1


@pytest.mark.parametrize("label", RUNNING)
def test_samples_keep_their_dtype(label: str) -> None:
    scheduler, sample = RUNNING[label], jnp.ones((1, 2, 2, 4), jnp.bfloat16)
    state = scheduler.set_timesteps(scheduler.create_state(), 5, sample.shape)
    out = scheduler.step(state, sample, state.timesteps[0], sample, jax.random.key(0))
    assert out.prev_sample.dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, out.state) == jax.tree.map(jnp.shape, state)
    assert scheduler.add_noise(None, sample, sample, jnp.array([3])).dtype == jnp.bfloat16
    assert state.init_noise_sigma == 1


def test_call_counts() -> None:
    assert len(started(fq.PNDMScheduler(skip_prk_steps=True), 50).timesteps) == 51
    assert len(started(fq.PNDMScheduler(), 50).timesteps) == 59
    assert len(started(fq.DPMSolverMultistepScheduler(), 20).timesteps) == 20


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trailing_never_steps_below_zero(name: str) -> None:
    """Upstream's arange yields a number too many for 62 of the numbers of steps, such as 61."""
    scheduler = SCHEDULERS[name].from_config({"timestep_spacing": "trailing"}, **{"skip_prk_steps": True})
    for n in (61, 103, 999):
        state = started(scheduler, n)
        assert len(state.timesteps) == n + (name == "PNDMScheduler")
        assert state.timesteps.min() >= 0


def test_noise_follows_the_key() -> None:
    sample = jnp.zeros((1, 2, 2, 4))
    for scheduler, arguments in ((fq.DDIMScheduler(), {"eta": 1.0}), (fq.DDPMScheduler(), {}), (RUNNING["sde"], {})):
        state = scheduler.set_timesteps(scheduler.create_state(), 5, sample.shape)
        step = partial(scheduler.step, state, sample, state.timesteps[0], sample, **arguments)
        drawn = [step(jax.random.key(seed)).prev_sample for seed in (0, 0, 1)]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert np.abs(drawn[0] - drawn[2]).max() > 1e-3
        with pytest.raises(InputError, match="`rng`"):
            step()


def test_eta_can_be_traced() -> None:
    scheduler, sample = fq.DDIMScheduler(clip_sample=False), jnp.ones((2, 3))
    state = started(scheduler, 5)
    step = jax.jit(lambda eta: scheduler.step(state, sample, 600, sample, jax.random.key(0), eta=eta).prev_sample)
    np.testing.assert_allclose(step(0.0), scheduler.step(state, sample, 600, sample).prev_sample, atol=1e-6)


def test_dpm_can_start_late() -> None:
    """A run from the middle, as for image to image, begins with a step of first order."""
    scheduler = fq.DPMSolverMultistepScheduler()
    state, sample = started(scheduler, 20), jnp.asarray(scheduler_cases.start())
    out = scheduler.step(state, 0.3 * sample, state.timesteps[7], sample)
    assert out.state.step_index == 8
    ddim = fq.DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    alphas = ddim.alphas_cumprod[np.asarray(state.timesteps[7:9])]
    original = (sample - np.sqrt(1 - alphas[0]) * 0.3 * sample) / np.sqrt(alphas[0])
    expected = np.sqrt(alphas[1]) * original + np.sqrt(1 - alphas[1]) * 0.3 * sample
    np.testing.assert_allclose(out.prev_sample, expected, rtol=2e-5)


def test_configs_are_exchanged_as_upstream_does(tmp_path: Path) -> None:
    pndm = fq.PNDMScheduler.from_config(scheduler_cases.PUBLISHED)
    for config in (pndm, pndm.config, dict(pndm.config)):
        ddim = fq.DDIMScheduler.from_config(config)
        # clip_sample is no field of PNDM, and yet its config keeps it for DDIM.
        assert not ddim.clip_sample
        assert not ddim.set_alpha_to_one
        assert ddim.beta_end == 0.012
    back = fq.PNDMScheduler.from_config(fq.DPMSolverMultistepScheduler.from_config(pndm))
    assert back == pndm
    assert hash(back) == hash(pndm)
    # A field that was not given does not override another class's default.
    assert fq.DDIMScheduler.from_config(fq.PNDMScheduler().config).set_alpha_to_one
    assert pndm.config.num_train_timesteps == pndm.config["num_train_timesteps"] == 1000
    with pytest.raises(AttributeError, match="'rho'"):
        _ = pndm.config.rho

    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(pndm.to_dict()))
    assert fq.PNDMScheduler.from_config(file) == fq.PNDMScheduler.from_config(str(tmp_path)) == pndm
    assert scheduler_from_config(tmp_path) == pndm
    assert scheduler_from_config({**pndm.to_dict(), "_class_name": "FlaxPNDMScheduler"}) == pndm
    dpm = fq.DPMSolverMultistepScheduler.from_config(tmp_path, use_karras_sigmas=True)
    assert dpm.use_karras_sigmas
    assert scheduler_from_config(dpm) == dpm
    assert fq.DDPMScheduler(num_train_timesteps=2, trained_betas=np.array([0.1, 0.2])).trained_betas == (0.1, 0.2)


DPM = "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("PNDMScheduler", {"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ("PNDMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ("PNDMScheduler", {"skip_prk": True}, "unknown field 'skip_prk'"),
        ("PNDMScheduler", {"beta_start": "0.1"}, "beta_start is '0.1'"),
        ("PNDMScheduler", {"beta_end": 1.5}, "beta_end"),
        ("PNDMScheduler", {"steps_offset": -1}, "steps_offset"),
        ("PNDMScheduler", {"beta_schedule": "scaled_linear", "beta_start": -0.1}, "beta_start"),
        ("PNDMScheduler", {"num_train_timesteps": 2, "trained_betas": [0.1, float("nan")]}, "trained_betas"),
        ("PNDMScheduler", {"num_train_timesteps": 0}, "num_train_timesteps"),
        ("PNDMScheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("PNDMScheduler", {"trained_betas": [0.1, 0.2]}, "num_train_timesteps must be 2"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding is True"),
        ("DDPMScheduler", {"thresholding": True}, "thresholding is True"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
        (DPM, {"thresholding": True}, "thresholding is True"),
        (DPM, {"variance_type": "learned"}, "variance_type is 'learned'"),
        (DPM, {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        (DPM, {"use_beta_sigmas": True}, "use_beta_sigmas is True"),
        (DPM, {"use_exponential_sigmas": True}, "use_exponential_sigmas is True"),
        (DPM, {"use_lu_lambdas": True}, "use_lu_lambdas is True"),
        (DPM, {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        (DPM, {"sigma_max": 3.0}, "sigma_max is 3.0"),
        (DPM, {"solver_order": 4}, "solver_order is 4"),
        (DPM, {"solver_type": "rk4"}, "solver_type is 'rk4'"),
        (DPM, {"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
        (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order 3"),
    ],
)
def test_unsupported_fields_are_named(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SCHEDULERS[name].from_config(config)


def test_unknown_class_is_named() -> None:
    with pytest.raises(InputError, match="'EulerDiscreteScheduler'; known are PNDMScheduler, DDIMScheduler"):
        scheduler_from_config({"_class_name": "EulerDiscreteScheduler"})
    with pytest.raises(InputError, match="_class_name of the scheduler is None"):
        scheduler_from_config(scheduler_cases.SD)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (RUNNING["pndm"], 0, "from 1 to 1000"),
        (RUNNING["dpm"], 1001, "from 1 to 1000"),
        (RUNNING["ddim"], 2.0, "from 1 to 1000"),
        (RUNNING["ddim"], True, "from 1 to 1000"),
        (RUNNING["pndm_prk"], 3, "at least 4 steps"),
        (RUNNING["dpm"], 1000, "repeat a noise level"),
        (fq.DPMSolverMultistepScheduler(lambda_min_clipped=9.0), 20, "lambda_min_clipped is 9.0"),
        (fq.DDIMScheduler(steps_offset=1), 1000, "start at timestep 1000"),
        (fq.DPMSolverMultistepScheduler(steps_offset=700, timestep_spacing="leading"), 2, "start at timestep 1366"),
    ],
)
def test_impossible_numbers_of_steps_are_errors(scheduler: Any, steps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        started(scheduler, steps)


@pytest.mark.parametrize("label", ["pndm", "ddim", "dpm"])
def test_steps_need_timesteps(label: str) -> None:
    scheduler, sample = RUNNING[label], jnp.zeros(3)
    with pytest.raises(InputError, match="set_timesteps"):
        scheduler.step(scheduler.create_state(), sample, 0, sample)
    with pytest.raises(InputError, match="cannot be padded to 3"):
        scheduler.padded(started(scheduler, 9), 3)


@pytest.mark.parametrize("label", ["pndm", "pndm_prk", "dpm"])
def test_samples_must_have_the_shape_of_the_state(label: str) -> None:
    scheduler, sample = RUNNING[label], jnp.zeros((2, 3))
    with pytest.raises(InputError, match=r"shape \(2, 3\), and the state is for \(\)"):
        scheduler.step(scheduler.set_timesteps(scheduler.create_state(), 5), sample, 0, sample)


def test_ddpm_steps_through_all_training_timesteps() -> None:
    """Without `set_timesteps`, each timestep follows the one above it, as upstream."""
    scheduler, sample = fq.DDPMScheduler(clip_sample=False), jnp.ones((2, 3))
    zero = jnp.zeros_like(sample)
    short = scheduler.step(scheduler.create_state(), sample, 500, sample, variance_noise=zero)
    full = scheduler.step(started(scheduler, 1000), sample, 500, sample, variance_noise=zero)
    np.testing.assert_array_equal(short.prev_sample, full.prev_sample)
    half = scheduler.step(started(scheduler, 500), sample, 500, sample, variance_noise=zero)
    assert np.abs(half.prev_sample - full.prev_sample).max() > 1e-4


def test_names_of_fields_are_complete() -> None:
    own = {name for c in SCHEDULERS.values() for name in (*c.FIXED, *(f.name for f in dataclasses.fields(c)))}
    assert own <= schedulers.FIELDS_OF_ALL
