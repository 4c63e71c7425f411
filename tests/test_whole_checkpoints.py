"""No parameter is lost: those that an objective does not read are frozen, saved, resumed and exported."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file

import flax_qformer as fq
from conftest import same
from flax_qformer.commands.main import main
from flax_qformer.convert.tables.qformer import PARTS, Layout, parameters
from flax_qformer.training.run_checkpoints import Checkpoints

SPLIT = ("--mesh", "fsdp=2", "--scan-layers")
CONFIG = fq.Blip2Config.from_dict(
    {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        "qformer_config": {
            "vocab_size": 12,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 16,
            "cross_attention_frequency": 1,
        },
        "num_query_tokens": 3,
        "image_text_hidden_size": 8,
    }
)


def checkpoint(folder: Path, layout: Layout, parts: tuple[str, ...], dtype: Any = np.float32) -> Path:
    """A folder with random weights in `model.safetensors`, and a tokenizer."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = list(parameters(CONFIG, layout, parts))
    tensors = {row.name: np.asarray(rng.normal(size=row.torch_shape) * 0.1, dtype) for row in rows}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "dog", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(8):
        PIL.Image.fromarray(np.full((16, 16, 3), 30 * i, np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": ("red", "green", "blue", "dog")[i % 4]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def train(model: Path, data: Path, output: Path, *more: str) -> None:
    arguments = {
        "data": data,
        "model": model,
        "output": output,
        "held-out": 0,
        "learning-rate": 1e-30,
        "weight-decay": 0,
        "warmup": 0,
        "batch-size": 4,
        "max-text-length": 8,
        "num-workers": 0,
        "dropout": 0,
        "dtype": "float32",
    }
    main(["train", *(str(word) for name, value in arguments.items() for word in (f"--{name}", value)), *more])


def check_bytes(exported: Path, source: Path) -> None:
    tensors, expected = load_file(exported / "model.safetensors"), load_file(source / "model.safetensors")
    assert expected.keys() <= tensors.keys()
    for name, value in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (value.dtype, value.shape), name
        assert tensors[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    ("layout", "parts", "more"),
    [
        pytest.param("lavis", tuple(PARTS), [*SPLIT, "--train", "qformer", "proj_layer"], marks=pytest.mark.slow),
        pytest.param("lavis", tuple(PARTS), ["--train", "all"], marks=pytest.mark.slow),
        ("diffusers", ("proj_layer",), ["--train", "all"]),
        pytest.param("diffusers", ("proj_layer",), [*SPLIT, "--train", "all"], marks=pytest.mark.slow),
    ],
)
def test_training_without_changes_returns_every_tensor(
    layout: Layout, parts: tuple[str, ...], more: list[str], data: Path, tmp_path: Path, caplog: Any
) -> None:
    source = checkpoint(tmp_path / "source", layout, parts)
    train(source, data, tmp_path / "run", "--steps", "1", *more)
    assert "proj_layer stays frozen: the stage-1 losses do not read it" in caplog.text
    caplog.clear()
    train(source, data, tmp_path / "run", "--steps", "2", *more)
    assert "resuming from step 1" in caplog.text
    main(["convert", str(tmp_path / "run" / "model"), str(tmp_path / "converted")])
    for number, model in enumerate((tmp_path / "run" / "model", tmp_path / "converted")):
        main(["export", str(model), str(tmp_path / f"{number}"), "--layout", layout])
        check_bytes(tmp_path / f"{number}", source)


@pytest.mark.slow
def test_frozen_parameters_keep_their_dtype(data: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "diffusers", ("proj_layer",), np.float16)
    train(source, data, tmp_path / "run", "--steps", "1", "--train", "heads")
    main(["export", str(tmp_path / "run" / "model"), str(tmp_path / "torch"), "--layout", "diffusers"])
    check_bytes(tmp_path / "torch", source)


def test_every_module_of_a_checkpoint_is_read(tmp_path: Path, capsys: Any) -> None:
    """For both classes: a head that is missing is initialised, and one that lacks a tensor is an error."""
    source = checkpoint(tmp_path / "source", "diffusers", tuple(set(PARTS) - {"itm_head"}))
    for model_class in (fq.Blip2QFormerModel, fq.Blip2ForPreTraining):
        model, params = fq.from_pretrained(source, model_class=model_class)
        fq.save_pretrained(tmp_path / model_class.__name__, model, params)
        main(["export", str(tmp_path / model_class.__name__), str(tmp_path / "torch"), "--overwrite"])
        assert params.keys() >= PARTS.keys() - {"itm_head"}
        is_told = "itm_head: randomly initialised" in capsys.readouterr().out
        assert is_told == (model_class is fq.Blip2ForPreTraining)
    tensors = load_file(source / "model.safetensors")
    del tensors["vision_proj.bias"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(fq.InputError, match=r"1 missing: vision_proj\.bias"):
        fq.from_pretrained(source)


def test_commands_refuse_a_model_without_trained_heads(data: Path, tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "source", "diffusers", ("proj_layer",))
    model, params = fq.from_pretrained(source, model_class=fq.Blip2ForPreTraining)
    fq.save_pretrained(tmp_path / "heads", model, params, fq.Processor.from_pretrained(source))
    image = str(data / "1.png")
    for folder in (source, tmp_path / "heads"):
        for command in (
            ["caption", image],
            ["search", image, "--text", "red"],
            ["evaluate", "--data", str(data), "--everything", "--num-workers", "0"],
        ):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                main([*command, "--model", str(folder)])
            out, err = capsys.readouterr()
            assert (stop.value.code, out) == (2, "")
            assert "has no trained itm_head, lm_head, temp, text_proj, vision_proj; train them" in err.splitlines()[-1]


def test_a_run_saved_without_frozen_modules_resumes(tmp_path: Path) -> None:
    """Earlier versions saved only parameters that the losses read; the rest keeps the model's values."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = {"trained": {"a": jnp.ones(2)}, "frozen": {"b": jnp.ones(2)}}
    checkpoints.save(1, state, {})
    now = {"trained": {"a": jnp.zeros(2)}, "frozen": {"b": jnp.zeros(2), "proj_layer": jnp.full(2, 3.0)}}
    restored, _ = checkpoints.restore(now) or (None, None)
    assert same(restored, {"trained": state["trained"], "frozen": now["frozen"] | state["frozen"]})
    with pytest.raises(fq.InputError, match="of another model: trained.c was absent"):
        checkpoints.restore({**now, "trained": {"a": jnp.zeros(2), "c": jnp.zeros(2)}})
