"""Record what upstream's schedulers do with a linear model, step by step.

Upstream computes its tables in float32. Here it rounds the tables to float32 and computes the rest in float64.
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep

import scheduler_cases

MODULES = (scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep)


def record() -> dict[str, np.ndarray]:
    with ExitStack() as patches:
        patches.enter_context(warnings.catch_warnings(action="ignore", category=FutureWarning))
        for module in MODULES:
            rescale = partial(rescaled, module.rescale_zero_terminal_snr)
            patches.enter_context(patch.object(module, "rescale_zero_terminal_snr", rescale))
        return record_runs() | record_training()


def rescaled(rescale: Callable[[torch.Tensor], torch.Tensor], betas: torch.Tensor) -> torch.Tensor:
    """Upstream's rescaling in float64. It begins with 1 - betas, which stays rounded to float32."""
    return rescale(1 - (1 - betas).double())


def record_runs() -> dict[str, np.ndarray]:
    answers: dict[str, np.ndarray] = {}
    for label in scheduler_cases.CONFIGS:
        name, values, arguments = scheduler_cases.config(label)
        scheduler = getattr(diffusers, name).from_config(values)
        answers[f"{label}/alphas_cumprod"] = scheduler.alphas_cumprod[:: len(scheduler.alphas_cumprod) // 15].numpy()
        for n in scheduler_cases.runs(label):
            scheduler = getattr(diffusers, name).from_config(values)
            in_float64(scheduler)
            scheduler.set_timesteps(n)
            in_float64(scheduler)
            answers[f"{label}/{n}/timesteps"] = scheduler.timesteps.numpy()
            if hasattr(scheduler, "sigmas"):
                answers[f"{label}/{n}/sigmas"] = scheduler.sigmas.numpy()
            answers[f"{label}/{n}/samples"] = run(scheduler, arguments)[:: scheduler_cases.every(n)]
    return answers


def record_training() -> dict[str, np.ndarray]:
    answers: dict[str, np.ndarray] = {}
    for name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        scheduler = getattr(diffusers, name).from_config(scheduler_cases.SD)
        original, noise = (torch.from_numpy(array.astype(np.float64)) for array in scheduler_cases.training_batch())
        timesteps = torch.tensor(scheduler_cases.TRAINING_TIMESTEPS)
        answers[f"{name}/add_noise"] = scheduler.add_noise(original, noise, timesteps).numpy()
        if name != "PNDMScheduler":
            answers[f"{name}/get_velocity"] = scheduler.get_velocity(original, noise, timesteps).numpy()
    return answers


def in_float64(scheduler: Any) -> None:
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).float().double())


def run(scheduler: Any, arguments: dict[str, Any]) -> np.ndarray:
    """The samples after each step."""
    noise = iter(torch.from_numpy(scheduler_cases.noise().astype(np.float64)))
    sample = torch.from_numpy(scheduler_cases.start().astype(np.float64))
    weights = [torch.from_numpy(weight.astype(np.float64)) for weight in scheduler_cases.model_weights()]
    samples = []
    with ExitStack() as patches:
        for module in MODULES:
            patches.enter_context(patch.object(module, "randn_tensor", lambda *_, **__: next(noise)))
        for timestep in scheduler.timesteps:
            output = scheduler_cases.model(scheduler.scale_model_input(sample, timestep), float(timestep), *weights)
            sample = scheduler.step(output, timestep, sample, **arguments).prev_sample
            samples.append(sample.numpy())
    return np.stack(samples)
