"""Models on disk: whole or absent, also after a kill and on a full disk; and on a hub."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import flax_qformer as fq
from conftest import same, write_upstream
from flax_qformer.checkpoints.atomic import new_file, new_folder
from flax_qformer.commands.main import main
from flax_qformer.model_files import DEFAULT_MODEL

CONFIG = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_3"])
COMMAND = [sys.executable, "-c", "from flax_qformer.commands.main import main; main()"]


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_save_and_load(tmp_path: Path) -> None:
    model, params = fq.from_pretrained(DEFAULT_MODEL)
    processor = fq.Processor.from_pretrained(DEFAULT_MODEL)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    fq.save_pretrained(tmp_path / "saved", model, half, processor)
    again, loaded = fq.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert again == dataclasses.replace(model, dtype=jnp.dtype(jnp.bfloat16))
    assert same(loaded, half)
    assert {
        leaf.dtype for leaf in jax.tree.leaves(fq.from_pretrained(tmp_path / "saved", param_dtype="float16")[1])
    } == {jnp.dtype(jnp.float16)}
    texts = list(cases.TEXTS)
    loaded_processor = fq.Processor.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(loaded_processor(text=texts)["input_ids"], processor(text=texts)["input_ids"])
    assert loaded_processor.image_processor == processor.image_processor
    with pytest.raises(fq.InputError, match="exists.*`overwrite=True`"):
        fq.save_pretrained(tmp_path / "saved", model, params)
    fq.save_pretrained(tmp_path / "saved", model, params, overwrite=True)
    assert same(fq.from_pretrained(tmp_path / "saved")[1], params)
    assert entries(tmp_path) == {"saved"}
    with pytest.raises(fq.InputError, match="1 missing: query_tokens"):
        fq.save_pretrained(tmp_path / "other", model, {k: v for k, v in params.items() if k != "query_tokens"})
    assert entries(tmp_path) == {"saved"}


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's commands name folders where the user is."""
    monkeypatch.chdir(tmp_path)
    main(["convert", str(DEFAULT_MODEL), "my_model"])
    main(["export", "my_model", "for_pytorch"])
    model, params = fq.from_pretrained("my_model")
    fq.save_pretrained("saved", model, params)
    assert same(fq.from_pretrained("saved")[1], fq.from_pretrained("for_pytorch")[1])


def test_pruned_and_grown_models_are_saved_with_their_config(tmp_path: Path) -> None:
    write_upstream(tmp_path / "torch", CONFIG)
    model, params = fq.from_pretrained(tmp_path / "torch")
    config, params = fq.prune_heads(model.config, params, {0: [4, 1], 3: [0]})
    config, params = fq.resize_token_embeddings(config, params, 70, jax.random.key(0))
    fq.save_pretrained(tmp_path / "saved", type(model)(config), params)
    again, loaded = fq.from_pretrained(tmp_path / "saved")
    assert again.config == config
    assert same(loaded, params)


@pytest.mark.parametrize("damage", ["remove a part", "cut a part", "other config", "no metadata"])
def test_damaged_folders(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write_upstream(tmp_path / "torch", CONFIG)
    folder = tmp_path / "flax"
    fq.convert_checkpoint(tmp_path / "torch", folder)
    parts = sorted((path for path in (folder / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    match damage:
        case "remove a part":
            parts[-1].unlink()
        case "cut a part":
            parts[-1].write_bytes(parts[-1].read_bytes()[:100])
        case "no metadata":
            for part in parts:
                if "METADATA" in part.name:
                    part.unlink()
        case "other config":
            (folder / "config.json").write_text(json.dumps(cases.GEOMETRIES["frequency_1"]))
    with pytest.raises(fq.InputError, match=r"damaged|not those of the config") as caught:
        fq.from_pretrained(folder)
    assert damage == "other config" or len(str(caught.value).replace(str(folder), "")) < 200
    # Of asyncio: a task of an earlier failure, told whenever it is collected.
    assert not [record for record in caplog.records if record.name != "asyncio"]


def test_an_orbax_checkpoint_of_something_else(tmp_path: Path) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    (tmp_path / "config.json").write_text(json.dumps(cases.GEOMETRIES["frequency_3"]))
    ocp.save(tmp_path / "params", {"step": 3, "query_tokens": np.zeros(2)})
    with pytest.raises(fq.InputError, match="params is damaged or no orbax checkpoint"):
        fq.from_pretrained(tmp_path)


def test_overwrite_replaces_nothing_of_the_users(tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    shutil.copytree(DEFAULT_MODEL, model)
    shutil.copytree(DEFAULT_MODEL, model / "inside")
    (tmp_path / "models" / "config.json").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dog.jpg").touch()
    before = sorted(tmp_path.rglob("*"))
    for source, target, message in (
        (model, model, "made from"),
        (model / "model.safetensors", model, "made from"),
        (model, model.parent, "made from"),
        (model, model / "inside", "made from"),
        (model, tmp_path / "photos", "not the folder of a model"),
    ):
        for write in (fq.convert_checkpoint, fq.export_checkpoint):
            with pytest.raises(fq.InputError, match=message):
                write(source, target, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "no/such/folder", "absent.safetensors", ""):
        with pytest.raises(fq.InputError, match="no file or folder"):
            fq.from_pretrained(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(fq.InputError, match="holds no checkpoint"):
        fq.from_pretrained(tmp_path / "empty")
    with pytest.raises(fq.InputError, match="no config"):
        fq.from_pretrained(DEFAULT_MODEL, config=tmp_path / "absent.json")
    for dtype in ("float63", "int8", "float64", None):
        with pytest.raises(fq.InputError, match="take float32, bfloat16, float16"):
            fq.from_pretrained(DEFAULT_MODEL, dtype=dtype)


def test_a_checkpoint_of_another_class(tmp_path: Path) -> None:
    config = CONFIG.to_dict() | {"model_type": "blip-2", "text_config": {"model_type": "opt"}}
    write_upstream(tmp_path, CONFIG)
    for names in (None, [], ["Blip2QFormerModel"]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": names}))
        fq.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("not read")
    for change, message in (
        ({"architectures": ["Blip2ForConditionalGeneration"]}, "is a Blip2ForConditionalGeneration by its config.json"),
        ({"architectures": ["Blip2ForImageTextRetrieval"]}, "is a Blip2ForImageTextRetrieval by"),
        ({"architectures": ["Blip2QFormerModel"], "model_type": "blip_2_qformer"}, "without a vision tower"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(fq.InputError, match=message):
            fq.from_pretrained(tmp_path)
    unfit: Any = fq.Processor
    with pytest.raises(fq.InputError, match="`model_class` is .*; it must be Blip2QFormerModel or Blip2ForPreTraining"):
        fq.from_pretrained(tmp_path, model_class=unfit)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a", overwrite=False) as folder:
        (folder / "part").write_text("x")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_file(tmp_path / "b.npz") as file:
        file.write(b"x")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new" / "c", overwrite=False):
        raise RuntimeError
    with pytest.raises(fq.InputError, match="cannot write"), new_file(tmp_path / "new" / "d.npz"):
        raise OSError
    assert entries(tmp_path) == set()
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(fq.InputError), new_folder(target, overwrite=True):
            pass
    with pytest.raises(fq.InputError, match="cannot write"), new_file(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "file").read_text() == "kept"


def test_a_replacement_that_fails_puts_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment between the two renames: the old model is out of the way, the new one is not in place."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "filled":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model", overwrite=True):
        pass
    assert entries(tmp_path) == {"model"}
    assert entries(tmp_path / "model") == {"config.json"}


def test_what_a_killed_write_left_belongs_to_its_target(tmp_path: Path) -> None:
    left = tmp_path / ".model[1].v2.abcdefgh.partial"
    (left / "replaced").mkdir(parents=True)
    (left / ".lock").touch()
    (left / "replaced" / "old").touch()
    for name in ("model", "model[1]", "model1"):
        with new_folder(tmp_path / name, overwrite=False):
            pass
    assert left.exists()
    with pytest.raises(fq.InputError, match="exists"), new_folder(tmp_path / "model[1].v2", overwrite=False):
        pass
    assert entries(tmp_path) == {"model", "model[1]", "model1", "model[1].v2"}
    assert entries(tmp_path / "model[1].v2") == {"old"}


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_full_disk(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(SystemExit) as caught:
        main([command, str(DEFAULT_MODEL), str(tmp_path / "out")])
    assert caught.value.code == 2
    one_line_on_a_full_disk(capfd.readouterr().err, tmp_path)


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """Files may not grow beyond 100 kB, which is how a full disk looks to a program."""
    images = [str(DEFAULT_MODEL.parent / "example.png")] * 60
    arguments = ["embed", *images, "--output", str(tmp_path / "out.npz"), "--batch-size", "60"]
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh", *COMMAND, *arguments]  # in blocks of 512 bytes
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    one_line_on_a_full_disk(done.stderr, tmp_path)


def one_line_on_a_full_disk(printed: str, folder: Path) -> None:
    assert printed.count("\n") == 1
    assert "cannot write" in printed
    assert entries(folder) == set()


def kill_while_writing(arguments: list[str], folder: Path, delay: float) -> bool:
    """Run a command, kill it a moment after it has begun to write; whether it was still at it."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(name.endswith(".partial") for name in entries(folder)):
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_a_kill_at_any_moment(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, qformer_config=dataclasses.replace(CONFIG.qformer_config, vocab_size=400_000))
    write_upstream(tmp_path / "torch", config)
    _, expected = fq.from_pretrained(tmp_path / "torch")
    work = tmp_path / "work"
    work.mkdir()
    rng, killed = random.Random(0), 0
    for attempt in range(4):
        overwrite = attempt % 2 == 1
        if overwrite:
            fq.convert_checkpoint(tmp_path / "torch", work / "model", overwrite=True)
        killed += kill_while_writing(
            ["convert", str(tmp_path / "torch"), str(work / "model"), *(["--overwrite"] if overwrite else [])],
            work,
            rng.uniform(0, 0.6),
        )
        if (work / "model").exists():
            assert same(fq.from_pretrained(work / "model")[1], expected)
            shutil.rmtree(work / "model")
    assert killed
    # The next write removes what the killed ones left.
    fq.convert_checkpoint(tmp_path / "torch", work / "model", overwrite=True)
    assert entries(work) == {"model"}


@pytest.mark.parametrize("kind", ["safetensors", pytest.param("bin", marks=pytest.mark.slow)])
def test_hub(tmp_path: Path, hub: Any, kind: str) -> None:
    """A pipeline on a hub: only the Q-Former's files come, and come once."""
    served, environment = hub
    shutil.copytree(DEFAULT_MODEL, served.files / "qformer")
    (served.files / "model_index.json").write_text('{"_class_name": "BlipDiffusionPipeline"}')
    for big in ("unet/diffusion_pytorch_model.safetensors", "qformer/flax_model.msgpack", "tokenizer/vocab.json"):
        (served.files / big).parent.mkdir(exist_ok=True)
        (served.files / big).write_text("not to be fetched")
    if kind == "bin":
        from safetensors.numpy import load_file

        from torch_files import torch_save

        weights = served.files / "qformer" / "model.safetensors"
        torch_save(load_file(weights), served.files / "qformer" / "pytorch_model.bin")
        weights.unlink()
    else:
        (served.files / "qformer" / "pytorch_model.bin").write_text("not to be fetched")

    def convert(destination: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "convert", "someone/model", str(tmp_path / destination)]
        return subprocess.run(command, env={**environment, **extra}, capture_output=True, text=True, check=False)

    done = convert("first")
    assert done.returncode == 0, done.stderr
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for path in served.asked if "/resolve/" in path}
    weights = "qformer/model.safetensors" if kind == "safetensors" else "qformer/pytorch_model.bin"
    assert weights in fetched
    assert not any(name.startswith(("unet", "tokenizer")) or "flax" in name for name in fetched)
    assert len([name for name in fetched if "model" in name.rpartition("/")[2] and not name.endswith("json")]) == 1
    assert same(fq.from_pretrained(tmp_path / "first")[1], fq.from_pretrained(DEFAULT_MODEL)[1])

    served.asked.clear()
    done = convert("second", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not served.asked
    done = convert("third", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
    assert done.returncode == 2
    assert "someone/model is no file or folder here" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_hub_that_hangs_up(tmp_path: Path, hub: Any) -> None:
    """The hub's library tries again and says so; then comes our line."""
    served, environment = hub
    served.hangs_up = True
    (served.files / "config.json").write_text("{}")
    command = [*COMMAND, "convert", "someone/model", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "someone/model is no file or folder here" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
