"""`generate`: single pictures and what their files record; lists of them, the same ones after any interruption."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

import cases
import flax_qformer as fq
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL, DEFAULT_PIPELINE, EXAMPLE_IMAGE
from flax_qformer.commands.drawing import _default_size
from flax_qformer.commands.main import main, parse
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from torch_files import torch_save

BIN = Path(sys.executable).parent
SIDE = 64
"""Of the embedded pipeline's pictures, in pixels."""


@pytest.fixture(scope="module")
def pipe() -> fq.BlipDiffusionPipeline:
    return fq.BlipDiffusionPipeline.from_pretrained(mesh=fq.make_mesh())


def generate(
    output: Path, *more: Any, prompts: Sequence[str] = ("in the snow",), photos: Sequence[Path] = (EXAMPLE_IMAGE,)
) -> None:
    """Run the command; batches of two share one compiled program."""
    arguments = ["--prompt", *prompts, "--reference", *photos, "--subject", "dog", "--output", output]
    main(list(map(str, ["generate", *arguments, "--steps", 2, "--batch-size", 2, "--quiet", *more])))


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image, int)


def parameters(path: Path) -> dict[str, Any]:
    with PIL.Image.open(path) as image:
        return json.loads(image.info["parameters"])


def check_close(one: np.ndarray, other: np.ndarray) -> None:
    """Equal up to the rounding of batches of different sizes."""
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= 1


def test_one_picture(
    pipe: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    generate(tmp_path / "out.png", "--seed", 5)
    assert capfd.readouterr().out == f"wrote {tmp_path / 'out.png'}: 1 of {SIDE}x{SIDE} pixels\n"
    (warning,) = caplog.messages
    assert "not trained to draw, so its pictures are noise; name a trained one" in warning
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
    expected, _ = pipe(["in the snow"] * 2, EXAMPLE_IMAGE, "dog", "dog", rng=[5, 6], **options).images
    check_close(pixels(tmp_path / "out.png"), np.asarray(expected, int))
    assert pixels(tmp_path / "out.png").std() > 1
    recorded = parameters(tmp_path / "out.png")
    wanted = {
        "prompt": "in the snow",
        "seed": 5,
        "subject": "dog",
        "target": "dog",
        "reference": [str(EXAMPLE_IMAGE)],
        "steps": 2,
        "guidance": 7.5,
        "scheduler": "PNDMScheduler",
        "size": f"{SIDE}x{SIDE}",
        "dtype": "float32",
        "version": fq.__version__,
    }
    assert recorded | wanted == recorded


def test_prompts_by_seeds_and_their_grid(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = ["in the snow", "on a beach with many palms and a very long walk behind it"]
    generate(tmp_path / "out.png", "--num-images", 2, "--seed", 3, "--grid", prompts=prompts)
    assert "out-0.png to out-3.png and the grid" in capfd.readouterr().out
    pictures = [pixels(tmp_path / f"out-{i}.png") for i in range(4)]
    recorded = [parameters(tmp_path / f"out-{i}.png") for i in range(4)]
    assert [(row["prompt"], row["seed"]) for row in recorded] == [(p, s) for p in prompts for s in (3, 4)]
    assert len({picture.tobytes() for picture in pictures}) == 4
    # A picture depends on its own seed, not on those beside it.
    generate(tmp_path / "alone.png", "--seed", 4, prompts=[prompts[1]])
    check_close(pixels(tmp_path / "alone.png"), pictures[3])

    grid = pixels(tmp_path / "out.png")
    assert parameters(tmp_path / "out.png")["seed"] == [3, 4]
    for picture in pictures:
        windows = np.lib.stride_tricks.sliding_window_view(grid, picture.shape)[:, :, 0]
        corner = (windows[:, :, 0, 0] == picture[0, 0]).all(-1)
        assert any((grid[y : y + SIDE, x : x + SIDE] == picture).all() for y, x in np.argwhere(corner))
    # The labels are dark on white, above the columns and above each row.
    is_dark = (grid.max(-1) < 100).any(1)
    assert is_dark[:14].any()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of calls of pipelines, which draw nothing."""
    recorded: list[dict[str, Any]] = []

    def record(pipe: Any, prompt: Any, **options: Any) -> fq.ImagePipelineOutput:
        recorded.append({"pipe": pipe, "prompt": prompt, **options})
        shape = (len(prompt), options["height"], options["width"], 3)
        return fq.ImagePipelineOutput(np.full(shape, options["guidance_scale"] / 10, np.float32))

    monkeypatch.setattr(fq.BlipDiffusionPipeline, "__call__", record)
    monkeypatch.setattr(fq.BlipDiffusionControlNetPipeline, "__call__", record)
    return recorded


def write_controlnet(folder: Path) -> None:
    """A ControlNet for the embedded pipeline, with random weights, as upstream writes it."""
    config = json.loads((DEFAULT_PIPELINE / "unet" / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(fq.ControlNetConfig)}
    config = {name: value for name, value in config.items() if name in names} | {"_class_name": "ControlNetModel"}
    config["conditioning_embedding_out_channels"] = [4] * 4
    module = fq.ControlNetModel(fq.ControlNetConfig.from_dict(config))
    inputs = np.zeros((1, 8, 8, 4)), 0, np.zeros((1, 5, 64)), np.zeros((1, SIDE, SIDE, 3))
    shapes = flatten_dict(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"], sep="/")
    rows = [parameter_at(path, leaf.shape) for path, leaf in shapes.items()]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {row.name: cases.weight(row.name, row.torch_shape) for row in rows}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("sample_size", "size"), [(8, (64, 64)), ((8, 12), (96, 64))])
def test_the_default_size_is_that_of_the_unet(sample_size: Any, size: tuple[int, int]) -> None:
    assert _default_size(sized_pipe(sample_size)) == size


@pytest.mark.parametrize("sample_size", [None, (8,)])
def test_a_unet_without_a_size_needs_the_option(sample_size: Any) -> None:
    with pytest.raises(fq.InputError, match="`size`"):
        _default_size(sized_pipe(sample_size))


def sized_pipe(sample_size: Any) -> Any:
    configs = {"unet": SimpleNamespace(sample_size=sample_size), "vae": SimpleNamespace(downscale=8)}
    return SimpleNamespace(components={name: SimpleNamespace(config=config) for name, config in configs.items()})


def test_options_reach_the_pipeline(pipe: Any, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    cases.image("RGB", 50, 40).save(tmp_path / "other.png")
    write_controlnet(tmp_path / "control")
    photos = [EXAMPLE_IMAGE, tmp_path / "other.png"]
    drawing = ["--scheduler", "dpm++", "--size", "96x32", "--guidance", 3, "--negative", "blurry", "--target", "cat"]
    more = ["--preprocess", "lavis", "--dtype", "bfloat16", "--num-images", 3, "--seed", 4, "--mesh", "data=2"]
    control = ["--controlnet", tmp_path / "control", "--control", tmp_path / "other.png", "--control-scale", 0.5]
    control += ["--control-guidance-start", 0.2, "--control-guidance-end", 0.7, "--prompt-reps", 3]
    generate(tmp_path / "out.png", *drawing, *more, *control, photos=photos)
    first, second = calls
    vectors = first.pop("subject_embeddings")
    expected = {
        "prompt": ["in the snow"] * 2,
        "target_subject_category": "cat",
        "guidance_scale": 3.0,
        "neg_prompt": "blurry",
        "num_inference_steps": 2,
        "width": 96,
        "height": 32,
        "rng": [4, 5],
        "controlnet_conditioning_scale": 0.5,
        "control_guidance_start": (0.2,),
        "control_guidance_end": (0.7,),
        "prompt_strength": 1.0,
        "prompt_reps": 3,
    }
    assert first | expected == first
    assert first["conditioning_image"].size == PIL.Image.open(tmp_path / "other.png").size
    assert type(first["pipe"].scheduler) is fq.DPMSolverMultistepScheduler
    assert first["pipe"].components["unet"].dtype == jnp.bfloat16
    assert first["pipe"].mesh.shape["data"] == 2
    assert second["rng"] == [6, 6]  # the last batch is padded
    assert pixels(tmp_path / "out-2.png").shape == (32, 96, 3)
    assert not (tmp_path / "out-3.png").exists()
    # Several photos are averaged.
    wanted = pipe.get_query_embeddings([photos], "dog", preprocess="lavis")
    assert vectors.shape == (2, *wanted.shape[1:])
    np.testing.assert_allclose(vectors[:1], wanted, atol=0.1)
    assert np.abs(vectors[0] - pipe.get_query_embeddings([photos], "dog")[0]).max() > 0.2


@pytest.mark.slow
def test_a_controlnet_steers_a_picture(tmp_path: Path) -> None:
    cases.image("RGB", 50, 40).save(tmp_path / "edges.png")
    write_controlnet(tmp_path / "control")
    control = ["--controlnet", tmp_path / "control", "--control", tmp_path / "edges.png", "--prompt-reps", 1]
    ways = {"on": [], "off": ["--control-scale", 0], "early": ["--control-guidance-end", 0.5]}
    for name, more in ways.items():
        generate(tmp_path / f"{name}.png", *control, *more)
    generate(tmp_path / "plain.png", "--prompt-reps", 1)
    on, off, early, plain = (pixels(tmp_path / f"{name}.png") for name in (*ways, "plain"))
    check_close(off, plain)
    assert np.abs(on - plain).max() > 1
    assert np.abs(early - plain).max() > 1
    assert np.abs(early - on).max() > 1
    assert parameters(tmp_path / "early.png")["control_guidance_end"] == [0.5]


def test_a_scheduler_does_not_clip_latents(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    """Whatever the pipeline's own config says, or does not say."""
    folder = tmp_path / "pipeline"
    shutil.copytree(DEFAULT_PIPELINE, folder)
    shutil.copytree(DEFAULT_MODEL, folder / "qformer", ignore=lambda *_: ["pipeline"])
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config.pop("clip_sample") is False
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    generate(tmp_path / "out.png", "--model", folder, "--scheduler", "ddim")
    assert calls[0]["pipe"].scheduler == fq.DDIMScheduler.from_config(config, clip_sample=False)


def test_pictures_that_are_not_finite(
    calls: list[dict[str, Any]], lists: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        generate(tmp_path / "out.png", "--guidance", "inf", "--seed", 3)
    assert (
        "'in the snow' with seed 3 failed: its picture has values that are not finite in float32; choose another"
        in (capfd.readouterr().err)
    )
    assert not (tmp_path / "out.png").exists()
    main(program(lists, tmp_path / "all", "--guidance", "inf"))
    errors = pd.read_parquet(tmp_path / "all" / "rows")["error"]
    assert (errors == "its picture has values that are not finite in float32").sum() == ROWS - len(PROMPTS) * SEEDS


def test_a_fine_tuned_subject(calls: list[dict[str, Any]], pipe: Any, tmp_path: Path) -> None:
    """A file of LAVIS brings a UNet and vectors."""
    with safe_open(DEFAULT_PIPELINE / "unet" / "diffusion_pytorch_model.safetensors", "np") as file:
        tensors = {f"unet.{name}": file.get_tensor(name).astype(np.float32) * 2 for name in file.keys()}  # noqa: SIM118
    vectors = pipe.get_query_embeddings(EXAMPLE_IMAGE, "dog") * 2
    torch_save({"model": tensors | {"ctx_embeddings_cache": vectors}}, tmp_path / "dog.pth")
    arguments = ["generate", "--subject", tmp_path / "dog.pth", "--prompt", "in the snow", "--target", "dog"]
    main(list(map(str, [*arguments, "--output", tmp_path / "out.png"])))
    np.testing.assert_array_equal(calls[0]["subject_embeddings"][:1], vectors)
    name = "conv_in"
    new, old = (np.asarray(p.params["unet"][name]["kernel"], np.float32) for p in (calls[0]["pipe"], pipe))
    np.testing.assert_allclose(new, old * 2)


def test_lora(pipe: Any, tmp_path: Path) -> None:
    kernel = pipe.params["unet"]["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]["kernel"]
    width, inner = kernel.shape[0], kernel.shape[1] * kernel.shape[2]
    rng, name = np.random.default_rng(0), "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    up, down = rng.normal(size=(inner, 2)), rng.normal(size=(2, width))
    file = tmp_path / "lora.safetensors"
    save_file({f"{name}_A.weight": down.astype("f"), f"{name}_B.weight": up.astype("f")}, file)
    generate(tmp_path / "plain.png")
    generate(tmp_path / "zero.png", "--lora", file, "--lora-scale", 0)
    generate(tmp_path / "with.png", "--lora", file)
    check_close(pixels(tmp_path / "zero.png"), pixels(tmp_path / "plain.png"))
    assert np.abs(pixels(tmp_path / "with.png") - pixels(tmp_path / "plain.png")).max() > 1
    assert parameters(tmp_path / "zero.png")["lora_scale"] == [0.0]
    other = fq.BlipDiffusionPipeline.from_pretrained()
    other.load_lora(file, 0.5)
    changed = other.params["unet"]["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]["kernel"]
    expected = np.asarray(kernel) + 0.5 * (up @ down).T.reshape(kernel.shape)
    np.testing.assert_allclose(changed, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "64"], "--size is 64; write the width and the height in pixels, as in 512x768"),
        (["--size", "0x64"], "--size is 0x64"),
        (["--size", "66x64"], "the nearest size is"),
        (["--steps", "5000"], "it must be a whole number from 1 to 1000"),
        (["--guidance", "nan"], "is nan; it must be a finite number"),
        (["--dtype", "float31"], "float31"),
        (["--output", "out.jpg"], "out.jpg becomes a PNG picture; end the name in .png"),
        (["--reference", "absent.png"], "there is no image absent.png"),
        (["--reference", "bad.png"], "bad.png is not an image"),
        (["--reference", "copy.png", "--output", "copy.png"], "copy.png is one of the inputs"),
        (["--control", "bad.png"], "bad.png is not an image"),
        (["--control-scale", "1"], "--control-scale goes with --control"),
        (["--controlnet", "x"], "--controlnet needs the picture to follow; name it with --control"),
        (["--control", "copy.png", "copy.png"], "1 ControlNets and 2 of --control; give one for each"),
        (["--control-guidance-end", "0.5"], "--control-guidance-end goes with --control"),
        (["--control", "copy.png", "--control-guidance-start", "1"], "acts from --control-guidance-start 1.0 to"),
        (["--lora-scale", "1"], "--lora-scale goes with --lora"),
        (["--lora", "absent.safetensors"], "there is no file absent.safetensors"),
        (["--lora", "bad.png", "--lora-scale", "1", "2"], "1 files and 2 of --lora-scale"),
        (["--lora", "bad.png"], "bad.png"),
        (["--subject-file", "copy.png"], "--reference and --subject-file both give the subject; leave one out"),
        (["--prompt"], "--prompt is empty; put a text after it"),
        (["--num-images", "2", "--seed", "1", "2"], "--num-images counts on from one --seed, and 2 are named"),
        (["--shard-size", "3"], "--shard-size goes with --prompts or --references"),
        (["--prompts", "bad.bin"], "the prompts bad.bin are not UTF-8 text"),
        (["--prompts", "absent.txt"], "the prompts absent.txt cannot be read"),
        (["--prompts", "empty.txt"], "the prompts empty.txt are empty"),
        (["--prompts", "p.txt", "--grid"], "--grid draws one picture"),
        (["--prompts", "p.txt", "--process", "2", "2"], "there is no process 2 of 2"),
        (["--prompts", "p.txt", "--output", "."], "holds other files than pictures of a list"),
        (["--model", "none/of/these"], "none/of/these"),
        (["--mesh", "data"], "the mesh is 'data'"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "bad.bin").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "p.txt").write_text("in the snow\n")
    (tmp_path / "copy.png").write_bytes(EXAMPLE_IMAGE.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        generate(Path("new/out.png"), *more)
    assert caught.value.code == 2
    *warnings, line = capfd.readouterr().err.splitlines()
    assert line.startswith("flax-qformer generate: ")
    assert message in line
    assert all("its pictures are noise" in warning for warning in warnings)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt is named; put what the subject does or where it is after --prompt"),
        (["--prompt", "a"], "no photo is named; name one or more of the subject with --reference"),
        (["--prompt", "a", "--reference", str(EXAMPLE_IMAGE)], "the subject has no name"),
        (["--prompt", "a", "--subject-file", "absent.npz"], "there is no file absent.npz"),
        (["--prompt", "a", "--subject", "absent.pth"], "there is no file absent.pth"),
        (["--prompt", "a", "--subject-file", str(EXAMPLE_IMAGE)], "is no subject; name an .npz of vectors"),
    ],
)
def test_what_is_missing(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", *arguments])
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


def test_a_subject_is_chosen_by_its_name(pipe: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vectors = np.concatenate([pipe.get_query_embeddings(EXAMPLE_IMAGE, name) for name in ("dog", "cat")])
    fq.save_subjects(tmp_path / "both.npz", vectors, ["dog", "cat"])
    arguments = ["generate", "--prompt", "in the snow", "--steps", "2", "--batch-size", "2", "--quiet"]
    arguments += ["--subject-file", str(tmp_path / "both.npz"), "--output"]
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "out.png")])
    assert "both.npz holds 2 subjects; choose one with --subject: dog, cat" in capfd.readouterr().err
    main([*arguments, str(tmp_path / "out.png"), "--subject", "dog"])
    generate(tmp_path / "photo.png")
    check_close(pixels(tmp_path / "out.png"), pixels(tmp_path / "photo.png"))
    # A file with one subject needs no other option, and brings the subject's name.
    fq.save_subjects(tmp_path / "one.npz", vectors[:1], "dog")
    shared = ["generate", "--prompt", "in the snow", "--steps", "2", "--batch-size", "2", "--quiet"]
    main([*shared, "--subject", str(tmp_path / "one.npz"), "--output", str(tmp_path / "one.png")])
    np.testing.assert_array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "out.png"))
    (tmp_path / "unnamed.pth").touch()
    with pytest.raises(SystemExit):
        main([*shared, "--subject", str(tmp_path / "unnamed.pth")])
    assert "unnamed.pth has no name; name it with --target, as in dog" in capfd.readouterr().err


def test_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("prompt: [a, b]\nsteps: 25\nsize: 512x768\nseed: [1, 2]\nscheduler: dpm++\nreference: dog.jpg\n")
    options = parse(["generate", "--settings", str(file), "--steps", "20"])
    assert (options.steps, options.size, options.seed, options.scheduler) == (20, "512x768", (1, 2), "dpm++")
    assert options.reference == (Path("dog.jpg"),)


PROMPTS = ["in the snow", "on a beach", "as a painting: red/blue"]
PHOTOS, SEEDS = 5, 2
ROWS = PHOTOS * len(PROMPTS) * SEEDS


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, one of them broken, and prompts."""
    folder = tmp_path_factory.mktemp("lists")
    (folder / "photos").mkdir()
    for i in range(PHOTOS):
        cases.image("RGB", 30 + i, 40).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "2.png").write_text("no image")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    return folder


def program(lists: Path, output: Path, *more: Any) -> list[str]:
    arguments = ["generate", "--prompts", lists / "prompts.txt", "--references", lists / "photos", "--subject", "dog"]
    arguments += ["--output", output, "--steps", 2, "--num-images", SEEDS, "--batch-size", 2, "--shard-size", 4]
    return list(map(str, [*arguments, *more]))


@pytest.fixture(scope="module")
def uninterrupted(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "new" / "pictures"
    main(program(lists, output))
    return output


def contents(output: Path) -> dict[str, bytes]:
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def test_every_photo_with_every_prompt_and_seed(lists: Path, uninterrupted: Path, tmp_path: Path) -> None:
    # As in the README.
    rows = pd.read_parquet(uninterrupted / "rows")
    assert rows["row"].tolist() == list(range(ROWS))
    expected = [(f"{i}.png", prompt, seed) for i in range(PHOTOS) for prompt in PROMPTS for seed in range(SEEDS)]
    assert list(zip(rows["reference"], rows["prompt"], rows["seed"], strict=True)) == expected
    assert rows["id"].is_unique
    bad = rows[rows["error"].notna()]
    assert set(bad["reference"]) == {"2.png"}
    assert len(bad) == len(PROMPTS) * SEEDS
    assert bad["error"].str.contains("2.png is not an image").all()
    assert bad["file"].isna().all()
    files = rows["file"].dropna().tolist()
    assert sorted(path.name for path in (uninterrupted / "pictures").iterdir()) == sorted(Path(f).name for f in files)
    one = rows.iloc[9]
    assert one["file"] == "pictures/0000009-on-a-beach-1.png"
    generate(tmp_path / "alone.png", "--seed", 1, prompts=["on a beach"], photos=[lists / "photos" / "1.png"])
    check_close(pixels(uninterrupted / one["file"]), pixels(tmp_path / "alone.png"))
    recorded = parameters(uninterrupted / one["file"])
    assert (recorded["prompt"], recorded["seed"], recorded["reference"]) == ("on a beach", 1, "1.png")


def test_only_what_is_missing_is_drawn(
    lists: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pictures"
    for name, content in contents(uninterrupted).items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    # The second shard is lost with one of its pictures, as a kill leaves it; another picture is cut off.
    (output / "rows" / "00001-of-00008.parquet").unlink()
    (output / "pictures" / "0000006-in-the-snow-0.png").unlink()
    picture = output / "pictures" / "0000007-in-the-snow-1.png"
    picture.write_bytes(picture.read_bytes()[:-100])
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.p*")}
    main(program(lists, output))
    assert f"8 shards: {ROWS} rows, 6 with an error" in capfd.readouterr().out
    assert contents(output) == contents(uninterrupted)
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*.p*")}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"00001-of-00008.parquet", "0000006-in-the-snow-0.png", "0000007-in-the-snow-1.png"}
    main(program(lists, output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.p*")} == after


def test_two_processes_share_a_list(lists: Path, uninterrupted: Path, tmp_path: Path) -> None:
    for i in (1, 0):
        main(program(lists, tmp_path / "pictures", "--process", i, 2))
    assert contents(tmp_path / "pictures") == contents(uninterrupted)


def test_one_subject_and_many_prompts(lists: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--prompts", lists / "prompts.txt", "--subject", "dog", "--output", tmp_path / "out"]
    main(
        list(
            map(
                str,
                [*arguments, "--reference", lists / "photos" / "1.png", "--steps", 2, "--seed", 7, "--batch-size", 2],
            )
        )
    )
    rows = pd.read_parquet(tmp_path / "out" / "rows")
    assert rows["prompt"].tolist() == PROMPTS
    generate(tmp_path / "alone.png", "--seed", 7, prompts=[PROMPTS[1]], photos=[lists / "photos" / "1.png"])
    check_close(pixels(tmp_path / "out" / rows["file"][1]), pixels(tmp_path / "alone.png"))


def test_lists_that_cannot_resume_are_refused(
    lists: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *more: Any, output: Path = uninterrupted) -> None:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(program(lists, output, *more))
        line = capfd.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2
        assert message in line

    before = contents(uninterrupted)
    refused("other settings: --steps was 2 and is now 3. Set them back, or name another --output", "--steps", 3)
    refused("other settings: --negative was", "--negative", "blurry", "--scheduler", "ddim")
    refused("a picture of other references, prompts or seeds", "--seed", 5)
    refused("a picture of other references, prompts or seeds", "--num-images", 1)
    refused("lies inside the data", output=lists / "photos" / "out")
    assert contents(uninterrupted) == before
    # Without a complete shard, the pictures themselves tell.
    output = tmp_path / "pictures"
    name = "0000000-in-the-snow-0.png"
    (output / "pictures").mkdir(parents=True)
    (output / "pictures" / name).write_bytes(before[f"pictures/{name}"])
    refused(f"{name} was drawn with other settings: guidance was 7.5 and is now 2.0", "--guidance", 2, output=output)
    (output / "notes.txt").touch()
    refused("holds other files than pictures of a list, notes.txt", output=output)


@pytest.mark.slow
def test_kills_at_random_moments(lists: Path, uninterrupted: Path, tmp_path: Path) -> None:
    print("seed", seed := time.time_ns())
    rng = random.Random(seed)
    output = tmp_path / "pictures"

    def written() -> int:
        return len(list(output.rglob("[!.]*.p*")))

    for _ in range(60):
        process = subprocess.Popen(
            [BIN / "flax-qformer", *program(lists, output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        # During the start, or at a random moment of the work.
        wanted, limit = written() + rng.randrange(1, 12), time.monotonic() + rng.choice([rng.random() * 15, 300, 300])
        while process.poll() is None and written() < wanted and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        print(number.name, process.returncode, written())
        assert number == signal.SIGKILL or "Traceback" not in stderr or process.returncode < 0
        if process.returncode == 0:
            break
    assert process.returncode == 0, stderr
    assert contents(output) == contents(uninterrupted)
