"""Runs of the schedulers, for upstream and for us: configs, numbers of steps, and a stand-in for the model."""

from typing import Any

import numpy as np

import cases

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PUBLISHED = {**SD, "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False, "trained_betas": None}
"""The published checkpoint's, as upstream's `scheduler_config.json` has it."""

DPM = {**SD, "timestep_spacing": "linspace"}
DPM_SIGMA_MIN = {**DPM, "final_sigmas_type": "sigma_min"}
SMALL = {"num_train_timesteps": 60, "trained_betas": [0.001 + 0.0005 * i for i in range(60)]}

STEPS = (1, 2, 4, 20, 50)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", PUBLISHED),
    "pndm_offset": ("PNDMScheduler", {**PUBLISHED, "steps_offset": 1}),
    "pndm_v": ("PNDMScheduler", {**PUBLISHED, "prediction_type": "v_prediction", "set_alpha_to_one": True}),
    "pndm_linspace": ("PNDMScheduler", {**PUBLISHED, "timestep_spacing": "linspace"}),
    "pndm_trailing": ("PNDMScheduler", {**PUBLISHED, "timestep_spacing": "trailing"}),
    "pndm_prk": ("PNDMScheduler", SD),
    "pndm_prk_v": ("PNDMScheduler", {"prediction_type": "v_prediction", "set_alpha_to_one": True}),
    "pndm_cosine": ("PNDMScheduler", {"beta_schedule": "squaredcos_cap_v2", "skip_prk_steps": True}),
    "pndm_trained_betas": ("PNDMScheduler", {**SMALL, "skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", SD),
    "ddim_published": ("DDIMScheduler", {**PUBLISHED, "_class_name": "PNDMScheduler"}),
    "ddim_eta": ("DDIMScheduler", {**PUBLISHED, "eta": 0.7}),
    "ddim_eta_clipped": ("DDIMScheduler", {**SD, "eta": 1.0, "clip_sample_range": 0.5, "use_clipped": True}),
    "ddim_sample": ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "linspace"}),
    "ddim_zero_snr": (
        "DDIMScheduler",
        {
            **PUBLISHED,
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ),
    "ddpm": ("DDPMScheduler", SD),
    "ddpm_large": ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False, "steps_offset": 1}),
    "ddpm_log": ("DDPMScheduler", {**SD, "variance_type": "fixed_small_log", "timestep_spacing": "trailing"}),
    "ddpm_v": (
        "DDPMScheduler",
        {**SMALL, "prediction_type": "v_prediction", "timestep_spacing": "linspace", "rescale_betas_zero_snr": True},
    ),
    "ddpm_sample": ("DDPMScheduler", {**SD, "prediction_type": "sample", "clip_sample_range": 0.8}),
    "dpm": ("DPMSolverMultistepScheduler", DPM),
    "dpm_published": ("DPMSolverMultistepScheduler", {**PUBLISHED, "_class_name": "PNDMScheduler"}),
    "dpm_leading": ("DPMSolverMultistepScheduler", {**DPM, "timestep_spacing": "leading", "steps_offset": 1}),
    "dpm_trailing_heun": (
        "DPMSolverMultistepScheduler",
        {**DPM_SIGMA_MIN, "timestep_spacing": "trailing", "solver_type": "heun", "euler_at_final": True},
    ),
    "dpm_karras": ("DPMSolverMultistepScheduler", {**DPM, "use_karras_sigmas": True, "lower_order_final": False}),
    "dpm_karras_sigma_min": ("DPMSolverMultistepScheduler", {**DPM_SIGMA_MIN, "use_karras_sigmas": True}),
    "dpm_order_1": ("DPMSolverMultistepScheduler", {**DPM, "solver_order": 1, "prediction_type": "sample"}),
    "dpm_order_3": ("DPMSolverMultistepScheduler", {**DPM_SIGMA_MIN, "solver_order": 3}),
    "dpm_order_3_last": (
        "DPMSolverMultistepScheduler",
        {**DPM_SIGMA_MIN, "solver_order": 3, "lower_order_final": False},
    ),
    "dpm_cosine": (
        "DPMSolverMultistepScheduler",
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "prediction_type": "v_prediction"},
    ),
    "dpm_zero_snr": (
        "DPMSolverMultistepScheduler",
        {**DPM, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ),
    "dpm_unipc": ("DPMSolverMultistepScheduler", {**DPM, "solver_type": "bh2", "predict_x0": True}),
    "dpm_noise": ("DPMSolverMultistepScheduler", {**DPM_SIGMA_MIN, "algorithm_type": "dpmsolver"}),
    "dpm_noise_heun": (
        "DPMSolverMultistepScheduler",
        {**DPM_SIGMA_MIN, "algorithm_type": "dpmsolver", "solver_type": "heun", "prediction_type": "v_prediction"},
    ),
    "dpm_noise_order_3": (
        "DPMSolverMultistepScheduler",
        {**DPM_SIGMA_MIN, "algorithm_type": "dpmsolver", "solver_order": 3, "prediction_type": "sample"},
    ),
    "sde": ("DPMSolverMultistepScheduler", {**DPM, "algorithm_type": "sde-dpmsolver++"}),
    "sde_heun": (
        "DPMSolverMultistepScheduler",
        {**DPM_SIGMA_MIN, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "sde_noise": ("DPMSolverMultistepScheduler", {**DPM_SIGMA_MIN, "algorithm_type": "sde-dpmsolver"}),
    "sde_noise_heun": (
        "DPMSolverMultistepScheduler",
        {**DPM_SIGMA_MIN, "algorithm_type": "sde-dpmsolver", "solver_type": "heun"},
    ),
}
"""Class and config by label. `eta` and `use_clipped` are arguments of `step`."""

STEP_ARGUMENTS = {"eta": "eta", "use_clipped": "use_clipped_model_output"}

SHAPE = (2, 1, 2, 2)


def config(label: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The class, the config and the further arguments of `step`."""
    name, values = CONFIGS[label]
    arguments = {argument: values[field] for field, argument in STEP_ARGUMENTS.items() if field in values}
    return name, {field: value for field, value in values.items() if field not in STEP_ARGUMENTS}, arguments


def runs(label: str) -> tuple[int, ...]:
    """The numbers of steps that are run: Runge-Kutta needs four."""
    return tuple(n for n in STEPS if n >= 4 or not label.startswith("pndm_prk"))


def every(n: int) -> int:
    """Of runs of n steps, every how many samples are recorded, from the last back."""
    return -1 if n <= 4 else -5


def start() -> np.ndarray:
    return cases.draw("scheduler start", SHAPE)


def noise() -> np.ndarray:
    """What a step that draws noise gets, for each step."""
    return cases.draw("scheduler noise", (100, *SHAPE))


def model(sample: Any, timestep: Any, mix: Any, shift: Any) -> Any:
    """A linear model: neither of its eigenvalues lets samples explode. `mix` and `shift` are `model_weights()`."""
    return sample @ mix + (timestep / 1000) * shift


def model_weights() -> tuple[np.ndarray, np.ndarray]:
    return np.array([[0.5, 0.3], [-0.3, 0.4]], np.float32), cases.draw("scheduler shift", SHAPE)


TRAINING_TIMESTEPS = (0, 999, 417)


def training_batch() -> tuple[np.ndarray, np.ndarray]:
    """Latents and noise of a batch of three."""
    return cases.draw("scheduler latents", (3, 2, 2, 1)), cases.draw("scheduler training noise", (3, 2, 2, 1))
