"""LoRA gives the same output merged and unmerged, is trained alone, and is saved beside its base."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_step
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

import cases
import flax_qformer as fq
from conftest import same
from flax_qformer import training
from flax_qformer.convert.tables.qformer import parameters
from flax_qformer.models.layers import LORA

# This geometry has no qkv bias, and its cross-attention runs without keys.
CONFIG = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_2"])
# With fewer layers, for tests that compile.
SMALL = dataclasses.replace(
    CONFIG,
    vision_config=dataclasses.replace(CONFIG.vision_config, num_hidden_layers=1),
    qformer_config=dataclasses.replace(CONFIG.qformer_config, num_hidden_layers=2, cross_attention_frequency=1),
)


def scanned(config: fq.Blip2Config) -> fq.Blip2Config:
    return dataclasses.replace(config, scan_layers=True)


PATTERN = r"encoder/|proj_layer/dense1/"
QUERY = "encoder/layer_0/attention/attention/query"
QKV = "visual_encoder/encoder/layers_0/self_attn/qkv"


def flat(params: Any) -> dict[str, Any]:
    return flatten_dict(params, sep="/")


def drawn(config: fq.Blip2Config, *parts: str) -> dict[str, Any]:
    """Random parameters in numpy."""
    rng = np.random.default_rng(0)
    values = {p.path: 0.3 * rng.standard_normal(p.shape, np.float32) for p in parameters(config, "diffusers", parts)}
    if "temp" in values:
        values["temp"] = np.float32(0.5)
    return unflatten_dict(values, sep="/")


def filled(params: Any) -> dict[str, Any]:
    """The tree with a `lora_B` that is no longer zero."""
    rng = np.random.default_rng(1)
    new = {p: 0.3 * rng.standard_normal(x.shape, np.float32) for p, x in flat(params).items() if p.endswith("lora_B")}
    return unflatten_dict(flat(params) | new, sep="/")


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return drawn(CONFIG, "proj_layer")


@pytest.fixture(scope="module")
def lora(base: Any) -> dict[str, Any]:
    return filled(training.add_lora(base, PATTERN, 2, jax.random.key(0)))


@pytest.fixture(scope="module")
def file(lora: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    training.save_lora(path, lora)
    return path


def test_merged_and_unmerged_outputs_are_equal() -> None:
    """Also with stacked layers on a mesh, where merged kernels stay sharded."""
    pixels = cases.batch("frequency_2")["pixel_values"]

    def program(config: fq.Blip2Config) -> Any:
        model = fq.Blip2QFormerModel(config)
        return jax.jit(lambda params: model.apply({"params": params}, pixels).query_embeddings)

    run, run_scanned = program(SMALL), program(scanned(SMALL))
    base = drawn(SMALL, "proj_layer")
    lora = filled(training.add_lora(base, PATTERN, 2, jax.random.key(0)))
    merged, stacked = training.merge_lora(lora), fq.stack_layers(lora)
    assert flat(merged).keys() == flat(base).keys()
    expected = run(merged)
    assert np.abs(run(base) - expected).max() > 0.1
    placed = fq.shard_params(stacked, fq.make_mesh(data=1, fsdp=-1))
    np.testing.assert_allclose(run(lora), expected, atol=1e-5)
    np.testing.assert_allclose(run_scanned(placed), expected, atol=1e-5)
    placed_and_merged = training.merge_lora(placed)
    for path, leaf in flat(fq.stack_layers(merged)).items():
        np.testing.assert_allclose(flat(placed_and_merged)[path], leaf, atol=1e-6, err_msg=path)
        assert flat(placed_and_merged)[path].sharding.is_equivalent_to(flat(placed)[path].sharding, leaf.ndim), path


def test_new_weights_change_nothing(base: Any) -> None:
    mesh, paths = fq.make_mesh(data=1, fsdp=-1), (f"{QUERY}/kernel", f"{QKV}/kernel")
    params = training.add_lora(fq.shard_params(base, mesh), lambda path: path in paths, 3, jax.random.key(0))
    added = {path: leaf for path, leaf in flat(params).items() if path.endswith(LORA)}
    assert {path: leaf.shape for path, leaf in added.items()} == {
        f"{QUERY}/lora_A": (28, 3),
        f"{QUERY}/lora_B": (3, 7, 4),
        f"{QKV}/lora_A": (30, 3),
        f"{QKV}/lora_B": (3, 3, 5, 6),
    }
    assert all(leaf.sharding.mesh == mesh and leaf.is_fully_replicated for leaf in added.values())
    assert 0.9 < np.abs(added[f"{QUERY}/lora_A"]).max() * 28**0.5 <= 1
    assert same(training.merge_lora(params), base)


def test_lora_is_trained_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, qformer_config=dataclasses.replace(SMALL.qformer_config, num_hidden_layers=1))
    base = drawn(config, "proj_layer")
    optimizer = training.make_optimizer(config, 3e-2)
    params = training.add_lora(base, "^encoder/", 2, jax.random.key(0))
    state = training.TrainState.create(params, optimizer, "lora_")
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    model = fq.Blip2QFormerModel(config)
    batch = {"image": cases.draw("image", (2, 17, 30)), "target": cases.draw("target", (2, 3, 28))}

    def loss(model: Any, trained: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        params = training.merge(trained, frozen)
        output = model.apply({"params": params}, encoder_hidden_states=batch["image"])
        return jnp.square(output.query_embeddings - batch["target"]).mean(), {}

    step = training.make_train_step(model, optimizer, loss=loss, donate=False)
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0], losses
    assert same(state.frozen, base)

    file = tmp_path / "lora.safetensors"
    training.save_lora(file, state.params)
    assert f"{QUERY}/lora_A" in load_file(file)
    assert file.stat().st_size < 4 * sum(leaf.size for leaf in jax.tree.leaves(state.trained)) + 20_000
    assert same(training.load_lora(file, base), state.params)


@pytest.mark.slow
def test_the_first_stage_trains_lora_on_a_mesh() -> None:
    """In a loop over stacked layers, with a learning rate for each layer."""
    config, mesh = sharded_step.CONFIG, fq.make_mesh(data=1, fsdp=-1)
    base = fq.stack_layers(drawn(dataclasses.replace(config, scan_layers=False), *fq.Blip2ForPreTraining.parts))
    before = jax.tree.map(np.array, base)  # a step donates its state, and with it the base
    params = training.add_lora(base, "encoder/|_proj/", 2, jax.random.key(0))
    optimizer = training.make_optimizer(config, 3e-2, layer_decay=0.9)
    state = training.TrainState.create(params, optimizer, "lora_")
    step = training.make_train_step(fq.Blip2ForPreTraining(config), optimizer, mesh=mesh)
    state, batch, losses = fq.shard_params(state, mesh), fq.shard_batch(sharded_step.make_batch(), mesh), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2, losses
    assert same(state.frozen, before)


def test_files_next_to_a_model(base: Any, lora: Any, file: Path, tmp_path: Path) -> None:
    model = fq.Blip2QFormerModel(CONFIG)
    with pytest.raises(fq.InputError, match="have LoRA weights; merge them"):
        fq.save_pretrained(tmp_path / "base", model, lora)
    fq.save_pretrained(tmp_path / "base", model, base)
    assert same(fq.from_pretrained(tmp_path / "base", lora=file)[1], lora)
    assert same(training.load_lora(file, fq.stack_layers(base)), fq.stack_layers(lora))
    mesh = fq.make_mesh(data=1, fsdp=-1)
    model, params = fq.from_pretrained(tmp_path / "base", config=scanned(CONFIG), lora=file, mesh=mesh)
    assert model.config.scan_layers
    assert same(params, fq.stack_layers(lora))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(params))


def test_invalid_lora(base: Any, lora: Any) -> None:
    key = jax.random.key(0)
    for params, pattern, rank, message in (
        (base, "no_such_layer", 2, "'no_such_layer' fits no parameter"),
        (base, "(", 2, "no regular expression"),
        (base, PATTERN, 0, "`rank` is 0; it must be 1 or more"),
        (lora, "encoder/layer_1/", 2, "already have encoder/layer_1"),
    ):
        with pytest.raises(fq.InputError, match=message):
            training.add_lora(params, pattern, rank, key)
    with pytest.raises(fq.InputError, match="have LoRA weights; merge them"):
        fq.prune_heads(CONFIG, lora, {0: [1]})
    with pytest.raises(fq.InputError, match="LoRA weights on some layers only"):
        fq.stack_layers(training.add_lora(base, "encoder/layer_0/", 2, key))
    with pytest.raises(fq.InputError, match="without encoder/.*kernel.*give the whole tree"):
        training.merge_lora({"encoder": {"lora_A": np.ones((2, 1)), "lora_B": np.ones((1, 2))}})
    with pytest.raises(fq.InputError, match="no LoRA weights; add them"):
        training.save_lora("unused.safetensors", base)
    for name in ("lora", "lora.json", "lora.npz"):
        with pytest.raises(fq.InputError, match=f"{name} does not end in .safetensors"):
            training.save_lora(name, lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{QUERY}/lora_A": np.ones((28, 3), np.float32)}, r"query/lora_B \(2, 7, 4\) instead of \(3, 7, 4\)"),
        ({f"{QUERY}/lora_A": np.ones((20, 2), np.float32)}, r"query/lora_A \(20, 2\) instead of \(28, 2\)"),
        ({f"{QUERY}/lora_B": np.ones((2, 7, 4), np.int32)}, "query/lora_B is int32"),
        ({f"{QUERY}/lora_B": None}, "the file has no encoder/layer_0/attention/attention/query/lora_B"),
        ({"itm_head/lora_A": np.ones((28, 2), np.float32)}, "the model has no itm_head/kernel"),
        ({"query_tokens": np.ones(3, np.float32)}, "query_tokens is not a LoRA weight"),
    ],
)
def test_a_file_of_another_base(changes: Any, message: str, base: Any, file: Path, tmp_path: Path) -> None:
    tensors = {name: value for name, value in (load_file(file) | changes).items() if value is not None}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(fq.InputError, match=f"does not fit the model.*{message}.*that it was trained on"):
        training.load_lora(tmp_path / "other.safetensors", base)


def test_a_file_without_lora(base: Any, tmp_path: Path) -> None:
    save_file({"query_tokens": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(fq.InputError, match="no LoRA weights; give a file"):
        training.load_lora(tmp_path / "other.safetensors", base)
