"""Pipelines and the denoising loss beside upstream's, and what upstream gets wrong."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import CLIPTokenizer

import cases
import flax_qformer as fq
import pipeline_cases
from flax_qformer.convert.tables.qformer import parameters
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.diffusion.prompt import tokenize

Golden = Callable[[str], dict[str, Any]]

PICTURE_ERROR = 1e-3
"""How far a value of a picture, from 0 to 1, may be from upstream's."""

LATENTS = np.zeros((1, 8, 8, 4), np.float32)
TEXT = np.zeros((1, 5, pipeline_cases.WIDTH), np.float32)
PIXELS = np.zeros((1, 16, 16, 3), np.float32)


def seeded(part: str, module: Any, *inputs: Any) -> dict[str, Any]:
    """The parameters of the cases."""
    shapes = flatten_dict(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"], sep="/")
    params = {}
    for path, leaf in shapes.items():
        row = parameter_at(path, leaf.shape)
        value = pipeline_cases.weight(part, row.name, row.torch_shape)
        params[path] = jnp.asarray(value.transpose(row.order).reshape(row.shape))
    return unflatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parts that all pipelines have in common."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pipeline_cases.write_tokenizer(folder)
    default = fq.Processor.from_pretrained()
    words = len(default.tokenizer)
    config = fq.Blip2Config.from_dict(pipeline_cases.qformer(words))
    image_processor = dataclasses.replace(default.image_processor, height=28, width=28)
    rows = list(parameters(config, "diffusers"))
    tensors = {row.path: cases.weight(row.name, row.torch_shape) for row in rows}
    params = {row.path: jnp.asarray(tensors[row.path].transpose(row.order).reshape(row.shape)) for row in rows}
    text_encoder = fq.ContextCLIPTextModel(fq.CLIPTextConfig.from_dict(pipeline_cases.TEXT_ENCODER))
    vae = fq.AutoencoderKL(fq.AutoencoderConfig.from_dict(pipeline_cases.VAE))
    controlnet = fq.ControlNetModel(fq.ControlNetConfig.from_dict(pipeline_cases.CONTROLNET))
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder),
        "processor": fq.Processor(default.tokenizer, image_processor, config),
        "qformer": (fq.Blip2QFormerModel(config), unflatten_dict(params, sep="/")),
        "text_encoder": (text_encoder, seeded("text_encoder", text_encoder, np.zeros((1, 4), np.int32))),
        "vae": (vae, seeded("vae", vae, PIXELS)),
        "controlnet": (controlnet, seeded("controlnet", controlnet, LATENTS, 0, TEXT, PIXELS)),
    }


def build(shared: dict[str, Any], unet: str, scheduler: str, controlled: bool = False, mesh: Any = None) -> Any:
    module = fq.UNet2DConditionModel(fq.UNet2DConditionConfig.from_dict(pipeline_cases.UNETS[unet]))
    parts = {name: shared[name] for name in ("qformer", "text_encoder", "vae")}
    parts["unet"] = (module, seeded("unet", module, LATENTS, 0, TEXT))
    kind = fq.BlipDiffusionPipeline
    if controlled:
        parts["controlnet"], kind = shared["controlnet"], fq.BlipDiffusionControlNetPipeline
    return kind(
        {name: module for name, (module, _) in parts.items()},
        {name: params for name, (_, params) in parts.items()},
        getattr(fq, scheduler).from_config(pipeline_cases.SCHEDULERS[scheduler]),
        shared["tokenizer"],
        shared["processor"],
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def pipe(shared: dict[str, Any]) -> Any:
    return build(shared, "two", "DDIMScheduler")


@pytest.fixture(scope="module")
def control_pipe(shared: dict[str, Any]) -> Any:
    return build(shared, "two", "PNDMScheduler", controlled=True)


PHOTO = cases.image("RGB", 40, 60)


def draw(pipe: Any, prompt: Any = "in the water", reference_image: Any = PHOTO, **options: Any) -> Any:
    """A small picture in few steps."""
    categories = {"source_subject_category": "dog", "target_subject_category": "dog"}
    defaults = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "np", "prompt_reps": 2}
    return pipe(prompt, reference_image, **(categories | defaults | options)).images


def as_drawn(label: str) -> dict[str, Any]:
    """The arguments of a case."""
    drawing = pipeline_cases.DRAWINGS[label]
    options = {"conditioning_image": pipeline_cases.conditioning(drawing)} if drawing.controlled else {}
    return options | {
        "prompt": list(drawing.prompts),
        "reference_image": pipeline_cases.photos(drawing),
        "source_subject_category": pipeline_cases.SOURCE,
        "target_subject_category": [pipeline_cases.TARGET],
        "latents": pipeline_cases.latents(label),
        "guidance_scale": drawing.guidance,
        "height": drawing.size[0],
        "width": drawing.size[1],
        "num_inference_steps": drawing.steps,
        "neg_prompt": drawing.negative,
        "prompt_strength": pipeline_cases.STRENGTH,
        "prompt_reps": pipeline_cases.REPETITIONS,
    }


@pytest.mark.parametrize("label", pipeline_cases.DRAWINGS)
def test_the_same_latents_give_upstreams_picture(shared: dict[str, Any], golden: Golden, label: str) -> None:
    drawing = pipeline_cases.DRAWINGS[label]
    pipe = build(shared, drawing.unet, drawing.scheduler, drawing.controlled)
    images = draw(pipe, **as_drawn(label))
    expected = golden("diffusion_pipeline")[label]
    assert images.shape == expected.shape
    assert images.dtype == np.float32
    assert np.abs(images - expected).max() < PICTURE_ERROR
    assert expected.std() > 0.1


def test_tokens_are_upstreams(shared: dict[str, Any], golden: Golden) -> None:
    expected = golden("diffusion_pipeline")["token_ids"][0]
    ids = tokenize(shared["tokenizer"], ["a dog in the water, über 7!"], len(expected) + 3)
    assert ids[0].tolist() == [*expected, *[expected[-1]] * 3]
