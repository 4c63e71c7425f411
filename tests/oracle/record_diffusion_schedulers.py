"""Record what upstream's schedulers do with a linear model, step by step.

Upstream computes its tables in float32. From them on, everything is in float64 here.
"""

import warnings
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep

import scheduler_cases


def record() -> dict[str, np.ndarray]:
    warnings.simplefilter("ignore", FutureWarning)
    answers: dict[str, np.ndarray] = {}
    for label in scheduler_cases.CONFIGS:
        name, values, arguments = scheduler_cases.config(label)
        scheduler = getattr(diffusers, name).from_config(values)
        answers[f"{label}/alphas_cumprod"] = scheduler.alphas_cumprod[:: len(scheduler.alphas_cumprod) // 15].numpy()
        for n in scheduler_cases.runs(label):
            scheduler = getattr(diffusers, name).from_config(values)
            scheduler.set_timesteps(n)
            answers[f"{label}/{n}/timesteps"] = scheduler.timesteps.numpy()
            if hasattr(scheduler, "sigmas"):
                answers[f"{label}/{n}/sigmas"] = scheduler.sigmas.numpy()
            answers[f"{label}/{n}/samples"] = run(scheduler, arguments)[:: scheduler_cases.every(n)]
    for name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        scheduler = getattr(diffusers, name).from_config(scheduler_cases.SD)
        original, noise = (torch.from_numpy(array.astype(np.float64)) for array in scheduler_cases.training_batch())
        timesteps = torch.tensor(scheduler_cases.TRAINING_TIMESTEPS)
        answers[f"{name}/add_noise"] = scheduler.add_noise(original, noise, timesteps).numpy()
        if name != "PNDMScheduler":
            answers[f"{name}/get_velocity"] = scheduler.get_velocity(original, noise, timesteps).numpy()
    return answers


def run(scheduler: Any, arguments: dict[str, Any]) -> np.ndarray:
    """The samples after each step."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    noise = iter(torch.from_numpy(scheduler_cases.noise().astype(np.float64)))
    for module in (scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep):
        module.randn_tensor = lambda *_, **__: next(noise)
    sample = torch.from_numpy(scheduler_cases.start().astype(np.float64))
    weights = [torch.from_numpy(weight.astype(np.float64)) for weight in scheduler_cases.model_weights()]
    samples = []
    for timestep in scheduler.timesteps:
        output = scheduler_cases.model(scheduler.scale_model_input(sample, timestep), timestep, *weights)
        sample = scheduler.step(output, timestep, sample, **arguments).prev_sample
        samples.append(sample.numpy())
    return np.stack(samples)
