"""The commands as a user runs them, and their error messages."""

import ast
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import cases
import flax_qformer as fq
from conftest import GOLDEN
from flax_qformer import convert
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL, EXAMPLE_IMAGE
from flax_qformer.commands.embed import EmbedOptions
from flax_qformer.commands.main import COMMANDS, main, parse
from flax_qformer.commands.messages import with_options
from scenes import HELD_OUT, draw_scene
from torch_files import torch_save

BIN = Path(sys.executable).parent


def run(*arguments: Any, folder: Path, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command in its own process, with additional environment variables."""
    command = [BIN / "flax-qformer", *map(str, arguments)]
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def embeddings(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    done = run("embed", EXAMPLE_IMAGE, "--text", "red circle", folder=tmp_path, XLA_FLAGS="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "embeddings.npz: query_embeddings (1, 8, 64)" in done.stdout
    model, params = fq.from_pretrained(DEFAULT_MODEL)
    batch = fq.Processor.from_pretrained(DEFAULT_MODEL)(EXAMPLE_IMAGE, "red circle")
    expected = model.apply({"params": params}, **batch).query_embeddings
    written = embeddings(tmp_path / "embeddings.npz")
    np.testing.assert_allclose(written["query_embeddings"], expected, atol=1e-5)
    assert written["images"].tolist() == [str(EXAMPLE_IMAGE)]
    assert written["texts"].tolist() == ["red circle"]


@pytest.mark.slow
def test_compiled_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    cache, blocked = tmp_path / "cache", tmp_path / "a file"
    blocked.touch()
    outputs = []
    for variables in (
        {"XDG_CACHE_HOME": cache},
        {"XDG_CACHE_HOME": cache},
        {"XDG_CACHE_HOME": blocked / "below"},
        {"XDG_CACHE_HOME": tmp_path / "unused", "JAX_COMPILATION_CACHE_DIR": tmp_path / "own"},
        {"XDG_CACHE_HOME": tmp_path / "unused", "JAX_ENABLE_COMPILATION_CACHE": 0},
    ):
        done = run("embed", EXAMPLE_IMAGE, folder=tmp_path, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(embeddings(tmp_path / "embeddings.npz")["query_embeddings"])
    assert all(np.array_equal(output, outputs[0]) for output in outputs)
    kept = {path.parent for path in tmp_path.rglob("*-cache")}
    assert kept == {cache / "flax_qformer", tmp_path / "own"}


def test_no_pytorch_is_needed(tmp_path: Path) -> None:
    """Packages of training and pictures are imported only when they are used."""
    program = f"""
import sys
import tyro

tyro.cli(int, args=["0"])  # once, before "torch" is blocked: tyro imports it if sys.modules has that name
for name in ("torch", "orbax", "matplotlib", "datasets", "grain", "tensorboardX"):
    sys.modules[name] = None
from flax_qformer.commands.embed import EmbedOptions
from flax_qformer.commands.main import main
main(["embed", {str(EXAMPLE_IMAGE)!r}, "--text", "dog"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_many_images_and_texts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []
    for i in range(5):
        images.append(tmp_path / f"{i}.png")
        cases.image("RGB", 30 + i, 50).save(images[-1])
    texts = ["dog", "a red circle", "cat", "x", "a photo of a small blue square"]
    output = tmp_path / "new" / "all.npz"
    base = ["embed", *map(str, images), "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        main([*base, "--text", *texts, "--batch-size", "2"])
    together = embeddings(output)["query_embeddings"]
    assert together.shape == (5, 8, 64)
    progress = capfd.readouterr().err
    assert "5/5" in progress
    assert "image/s" in progress
    # One --text per image gives the same; neither the batch nor its padding matters.
    main([*base, *(word for text in texts for word in ("--text", text))])
    np.testing.assert_allclose(embeddings(output)["query_embeddings"], together, atol=cases.ROUNDING)
    assert capfd.readouterr().err == ""
    main(["embed", str(images[3]), "--text", "x", "--output", str(output)])
    np.testing.assert_allclose(embeddings(output)["query_embeddings"][0], together[3], atol=cases.ROUNDING)
    main([*base, "--text", "x", "--dtype", "bfloat16"])
    half = embeddings(output)["query_embeddings"]
    assert half.dtype == np.float32
    assert 0 < np.abs(half[3] - together[3]).max() < 0.2
    main(base)
    assert "texts" not in embeddings(output)


def test_attend_draws_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "attention.png"
    for layers in (["--layers"], ["--layers", "0", "1"]):
        main(["attend", str(EXAMPLE_IMAGE), "--text", "red circle", "--output", str(picture), *layers])
        with PIL.Image.open(picture) as image:
            assert image.width > 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 100
    main(["attend", str(EXAMPLE_IMAGE), "--text", "$x^", "--output", str(tmp_path / "attention.SVG")])
    assert "<svg" in (tmp_path / "attention.SVG").read_text()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{importlib.metadata.version('flax-qformer')}\n")


def test_search_and_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model works on combinations that it was not trained on."""
    scenes = [draw_scene(np.random.default_rng(seed), HELD_OUT) for seed in range(8)]
    images = [tmp_path / f"{i}.png" for i in range(len(scenes))]
    for scene, image in zip(scenes, images, strict=True):
        scene.draw().save(image)
    texts = [scene.caption() for scene in scenes]
    main(["search", *map(str, images), "--text", *texts, "--top", "2", "--batch-size", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == texts
    first = [line.split() for line in lines[1::3]]
    second = [line.split() for line in lines[2::3]]
    assert all(float(a[0]) >= float(b[0]) for a, b in zip(first, second, strict=True))
    assert sum(row[1] == str(image) for row, image in zip(first, images, strict=True)) >= 6

    captions = []
    for options in (["--batch-size", "3"], ["--nucleus", "--seed", "3"], ["--nucleus", "--seed", "3"]):
        main(["caption", *map(str, images), *options])
        captions.append(dict(line.split(": ") for line in capsys.readouterr().out.splitlines()))
        assert list(captions[-1]) == list(map(str, images))
    assert captions[1] == captions[2]
    colours = [
        {thing.colour for thing in scene.things} & set(text.split())
        for scene, text in zip(scenes, captions[0].values(), strict=True)
    ]
    assert sum(map(bool, colours)) >= 7


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_pictures_of_narrow_images_have_a_bounded_size(size: tuple[int, int], tmp_path: Path) -> None:
    PIL.Image.new("RGB", size).save(tmp_path / "image.png")
    main(["attend", str(tmp_path / "image.png"), "--output", str(tmp_path / "attention.png")])
    with PIL.Image.open(tmp_path / "attention.png") as image:
        assert max(image.size) < 5000


@pytest.mark.parametrize("mode", ["I;16", "L", "La"])
def test_photos_are_drawn_small_and_as_the_model_sees_them(mode: str) -> None:
    image = cases.image("LA", 900, 1200).convert("La") if mode == "La" else cases.image(mode, 900, 1200)
    figure = fq.draw_attention(image, {"row": np.ones((3, 2, 2), np.float32)})
    drawn, *panels = (axes.images[0].get_array() for axes in figure.axes)
    assert drawn.shape == (360, 480, 3)
    assert [panel.shape for panel in panels] == [(360, 480)] * 4
    assert image.size == (1200, 900)


def test_attention_maps_are_where_the_patches_are() -> None:
    config = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_2"])
    grid = config.vision_config.grid_size
    weights = np.zeros((2, 7, 3, grid * grid + 1), np.float32)
    weights[1, :, 2, 1 + 3 * grid + 1] = np.linspace(0, 1, 7)  # row 3, column 1, half of its brightness on average
    maps = np.asarray(fq.attention_maps([jnp.zeros_like(weights), weights], config))
    assert maps.shape == (2, 2, 3, grid, grid)
    assert maps[1, 1, 2, 3, 1] == pytest.approx(0.5)
    assert maps.sum() == pytest.approx(0.5)


def test_convert_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(DEFAULT_MODEL), str(tmp_path / "flax"), "--dtype", "float16"])
    left_out = "1 tensors left out by rule (position_ids)"
    assert f"parameters in float16 (diffusers names); {left_out}; wrote" in capsys.readouterr().out
    main(["embed", str(EXAMPLE_IMAGE), "--model", str(tmp_path / "flax"), "--output", str(tmp_path / "e.npz")])
    main(["export", str(tmp_path / "flax"), str(tmp_path / "torch")])
    assert {path.name for path in (tmp_path / "torch").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "vocab.txt",
    }
    main(["export", str(tmp_path / "flax"), str(tmp_path / "torch"), "--overwrite"])


def test_a_lavis_checkpoint_end_to_end(tmp_path: Path) -> None:
    """A checkpoint without config and tokenizer; the options name both."""
    config = fq.Blip2Config.from_json(DEFAULT_MODEL / "config.json")
    from conftest import weights

    torch_save({"model": weights(config, "lavis")}, tmp_path / "lavis.pth")
    parts = ["--config", str(DEFAULT_MODEL / "config.json"), "--tokenizer", str(DEFAULT_MODEL)]
    main(["convert", str(tmp_path / "lavis.pth"), str(tmp_path / "flax"), *parts])
    outputs = []
    for model in ([str(tmp_path / "lavis.pth"), *parts], [str(tmp_path / "flax")]):
        main(["embed", str(EXAMPLE_IMAGE), "--text", "dog", "--output", str(tmp_path / "e.npz"), "--model", *model])
        outputs.append(embeddings(tmp_path / "e.npz")["query_embeddings"])
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: flax-qformer" in capsys.readouterr().out


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of unusable inputs."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(EXAMPLE_IMAGE.read_bytes()[:2000])
    (folder / "notes.safetensors").write_text("no checkpoint")
    (folder / "copy.png").write_bytes(EXAMPLE_IMAGE.read_bytes())
    shutil.copyfile(GOLDEN / "torch" / "legacy.pt", folder / "legacy.pt")
    shutil.copyfile(GOLDEN / "torch" / "module.pt", folder / "module.pt")
    (folder / "existing").mkdir()
    (folder / "existing" / "kept").write_text("kept")
    (folder / "no_config").mkdir()
    shutil.copyfile(DEFAULT_MODEL / "model.safetensors", folder / "no_config" / "model.safetensors")
    for name, change in {
        "no_field": lambda c: c.pop("qformer_config"),
        "no_width": lambda c: c["qformer_config"].pop("hidden_size"),
        "odd_heads": lambda c: c["vision_config"].update(num_attention_heads=5),
        "other_layers": lambda c: c["qformer_config"].update(num_hidden_layers=3),
    }.items():
        config = json.loads((DEFAULT_MODEL / "config.json").read_text())
        change(config)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        shutil.copyfile(DEFAULT_MODEL / "model.safetensors", folder / name / "model.safetensors")
    (folder / "cut").mkdir()
    shutil.copyfile(DEFAULT_MODEL / "config.json", folder / "cut" / "config.json")
    (folder / "cut" / "model.safetensors").write_bytes((DEFAULT_MODEL / "model.safetensors").read_bytes()[:-100])
    return folder


IMAGE = str(EXAMPLE_IMAGE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed"], "no image is named; name one or more image files, or all images of a source with --data"),
        (["caption"], "no image is named; name one or more image files"),
        (["search", IMAGE], "no text is named; put what to look for after --text"),
        (["embed", IMAGE, "--text"], "--text is empty"),
        (["embed", IMAGE, "--shard-size", "3"], "--shard-size goes with --data"),
        (["embed", IMAGE, "--data", "existing"], "--data names the images"),
        (["embed", "absent.png"], "there is no image absent.png"),
        (["embed", "https://dog.org/dog.png"], "nothing is downloaded here"),
        (["embed", "a" * 300], "the image aaa"),
        (["embed", "absent.png", "--output", "new/er/x.npz"], "there is no image absent.png"),
        (["embed", IMAGE, "copy.png", "--output", "copy.png"], "copy.png is one of the inputs"),
        (["attend", "copy.png", "--output", "./copy.png"], "copy.png is one of the inputs"),
        (["embed", IMAGE, "--model", "a" * 300], "aaa cannot be read (File name too long)"),
        (["embed", IMAGE, "--text", "\udcff"], "not valid Unicode"),
        (["embed", "cut"], "cut is a folder, not an image; embed all its images with --data cut, or name files"),
        (["attend", "cut"], "cut is a folder, not an image; name files in it, such as cut/*.png"),
        (["embed", "absent.png", "--output", "foo.txt"], "foo.txt becomes a NumPy archive; end the name in .npz"),
        (["embed", "text.png"], "text.png is not an image"),
        (["embed", "cut.png"], "cut.png is damaged or cut off"),
        (["embed", IMAGE, "cut.png", "--batch-size", "1"], "cut.png is damaged or cut off"),
        (["embed", IMAGE, "--text", "a", "b"], "1 images and 2 texts"),
        (["embed", IMAGE, "--model", str(DEFAULT_MODEL / "config.json")], "name the checkpoint's folder"),
        (["caption", IMAGE, "--top-p", "0.5"], "are for --nucleus"),
        (["caption", IMAGE, "--min-length", "9", "--max-length", "5"], "--min-length 9 is above --max-length, 5"),
        (["embed", IMAGE, "--text", "dog " * 100], "102 tokens, but the model reads at most 64"),
        (["embed", IMAGE, "--dtype", "float63"], "take float32, bfloat16, float16"),
        (["embed", IMAGE, "--model", "absent/model/folder"], "no file or folder absent/model/folder"),
        (["embed", IMAGE, "--output", "existing"], "existing is not a file"),
        (["embed", IMAGE, "--output", "text.png/below.npz"], "cannot write"),
        (["attend", IMAGE, "--output", "map.txt"], "names no kind of picture"),
        (["attend", IMAGE, "--layers", "4", "--output", "map.png"], "layer 4 does not look at the image"),
        (["convert", "notes.safetensors", "out"], "not a checkpoint"),
        (["convert", "legacy.pt", "out"], "legacy (non-zip) pickle"),
        (["convert", "module.pt", "out"], "names torch.nn.modules.linear.Linear"),
        (["convert", "cut", "out"], "damaged"),
        (["convert", "existing", "out"], "holds no checkpoint"),
        (["convert", "no_config", "out"], "put one there, or give --config FILE"),
        (["convert", "no_field", "out"], "the config has no qformer_config"),
        (["convert", "no_width", "out"], "what a config leaves out has upstream's default"),
        (["convert", "odd_heads", "out"], "5 attention heads do not divide hidden_size 64"),
        (["convert", "other_layers", "out"], "32 missing: encoder.layer.2.attention.attention.query.weight"),
        (
            ["convert", str(DEFAULT_MODEL), "existing"],
            "existing exists; name another place, or replace it with --overwrite",
        ),
        (["convert", str(DEFAULT_MODEL), "out", "--dtype", "int8"], "take float32, bfloat16, float16"),
        (["convert", str(DEFAULT_MODEL), "out", "--tokenizer", "existing"], "neither tokenizer.json nor vocab.txt"),
        (["export", "existing", "out"], "holds no checkpoint"),
        (["export", str(DEFAULT_MODEL), "existing"], "existing exists"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, bad: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bad)
    before = sorted(path for path in bad.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    lines = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert message in lines[-1]
    # Only a progress bar may come before it.
    assert all("image/s" in line or "s/image" in line for line in lines[:-1])
    assert sorted(path for path in bad.rglob("*")) == before
    assert (bad / "existing" / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing subcommand Expected one of {generate, embed, attend,"),
        (["embedd"], "Unrecognized options: embedd Available subcommands: generate, embed,"),
        (["embed", IMAGE, "--batch-size", "0"], "--batch-size: 0 is not a whole number of 1 or more"),
        (["embed", IMAGE, "--embedding-dtype", "float64"], "invalid choice 'float64' for argument '--embedding-dtype'"),
        (
            ["embed", IMAGE, "--outputs", "a.npz"],
            "Unrecognized options: --outputs, a.npz Perhaps you meant: --output FILE",
        ),
        (["caption", IMAGE, "--nucleus", "--num-beams", "2"], "--nucleus and --num-beams are not allowed together"),
        (["caption", IMAGE, "--nucleus", "--seed", "-1"], "--seed: -1 is not a whole number from 0 to 4294967295"),
        (["convert", "a"], "Missing from flax-qformer convert: DST the folder to create. (required)"),
        (["train", "--settings"], "Missing value for argument '--settings'"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capfd.readouterr()
    assert not printed.out
    assert message in " ".join(re.sub("[─│╭╮╰╯]", " ", printed.err).split())
    assert "flax-qformer" in printed.err or arguments[-1] == "--settings"
    assert "Traceback" not in printed.err


def test_embed_reads_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("data: photos\ntext: dog\nshard_size: 9\nembedding_dtype: float16\nsteps: 3")
    options = parse(["embed", "--settings", str(file), "--shard-size", "8"])
    expected = EmbedOptions(data="photos", text=(("dog",),), shard_size=8, embedding_dtype="float16", settings=file)
    assert options == expected


def test_the_library_names_no_options() -> None:
    root = Path(fq.__file__).parent
    parsers = {path for path in (root / "commands").glob("*.py") if path.name != "bulk_embedding.py"}
    for path in {*root.rglob("*.py"), *Path(convert.__file__).parent.rglob("*.py")} - parsers:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "InputError":
                texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
                assert not re.search(r"--[a-z]", " ".join(map(str, texts))), f"{path}:{call.lineno}"


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("convert", "give `config=FILE` or `truncate=True`", "give --config FILE or `truncate=True`"),
        ("embed", "`convert_checkpoint(..., dtype='float32')`", "`flax-qformer convert --dtype float32`"),
        ("train", "`batch_size` is 1; `flip=False`", "--batch-size is 1; --no-flip"),
        ("plan", "`mesh=fsdp=-1,tensor=2`, `images`", "--mesh fsdp=-1,tensor=2, `images`"),
    ],
)
def test_the_command_line_names_options(command: str, message: str, expected: str) -> None:
    kind, _ = COMMANDS[command]
    assert with_options(message, kind) == expected


def test_bad_input_of_the_installed_command(bad: Path) -> None:
    done = run("embed", "cut.png", "--text", "dog", folder=bad)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("flax-qformer embed: cut.png is damaged")
    assert not (bad / "embeddings.npz").exists()


@pytest.mark.parametrize(
    ("into", "printed"),
    [("| true", ""), pytest.param("> /dev/full", "No space left on device", marks=pytest.mark.slow)],
)
def test_a_closed_output_pipe(into: str, printed: str, tmp_path: Path) -> None:
    command = f"{BIN / 'flax-qformer'} embed {EXAMPLE_IMAGE} {into}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.count("\n") == bool(printed)
    assert printed in done.stderr
    assert (tmp_path / "embeddings.npz").exists()


@pytest.mark.parametrize(("section", "printed"), [("In Python", "(2, 8, 64)\n"), ("The Q-Former", "(1, 8, 64)\n")])
def test_the_first_lines_of_the_readme_run_as_printed(
    section: str, printed: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Path(__file__).parent.parent
    text = (checkout / "README.md").read_text().partition(f"## {section}\n\n")[2]
    text = text[text.index("    import ") :]
    block = "".join(line for line in itertools.takewhile(lambda line: line[:4].strip() == "", text.splitlines(True)))
    # The lines write files.
    (tmp_path / "flax_qformer").symlink_to(checkout / "flax_qformer")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(block), {})
    assert capsys.readouterr().out == printed


def test_python_m_runs_the_commands() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "flax_qformer", "--version"], capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip() == fq.__version__ == importlib.metadata.version("flax-qformer")
