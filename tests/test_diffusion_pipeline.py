"""Pipelines and the denoising loss beside upstream's, and what upstream gets wrong."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import CLIPTokenizer

import cases
import flax_qformer as fq
import pipeline_cases
import unet_cases
from flax_qformer.convert.tables.qformer import parameters
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.diffusion.prompt import build_prompts, tokenize
from flax_qformer.diffusion.subjects import centre_crop
from flax_qformer.training import denoising_loss

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


# The others have a scheduler of `control` or of other fast tests.
FAST = ("dpm", "control")


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=() if label in FAST else pytest.mark.slow) for label in pipeline_cases.DRAWINGS]
)
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


def loss_of(pipe: Any, params: Any, subjects: Any, inputs: Any) -> jax.Array:
    return denoising_loss(pipe, params, **inputs, subject_embeddings=subjects)


def loss_inputs() -> tuple[Any, Any]:
    """Subject vectors, and the other inputs."""
    inputs = pipeline_cases.loss_inputs()
    return inputs.pop("subject_embeddings"), inputs


def with_prediction(pipe: Any, kind: str) -> Any:
    scheduler = fq.PNDMScheduler.from_config({**pipeline_cases.SCHEDULER, "prediction_type": kind})
    return fq.BlipDiffusionPipeline(pipe.components, pipe.params, scheduler, pipe.tokenizer, pipe.processor)


@pytest.mark.parametrize("is_sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loss_and_its_gradients_are_upstreams(pipe: Any, golden: Golden, is_sharded: bool) -> None:
    answers, (subjects, inputs) = golden("diffusion_pipeline"), loss_inputs()
    params: Any = {name: pipe.params[name] for name in ("unet", "text_encoder")}
    if is_sharded:
        mesh = fq.make_mesh(data=1, fsdp=2)
        params, inputs = fq.shard_params(params, mesh), fq.shard_batch(inputs, mesh)
    changed = with_prediction(pipe, "epsilon")
    differentiate = jax.jit(jax.value_and_grad(partial(loss_of, changed), argnums=(0, 1)))
    loss, (gradients, of_subjects) = differentiate(params, subjects, inputs)
    assert loss.dtype == jnp.float32
    assert abs(loss - answers["loss/epsilon"]) < cases.ROUNDING
    found = {"subject_embeddings": np.asarray(of_subjects)}
    for part, tree in gradients.items():
        flat = flatten_dict(tree, sep="/")
        rows = {path: parameter_at(path, leaf.shape) for path, leaf in flat.items()}
        some = {rows[path].name: unet_cases.some(rows[path].to_torch(np.asarray(leaf))) for path, leaf in flat.items()}
        found[part] = np.concatenate([some[name] for name in sorted(some)])
    for name, value in found.items():
        expected = answers[f"loss/epsilon/{name}"]
        assert value.shape == expected.shape
        assert np.linalg.norm(value - expected) < 1e-4 * np.linalg.norm(expected), name


@pytest.mark.slow
def test_the_loss_predicts_what_the_scheduler_says(pipe: Any, golden: Golden) -> None:
    subjects, inputs = loss_inputs()
    changed, params = (
        with_prediction(pipe, "v_prediction"),
        {name: pipe.params[name] for name in ("unet", "text_encoder")},
    )
    loss = jax.jit(partial(loss_of, changed))(params, subjects, inputs)
    assert abs(loss - golden("diffusion_pipeline")["loss/v_prediction"]) < cases.ROUNDING
    assert abs(jax.jit(partial(loss_of, changed))(params, None, inputs) - loss) > 1e-4
    changed.scheduler = fq.DDIMScheduler.from_config({**pipeline_cases.SCHEDULER, "prediction_type": "sample"})
    with pytest.raises(fq.InputError, match="prediction_type"):
        loss_of(changed, params, subjects, inputs)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of the programs that XLA compiles during the test."""
    names: list[str] = []

    def note(event: str, _: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_nothing_compiles_again(pipe: Any, compilations: list[str]) -> None:
    draw(pipe, rng=1)
    compilations.clear()
    other = cases.image("RGB", 90, 30)
    draw(pipe, "under a tree", other, source_subject_category="black cat", rng=7, neg_prompt="dog", guidance_scale=2.0)
    draw(pipe, "", subject_embeddings=np.ones((5, 24)), reference_image=None, num_inference_steps=9, guidance_scale=30)
    assert not compilations
    # What the fixture would show.
    jax.jit(lambda x: x + 1)(np.ones(1))
    assert compilations


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_other_numbers_of_steps_compile_nothing(name: str, compilations: list[str]) -> None:
    scheduler = getattr(fq, name).from_config(pipeline_cases.SCHEDULERS["PNDMScheduler"])
    for steps in (2, 3, 11):
        compilations.clear()
        state = scheduler.set_timesteps(scheduler.create_state(), steps, (1, 4, 4, 4))
        scheduler.padded(state, 1016)
    assert not compilations


def test_a_callback_sees_each_step_of_the_same_program(pipe: Any, compilations: list[str]) -> None:
    seen: dict[int, Any] = {}
    expected = draw(pipe, output_type="latent", num_inference_steps=3)
    compilations.clear()
    latents = draw(pipe, output_type="latent", num_inference_steps=3, callback=seen.__setitem__)
    assert list(seen) == [0, 1, 2]
    assert not compilations
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    np.testing.assert_array_equal(seen[2], latents)
    assert np.abs(seen[1] - seen[2]).max() > 1e-3


def test_progress_is_logged(pipe: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flax_qformer.progress.Progress.__init__.__kwdefaults__", {"initial": 0, "line_every": 0.0})
    with caplog.at_level(logging.INFO, "flax_qformer.progress"):
        draw(pipe)
    assert [record.message.split(":")[0] for record in caplog.records] == ["drawing 1/2 steps", "drawing 2/2 steps"]


def test_several_prompts_share_a_subject(pipe: Any) -> None:
    prompts, negatives = ["in the water", "on a tree"], ["cat", "dog " * 200]
    together = draw(pipe, prompts, neg_prompt=negatives, rng=[3, 4])
    assert together.shape == (2, 8, 8, 3)
    for i in range(2):
        alone = draw(pipe, prompts[i], [[PHOTO]], neg_prompt=negatives[i], rng=[3 + i])
        np.testing.assert_allclose(together[i], alone[0], atol=PICTURE_ERROR)
    assert np.abs(together[0] - draw(pipe, prompts[0], neg_prompt=negatives[1], rng=3)[0]).max() > 1e-3


def test_several_pictures_of_each_prompt(pipe: Any) -> None:
    pictures = draw(pipe, num_images_per_prompt=2, rng=[1, 2])
    assert pictures.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(pictures[0], draw(pipe, rng=1)[0], atol=PICTURE_ERROR)
    np.testing.assert_allclose(pictures[1], draw(pipe, rng=jax.random.key(2))[0], atol=PICTURE_ERROR)
    more = draw(pipe, num_images_per_prompt=2, rng=jax.random.PRNGKey(2))
    np.testing.assert_allclose(more[0], pictures[1], atol=PICTURE_ERROR)
    assert np.abs(more[0] - more[1]).max() > 1e-2


def test_photos_of_a_subject_are_averaged(pipe: Any) -> None:
    other = cases.image("RGB", 70, 31)
    vectors = pipe.get_query_embeddings([PHOTO, other], "dog")
    assert vectors.shape == (2, 5, 24)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2
    average = pipe.get_query_embeddings([[PHOTO, other], [other]], ["dog", "dog"])
    np.testing.assert_allclose(average[0], vectors.mean(0), atol=1e-5)
    np.testing.assert_allclose(average[1], vectors[1], atol=1e-5)
    np.testing.assert_allclose(fq.mix_subjects(vectors), vectors.mean(0), atol=1e-6)
    expected = draw(pipe, reference_image=[[PHOTO, other]])
    options = {"reference_image": None, "source_subject_category": None}
    np.testing.assert_allclose(draw(pipe, subject_embeddings=average[0], **options), expected, atol=1e-5)
    changed = draw(pipe, subject_embeddings=vectors[0], **options)
    assert np.abs(changed - expected).max() > 1e-4
    pipe.subject_embeddings = average[0]
    np.testing.assert_allclose(draw(pipe, **options), expected, atol=1e-5)
    pipe.subject_embeddings = None


def test_one_photo_with_two_names_is_two_subjects(pipe: Any) -> None:
    pictures = draw(pipe, ["x", "x"], source_subject_category=["dog", "cat"], target_subject_category="a", rng=[1, 1])
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-4


def test_mixing_weighs_subjects() -> None:
    first, second = cases.draw("first", (5, 24)), cases.draw("second", (1, 5, 24))
    np.testing.assert_allclose(fq.mix_subjects([first, second], [3, 1]), (3 * first + second[0]) / 4, atol=1e-6)
    for weights in ([1], [1, -1], [1, np.nan], [[1, 2]]):
        with pytest.raises(fq.InputError, match="weight"):
            fq.mix_subjects([first, second], weights)
    with pytest.raises(fq.InputError, match="shape"):
        fq.mix_subjects([first, second[:, :4]])


def test_subjects_are_kept_in_a_file(tmp_path: Path) -> None:
    vectors, file = cases.draw("vectors", (2, 5, 24)), tmp_path / "subjects.npz"
    fq.save_subjects(file, vectors, ["dog", "über-cat"])
    kept, names = fq.load_subjects(file)
    assert kept.tobytes() == vectors.tobytes()
    assert names == ["dog", "über-cat"]
    with pytest.raises(fq.InputError, match="2 subjects and 1 names"):
        fq.save_subjects(file, vectors, "dog")
    with pytest.raises(fq.InputError, match="NaN"):
        fq.save_subjects(file, vectors * np.nan, ["dog", "cat"])
    np.savez(tmp_path / "other.npz", vectors=vectors)
    np.savez(tmp_path / "objects.npz", subject_embeddings=np.array([{}]), names=np.array(["dog"]))
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:-30])
    (tmp_path / "text.npz").write_text("dog")
    np.save(tmp_path / "array.npy", vectors)
    for name in ("other.npz", "objects.npz", "cut.npz", "text.npz", "array.npy", "none.npz", "."):
        with pytest.raises(fq.InputError):
            fq.load_subjects(tmp_path / name)


def test_lavis_cuts_the_longer_side(pipe: Any) -> None:
    wide = PIL.Image.new("RGB", (120, 40))
    wide.paste((255, 0, 0), (40, 0, 80, 40))
    square = np.asarray(centre_crop(wide, 20))
    assert square.shape == (20, 20, 3)
    assert (square[:, 2:-2] == (255, 0, 0)).all()
    tall = centre_crop(wide.rotate(90, expand=True), 20)
    np.testing.assert_array_equal(np.asarray(tall)[2:-2], np.full((16, 20, 3), (255, 0, 0)))
    ways = [pipe.get_query_embeddings(wide, "dog", preprocess=way) for way in ("upstream", "lavis")]
    assert np.abs(ways[0] - ways[1]).max() > 1e-2
    with pytest.raises(fq.InputError, match="preprocess"):
        pipe.get_query_embeddings(wide, "dog", preprocess="crop")


def test_a_weak_prompt_stands_there_once() -> None:
    assert build_prompts([" in water "], ["dog"], 0.0, 20) == ["a dog in water"]
    assert build_prompts(["x"], ["dog"], 0.04, 20) == ["a dog x"]
    assert build_prompts(["x", "y"], ["dog", "cat"], 0.1, 20) == ["a dog x, a dog x", "a cat y, a cat y"]


def test_guidance_moves_away_from_the_negative_prompt(pipe: Any) -> None:
    plain, strong = (draw(pipe, guidance_scale=scale, output_type="latent") for scale in (1.0, 1.0 + 1e-6))
    np.testing.assert_allclose(plain, strong, atol=1e-4)
    same = draw(pipe, guidance_scale=0.0, neg_prompt="cat", output_type="latent")
    np.testing.assert_array_equal(same, plain)
    assert np.abs(draw(pipe, guidance_scale=9.0, output_type="latent") - plain).max() > 1e-2


def test_output_types_show_the_same_picture(pipe: Any) -> None:
    array, images = draw(pipe), draw(pipe, output_type="pil")
    np.testing.assert_array_equal(np.asarray(images[0]), np.round(array[0] * 255).astype(np.uint8))
    latents = draw(pipe, output_type="latent")
    assert latents.shape == (1, 4, 4, 4)


@pytest.mark.slow
def test_half_precision_draws_the_same_picture(pipe: Any) -> None:
    half = fq.BlipDiffusionPipeline(
        {name: module.clone(dtype=jnp.bfloat16) for name, module in pipe.components.items()},
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pipe.params),
        pipe.scheduler,
        pipe.tokenizer,
        pipe.processor,
    )
    expected, latents = draw(pipe, output_type="latent"), draw(half, output_type="latent")
    # The scheduler's arithmetic is in float32.
    assert latents.dtype == jnp.float32
    assert 0 < np.abs(latents - expected).mean() < 0.1 * expected.std()
    pictures = draw(half)
    assert pictures.dtype == np.float32
    assert np.isfinite(pictures).all()


class DoublingScheduler(fq.DDIMScheduler):
    """A scheduler that scales the model's input."""

    def scale_model_input(self, state: Any, sample: jax.Array, timestep: Any = None) -> jax.Array:
        return sample / 2


def test_the_scheduler_can_be_swapped_and_scales_the_input(pipe: Any) -> None:
    before, plain = pipe.scheduler, draw(pipe, output_type="latent")
    pipe.scheduler = DoublingScheduler.from_config(before)
    scaled = draw(pipe, output_type="latent")
    pipe.scheduler = fq.DDPMScheduler.from_config(before)
    noisy = [draw(pipe, output_type="latent", rng=seed) for seed in (0, 0, 1)]
    pipe.scheduler = before
    for latents in (scaled, noisy[0]):
        assert np.abs(latents - plain).max() > 1e-3
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-2


@pytest.mark.slow
def test_a_batch_is_sharded_over_a_mesh(shared: dict[str, Any], pipe: Any, compilations: list[str]) -> None:
    sharded = build(shared, "two", "PNDMScheduler", mesh=fq.make_mesh(data=2))
    prompts = ["in the water", "on a tree"]
    latents = draw(sharded, prompts, output_type="latent")
    assert {shard.data.shape for shard in latents.addressable_shards} == {(1, 4, 4, 4)}
    compilations.clear()
    stepwise = draw(sharded, prompts, output_type="latent", callback=lambda step, latents: None)
    assert not compilations
    np.testing.assert_allclose(stepwise, latents, atol=1e-5)
    alone = fq.BlipDiffusionPipeline(pipe.components, pipe.params, sharded.scheduler, pipe.tokenizer, pipe.processor)
    np.testing.assert_allclose(draw(alone, prompts, output_type="latent"), latents, atol=PICTURE_ERROR)
    assert draw(sharded, prompts).shape == (2, 8, 8, 3)
    with pytest.raises(fq.InputError, match=r"1 does not divide .* 2 does"):
        draw(sharded)


def test_controlnets_act_in_their_part_of_the_steps(control_pipe: Any) -> None:
    edges = pipeline_cases.conditioning(pipeline_cases.DRAWINGS["control"])
    plain_pipe = fq.BlipDiffusionPipeline(
        control_pipe.components,
        control_pipe.params,
        control_pipe.scheduler,
        control_pipe.tokenizer,
        control_pipe.processor,
    )
    options = {"num_inference_steps": 4, "output_type": "latent"}
    without = draw(plain_pipe, **options)
    options["conditioning_image"] = edges
    off = draw(control_pipe, controlnet_conditioning_scale=0.0, **options)
    np.testing.assert_allclose(off, without, atol=1e-5)
    ways = [{}, {"control_guidance_start": 0.5}, {"control_guidance_end": 0.5}, {"controlnet_conditioning_scale": 0.5}]
    drawn = [without, *(draw(control_pipe, **options, **way) for way in ways)]
    for one, other in itertools.combinations(drawn, 2):
        assert np.abs(one - other).max() > 1e-4
    del options["conditioning_image"]
    np.testing.assert_array_equal(draw(control_pipe, condtioning_image=edges, **options), drawn[1])


@pytest.mark.slow
def test_each_prompt_has_its_conditioning_image(control_pipe: Any) -> None:
    edges = pipeline_cases.conditioning(pipeline_cases.DRAWINGS["control"])
    other = cases.image("RGB", 20, 20)
    each = draw(control_pipe, ["x", "y"], conditioning_image=[edges, other], rng=[1, 2], output_type="latent")
    alone = draw(control_pipe, "y", conditioning_image=other, rng=2, output_type="latent")
    np.testing.assert_allclose(each[1], alone[0], atol=PICTURE_ERROR)


@pytest.mark.slow
def test_several_controlnets_add_up(control_pipe: Any) -> None:
    edges, other = pipeline_cases.conditioning(pipeline_cases.DRAWINGS["control"]), cases.image("RGB", 20, 20)
    module, params = control_pipe.components["controlnet"], control_pipe.params["controlnet"]
    pair = fq.BlipDiffusionControlNetPipeline(
        control_pipe.components | {"controlnet": (module, module)},
        control_pipe.params | {"controlnet": (params, params)},
        control_pipe.scheduler,
        control_pipe.tokenizer,
        control_pipe.processor,
    )
    halves = draw(pair, conditioning_image=[edges, edges], controlnet_conditioning_scale=[0.25, 0.75])
    np.testing.assert_allclose(halves, draw(control_pipe, conditioning_image=edges), atol=PICTURE_ERROR)
    first = draw(pair, conditioning_image=[edges, other], controlnet_conditioning_scale=[1.0, 0.0])
    np.testing.assert_allclose(first, halves, atol=PICTURE_ERROR)
    for wrong in ({"conditioning_image": edges}, {"conditioning_image": [edges] * 3}):
        with pytest.raises(fq.InputError, match="2 ControlNets"):
            draw(pair, **wrong)
    with pytest.raises(fq.InputError, match="controlnet_conditioning_scale"):
        draw(pair, conditioning_image=[edges, edges], controlnet_conditioning_scale=[1.0] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 511, "width": 8}, r"511x8 .* nearest size is 512x8"),
        ({"height": 0}, "`height` is 0"),
        ({"width": 8.0}, "`width` is 8.0"),
        ({"prompt": []}, "`prompt`"),
        ({"prompt": 3}, "`prompt` must be a string"),
        ({"neg_prompt": [None]}, "`neg_prompt` must be a string"),
        ({"prompt": ["a", "b", "c"], "neg_prompt": ["x", "y"]}, "3 prompts and 2 of `neg_prompt`"),
        ({"prompt": ["a", "b"], "reference_image": [PHOTO] * 3}, "2 prompts and 3 photos"),
        ({"reference_image": [PHOTO] * 2}, "1 prompts and 2 photos .* list of lists"),
        ({"target_subject_category": ["a", "b"]}, "1 prompts and 2 of `target_subject_category`"),
        ({"source_subject_category": ["a", "b"]}, "1 prompts and 2 of `source_subject_category`"),
        ({"source_subject_category": None}, "`source_subject_category` is missing"),
        ({"source_subject_category": None, "target_subject_category": None}, "`target_subject_category` is missing"),
        ({"reference_image": None}, "either `reference_image` or `subject_embeddings`"),
        ({"subject_embeddings": np.ones((5, 24))}, "either `reference_image` or `subject_embeddings`"),
        ({"reference_image": None, "subject_embeddings": np.ones((5, 23))}, r"\(5, 23\)|\(1, 5, 23\)"),
        ({"reference_image": None, "subject_embeddings": np.ones((75, 24))}, "at most 74 queries"),
        ({"reference_image": None, "subject_embeddings": np.ones((2, 5, 24))}, "1 prompts and 2 subjects"),
        ({"reference_image": []}, "no photo"),
        ({"reference_image": [[]]}, "no photo"),
        ({"reference_image": "nowhere.jpg"}, "nowhere.jpg"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0; .* from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale`"),
        ({"guidance_scale": "7"}, "`guidance_scale` is '7'"),
        ({"prompt_strength": float("inf")}, "`prompt_strength`"),
        ({"output_type": "pt"}, "`output_type` is 'pt'"),
        ({"latents": np.zeros((1, 4, 4, 3))}, r"\(1, 4, 4, 4\)"),
        ({"latents": np.zeros((1, 4, 2, 2)), "height": 4, "width": 4}, r"\(pictures, height, width, channels\)"),
        ({"rng": [1, 2]}, "`rng` is .* 1 pictures"),
        ({"rng": np.zeros(2, np.float32)}, "`rng` is float32"),
    ],
)
def test_bad_arguments_are_named(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fq.InputError, match=message):
        draw(pipe, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`conditioning_image`"),
        ({"conditioning_image": PHOTO, "condtioning_image": PHOTO}, "`conditioning_image`"),
        ({"conditioning_image": b"no image"}, "not an image"),
        ({"conditioning_image": [PHOTO] * 3}, "1 prompts and 3 of `conditioning_image`"),
        ({"conditioning_image": PHOTO, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, "start"),
        ({"conditioning_image": PHOTO, "control_guidance_end": 1.5}, "control_guidance_end"),
        ({"conditioning_image": PHOTO, "controlnet_conditioning_scale": "1"}, "controlnet_conditioning_scale"),
        ({"conditioning_image": PHOTO, "controlnet_conditioning_scale": float("inf")}, "finite"),
    ],
)
def test_bad_conditioning_is_named(control_pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fq.InputError, match=message):
        draw(control_pipe, **options)


def test_a_missing_part_is_named(pipe: Any) -> None:
    with pytest.raises(fq.InputError, match="no controlnet"):
        fq.BlipDiffusionControlNetPipeline(pipe.components, pipe.params, pipe.scheduler, pipe.tokenizer, pipe.processor)
