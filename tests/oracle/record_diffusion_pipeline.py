"""Upstream's pipelines and its modules' loss on the cases of `pipeline_cases`."""

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from diffusers.pipelines.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
from transformers import Blip2Config, CLIPTextConfig, CLIPTokenizer

import cases
import pipeline_cases
import unet_cases

DEFAULT_MODEL = Path(__file__).parents[2] / "flax_qformer" / "assets" / "default"


class DoubleImageProcessor(BlipImageProcessor):
    """Upstream's, in the default dtype."""

    def preprocess(self, *arguments: Any, **options: Any) -> Any:
        batch = super().preprocess(*arguments, **options)
        batch["pixel_values"] = batch["pixel_values"].to(torch.get_default_dtype())
        return batch


def filled(part: str, model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(pipeline_cases.weight(part, name, tuple(parameter.shape))))
    return model.to(torch.get_default_dtype()).eval()


def parts(unet: str, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """The modules of a pipeline."""
    words = len((DEFAULT_MODEL / "vocab.txt").read_text().splitlines())
    config = Blip2Config(**pipeline_cases.qformer(words + 1), tokenizer=str(DEFAULT_MODEL))
    return {
        "tokenizer": tokenizer,
        "text_encoder": filled("text_encoder", ContextCLIPTextModel(CLIPTextConfig(**pipeline_cases.TEXT_ENCODER))),
        "vae": filled("vae", diffusers.AutoencoderKL(**pipeline_cases.VAE)),
        "unet": filled("unet", diffusers.UNet2DConditionModel(**pipeline_cases.UNETS[unet])),
        "qformer": filled("qformer", Blip2QFormerModel(config)),
        "image_processor": DoubleImageProcessor(size={"height": 28, "width": 28}),
    }


def scheduler(name: str) -> Any:
    return getattr(diffusers, name)(**pipeline_cases.SCHEDULERS[name])


def draw(label: str, tokenizer: CLIPTokenizer) -> np.ndarray:
    """Pictures (prompts, height, width, 3) in [0, 1]."""
    drawing = pipeline_cases.DRAWINGS[label]
    height, width = drawing.size
    options: dict[str, Any] = {}
    modules = {**parts(drawing.unet, tokenizer), "scheduler": scheduler(drawing.scheduler)}
    kind = diffusers.BlipDiffusionPipeline
    if drawing.controlled:
        kind = diffusers.BlipDiffusionControlNetPipeline
        modules["controlnet"] = filled("controlnet", diffusers.ControlNetModel(**pipeline_cases.CONTROLNET))
        options["condtioning_image"] = pipeline_cases.conditioning(drawing)
    pipe = kind(**modules)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        list(drawing.prompts),
        pipeline_cases.photos(drawing),
        source_subject_category=[pipeline_cases.SOURCE] * len(drawing.prompts),
        target_subject_category=[pipeline_cases.TARGET] * len(drawing.prompts),
        latents=torch.from_numpy(pipeline_cases.latents(label)).permute(0, 3, 1, 2),
        guidance_scale=drawing.guidance,
        height=height,
        width=width,
        num_inference_steps=drawing.steps,
        neg_prompt=drawing.negative,
        prompt_strength=pipeline_cases.STRENGTH,
        prompt_reps=pipeline_cases.REPETITIONS,
        output_type="np",
        **options,
    )
    return output.images


def record_loss(tokenizer: CLIPTokenizer, prediction_type: str) -> dict[str, np.ndarray]:
    """The loss of upstream's modules, and its gradients."""
    modules = parts("two", tokenizer)
    unet, text_encoder = modules["unet"], modules["text_encoder"]
    inputs = {name: torch.from_numpy(value) for name, value in pipeline_cases.loss_inputs().items()}
    latents, noise = (inputs[name].permute(0, 3, 1, 2).double() for name in ("latents", "noise"))
    subjects = inputs["subject_embeddings"].double().requires_grad_()
    ddpm = diffusers.DDPMScheduler(**pipeline_cases.SCHEDULER, prediction_type=prediction_type)
    text = text_encoder(
        input_ids=inputs["input_ids"],
        ctx_embeddings=subjects.expand(len(latents), -1, -1),
        ctx_begin_pos=[2] * len(latents),
    )[0]
    noisy = ddpm.add_noise(latents, noise, inputs["timesteps"])
    predicted = unet(noisy, inputs["timesteps"], text).sample
    target = noise if prediction_type == "epsilon" else ddpm.get_velocity(latents, noise, inputs["timesteps"])
    loss = torch.nn.functional.mse_loss(predicted, target)
    loss.backward()
    label = f"loss/{prediction_type}"
    answers = {label: loss.detach().numpy(), f"{label}/subject_embeddings": subjects.grad.numpy()}
    for part in ("unet", "text_encoder") if prediction_type == "epsilon" else ():
        gradients = {name: parameter.grad.numpy() for name, parameter in modules[part].named_parameters()}
        answers[f"{label}/{part}"] = np.concatenate([unet_cases.some(gradients[name]) for name in sorted(gradients)])
    return answers


def record_diffusion_pipeline(folder: Path) -> None:
    """Write `diffusion_pipeline.npz`."""
    with tempfile.TemporaryDirectory() as files:
        pipeline_cases.write_tokenizer(Path(files))
        tokenizer = CLIPTokenizer.from_pretrained(files)
    answers = {label: draw(label, tokenizer) for label in pipeline_cases.DRAWINGS}
    answers |= {"token_ids": np.array(tokenizer(["a dog in the water, über 7!"])["input_ids"])}
    answers |= record_loss(tokenizer, "epsilon") | record_loss(tokenizer, "v_prediction")
    cases.save(folder / "diffusion_pipeline.npz", answers)
