"""The training program: what it trains, that it resumes bit for bit after any interruption, and what it refuses."""

import dataclasses
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import PIL.Image
import pytest
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict
from tensorboardX.proto.event_pb2 import Event, SessionLog

import flax_qformer as fq
from conftest import same
from flax_qformer import training
from flax_qformer.commands.main import main
from flax_qformer.convert.tables.qformer import parameters
from flax_qformer.data.batches import open_source
from flax_qformer.data.sources import DataSettings
from flax_qformer.progress import Progress
from flax_qformer.training import run as run_module
from flax_qformer.training.evaluation import Retrieval, RetrievalResult
from flax_qformer.training.prefetching import Prefetcher
from flax_qformer.training.run_checkpoints import Checkpoints
from flax_qformer.training.samples import SIDE, Sampler
from flax_qformer.training.settings import EvaluateSettings, TrainSettings, to_yaml
from flax_qformer.training.step_logging import DispatchedStep, StepLogger

BIN = Path(sys.executable).parent
COLOURS = ("red", "green", "blue", "black", "white")
CONFIG = {
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
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "num_query_tokens": 3,
    "image_text_hidden_size": 8,
}
TIMES = ("images_per_second", "step_time")


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`words`, a model of config and vocabulary, `model`, which also has weights, and `data`, captioned images."""
    folder = tmp_path_factory.mktemp("training")
    model, data = folder / "words", folder / "data"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Blip2ForPreTraining"]}))
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *COLOURS]))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    fq.save_pretrained(folder / "model", *tiny, fq.Processor.from_pretrained(model))
    data.mkdir()
    rows = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 20, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(data / f"{i}.png")
        texts = (f"a {COLOURS[i % 5]}", COLOURS[i // 3])[: 1 + (i % 3 == 0)]
        rows += [{"file_name": f"{i}.png", "text": text} for text in texts]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")


@pytest.fixture(scope="module")
def tiny() -> tuple[fq.Blip2ForPreTraining, dict[str, Any]]:
    """The model, and random parameters in numpy; initialising them with Flax would take long to compile."""
    config, rng = fq.Blip2Config.from_dict(CONFIG), np.random.default_rng(0)
    rows = parameters(config, "diffusers", fq.Blip2ForPreTraining.parts)
    values = {p.path: np.float32(rng.normal(size=p.shape) * 0.1) for p in rows}
    values |= {path: np.ones_like(value) for path, value in values.items() if path.endswith("scale")}
    values["temp"] = np.float32(0.07)
    return fq.Blip2ForPreTraining(config), unflatten_dict(values, sep="/")


def batches(size: int, number: int = 1) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    return [
        {
            "pixel_values": rng.normal(size=(size, 16, 16, 3)).astype(np.float32),
            "input_ids": np.tile(np.int32([2, 5, 6, 3]), (size, 1))
            + np.arange(size, dtype=np.int32)[:, None] % 3 * [0, 0, 1, 0],
            "attention_mask": np.ones((size, 4), np.int32),
            "image_id": np.arange(size, dtype=np.int32),
        }
        for _ in range(number)
    ]


# Trained parameters


def tree(**sizes: int) -> tuple[fq.Blip2Config, dict[str, Any]]:
    """All parameters of a model with three layers in each tower, filled with ones."""
    parts = {part: {**CONFIG[part], "num_hidden_layers": 3} for part in ("vision_config", "qformer_config")}
    config = fq.Blip2Config.from_dict({**CONFIG, **parts})
    return config, unflatten_dict(
        {p.path: jnp.ones(p.shape) for p in parameters(config, "diffusers", fq.Blip2ForPreTraining.parts)}, sep="/"
    )


def test_groups_of_parameters() -> None:
    _, params = tree()
    heads = {"vision_proj", "text_proj", "itm_head", "lm_head", "temp"}
    rest = params.keys() - heads - {"visual_encoder"}
    for groups, names in (
        (["vision"], {"visual_encoder"}),
        (["heads"], heads),
        (["qformer"], rest),
        (["qformer", "heads"], heads | rest),
        (["all"], params.keys()),
    ):
        trained, frozen = training.partition(params, groups)
        assert (trained.keys(), frozen.keys()) == (names, params.keys() - names)
        assert same(training.merge(trained, frozen), params)
        state = training.TrainState.create(params, training.make_optimizer(tree()[0], 0.1), groups)
        sizes = sorted(leaf.shape for leaf in jax.tree.leaves(trained))
        kept = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.float32)
        assert kept == sorted(sizes * 2), groups
    for wrong in (["tower"], []):
        with pytest.raises(fq.InputError, match="name vision, qformer, heads or all"):
            training.partition(params, wrong)


def test_selections_of_parameters() -> None:
    _, params = tree()
    params["proj_layer"] = {"dense1": {"bias": jnp.ones(3)}}
    paths = set(flatten_dict(params, sep="/"))
    crossing = {path for path in paths if "crossattention" in path}
    labels = {name: "slow" if name == "query_tokens" else "frozen" for name in params}
    for selection, expected in (
        (r"query_tokens|crossattention|proj_layer", {"query_tokens", "proj_layer/dense1/bias"} | crossing),
        (["crossattention", "query_tokens"], {"query_tokens"} | crossing),
        (lambda path: path.startswith("temp"), {"temp"}),
        (labels, {"query_tokens"}),
        (labels | {"encoder": {f"layer_{i}": i == 1 for i in range(3)}, "query_tokens": None}, "encoder/layer_1/"),
        ("all", paths),
        # With heads, proj_layer belongs to another model.
        ("qformer", {path for path in paths if path.split("/")[0] in ("query_tokens", "embeddings", "encoder")}),
    ):
        trained, _ = training.partition(params, selection)
        selected = set(flatten_dict(trained, sep="/"))
        assert selected == ({p for p in paths if p.startswith(expected)} if isinstance(expected, str) else expected)
    del params["vision_proj"], params["text_proj"], params["itm_head"], params["temp"], params["lm_head"]
    assert "proj_layer" in training.partition(params, "qformer")[0]
    for wrong, message in (
        ("crosattention", "'crosattention' fits no parameter.* such as "),
        ("(", "no regular expression"),
        (lambda path: False, "nothing is selected"),
        ({"encoder": "fast"}, "none for query_tokens"),
    ):
        with pytest.raises(fq.InputError, match=message):
            training.partition(params, wrong)


def test_learning_rates_of_groups_and_other_optimizers() -> None:
    config, params = tree()
    # Of the layers, the first suffice.
    for layer in (1, 2):
        del params["encoder"][f"layer_{layer}"], params["visual_encoder"]["encoder"][f"layers_{layer}"]
    rates = {"vision": 0.5, "crossattention": lambda step: 0.25 + step, "all": 0.125}

    def rate_of(path: str) -> float:
        return 0.5 if path.startswith("visual") else 0.25 if "crossattention" in path else 0.125

    labels = {0.5: "vision", 0.25: "crossattention", 0.125: "all"}
    by_path = {"labels": lambda path: labels[rate_of(path)]}
    for name, chosen in (("adamw", {}), ("lion", by_path), ("adafactor", {}), ("sgd", by_path)):
        optimizer = training.make_optimizer(config, rates, optimizer=name, weight_decay=0, clip_norm=0, **chosen)
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        for path, update in flatten_dict(updates, sep="/").items():
            np.testing.assert_allclose(update, -rate_of(path), rtol=1e-4, err_msg=f"{name} {path}")
    for wrong, message in (
        ({"vision": 1.0}, "have no learning rate"),
        ({"visoin": 1.0, "all": 1.0}, "'visoin' fits no parameter"),
        ({"all": 1.0, "crossattention": 1.0}, "of crossattention matches no trained parameter"),
    ):
        with pytest.raises(fq.InputError, match=message):
            training.make_optimizer(config, wrong).init(params)
    with pytest.raises(fq.InputError, match="`optimizer` is 'adam'"):
        training.make_optimizer(config, 1.0, optimizer="adam")


def test_a_frozen_tower_has_no_backward_pass(tiny: Any) -> None:
    model, params = tiny
    optimizer = training.make_optimizer(model.config, 1e-3)
    step, (batch,) = training.make_train_step(model, optimizer), batches(4)

    def flops(function: Any, *arguments: Any) -> float:
        return function.lower(*arguments).cost_analysis()["flops"]

    def of_step(*train: Any) -> float:
        state = jax.eval_shape(lambda: training.TrainState.create(params, optimizer, train))
        return flops(step, state, batch)

    tower = flops(
        jax.jit(lambda v, x: model.apply(v, x, method="encode_image")), {"params": params}, batch["pixel_values"]
    )
    # The backward pass costs twice as much, less the gradient of the tower's input.
    assert of_step("all") - of_step("qformer", "heads") > 1.5 * tower


# The optimizer


def test_weight_decay_and_layer_decay() -> None:
    config, params = tree()
    zero = jax.tree.map(jnp.zeros_like, params)

    def first_updates(gradients: Any, *arguments: Any, **settings: Any) -> Any:
        optimizer = training.make_optimizer(config, *arguments, **settings)
        update = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[0])
        return update(gradients)

    updates = first_updates(zero, 0.5, weight_decay=0.1)
    for path, update in flatten_dict(updates).items():
        spared = path[-1] in ("bias", "scale", "class_embedding", "temp")
        np.testing.assert_allclose(update, 0 if spared else -0.05, err_msg=str(path))
    names = {"/".join(path) for path in flatten_dict(params)}
    assert {"visual_encoder/embeddings/class_embedding", "temp"} <= names

    updates = first_updates(params, 1.0, weight_decay=0, layer_decay=0.5, clip_norm=0)
    heights = {path: -np.log2(-np.mean(update)) for path, update in flatten_dict(updates, sep="/").items()}
    expected = {
        "query_tokens": 4,
        "embeddings/": 4,
        "visual_encoder/embeddings/": 4,
        "visual_encoder/pre_layernorm/": 4,
    }
    expected |= dict.fromkeys(
        ("visual_encoder/post_layernorm/", "vision_proj/", "text_proj/", "itm_head/", "lm_head/"), 0
    )
    for i in range(3):
        expected |= {f"encoder/layer_{i}/": 3 - i, f"visual_encoder/encoder/layers_{i}/": 3 - i}
    for prefix, height in expected.items():
        matching = {path: h for path, h in heights.items() if path.startswith(prefix)}
        assert matching, prefix
        assert all(round(h, 3) == height for h in matching.values()), matching


def test_warm_up_and_cosine() -> None:
    schedule = training.make_schedule(2.0, steps=110, warmup=10)
    for step, rate in ((0, 0), (5, 1), (10, 2), (60, 1.1), (110, 0.2), (200, 0.2)):
        assert float(schedule(step)) == pytest.approx(rate), step
    assert float(training.make_schedule(2.0, steps=10, warmup=0)(0)) == 2
    # Fewer steps than the warm-up.
    short = training.make_schedule(2.0, steps=4, warmup=100)
    assert [float(short(i)) for i in range(5)] == [0, 0.5, 1, 1.5, 2]


def trees(number: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {"a": {"kernel": np.float32(rng.normal(size=3) * 4**i)}, "b": {"bias": np.float32(rng.normal(size=2))}}
        for i in range(number)
    ]


def run_optimizer(gradients: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    optimizer = training.make_optimizer(tree()[0], 0.1, **settings)
    params = jax.tree.map(jnp.ones_like, gradients[0])
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def close(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance * np.abs(b).max()), one, other)


def test_clipping_and_accumulation() -> None:
    gradients = trees(6)
    norms = [float(optax.tree.norm(gradient)) for gradient in gradients]
    assert min(norms) < 20 < max(norms)
    clipped = [jax.tree.map(lambda x, n=n: x * min(1, 20 / n), g) for g, n in zip(gradients, norms, strict=True)]
    close(run_optimizer(gradients, clip_norm=20), run_optimizer(clipped, clip_norm=0))
    means = [jax.tree.map(lambda *x: sum(x) / 3, *gradients[i : i + 3]) for i in (0, 3)]
    close(run_optimizer(gradients, accumulation=3, layer_decay=0.9), run_optimizer(means, layer_decay=0.9))


@flax.struct.dataclass
class Losses:
    loss: Any
    loss_itc: Any = 0.0
    loss_itm: Any = 0.0
    loss_itg: Any = 0.0


class Linear:
    """A model whose loss is x * weight; its gradient is x."""

    def apply(self, variables: Any, x: jax.Array, **_: Any) -> Any:
        return Losses(x * variables["params"]["query_tokens"])


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_moving_average() -> None:
    optimizer = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    state = training.TrainState.create({"query_tokens": jnp.float32(1)}, optimizer, ema=True)
    step = training.make_train_step(Linear(), optimizer, ema_decay=0.9, accumulation=2)  # type: ignore[arg-type]
    weight = average = 1.0
    for pair in ((1.0, 3.0), (2.0, 4.0), (0.0, 6.0)):
        for x in pair:
            state, metrics = step(state, {"x": jnp.float32(x)})
        weight -= sum(pair) / 2
        average = 0.9 * average + 0.1 * weight
        assert float(state.params["query_tokens"]) == pytest.approx(weight)
        assert float(state.averaged_params["query_tokens"]) == pytest.approx(average)
    assert float(metrics["gradient_norm"]) == 6


# A loop of one's own


def test_a_custom_loop(tiny: Any) -> None:
    model, params = tiny
    params = jax.tree.map(jnp.array, params)
    tower = jax.tree.map(np.array, params["visual_encoder"])
    optimizer = training.make_optimizer(model.config, 3e-3)
    state = training.TrainState.create(params, optimizer)
    step: Any = training.make_train_step(model, optimizer)
    step = step.lower(state, batches(4)[0]).compile()
    losses = []
    for batch in batches(4) * 30:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert same(jax.tree.map(np.array, state.params["visual_encoder"]), tower)
    assert not same(jax.tree.map(np.array, state.params["vision_proj"]), tiny[1]["vision_proj"])


def test_a_custom_loss(tiny: Any) -> None:
    """Train vectors towards a target, sharded, accumulated, averaged; parameters that the loss does not read stay."""
    config, mesh = tiny[0].config, fq.make_mesh(data=1, fsdp=2)
    model, rng = fq.Blip2QFormerModel(config), np.random.default_rng(0)
    rows = parameters(config, "diffusers", ["proj_layer", "temp"])
    params = unflatten_dict({p.path: jnp.float32(rng.normal(size=p.shape) * 0.1) for p in rows}, sep="/")
    batch = fq.shard_batch(batches(4)[0] | {"target": rng.normal(size=(4, 3, 16)).astype(np.float32)}, mesh)

    def loss(model: Any, trained: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        tree = {"params": training.merge(trained, frozen)}
        vectors = model.apply(tree, batch["pixel_values"], batch["input_ids"]).query_embeddings
        error = jnp.square(vectors - batch["target"])
        return error.mean(), {"largest": error.max(), "vectors": vectors}

    optimizer = training.make_optimizer(config, 0.03, weight_decay=0.1, accumulation=2)
    state = training.TrainState.create(params, optimizer, r"query_tokens|crossattention|proj_layer|temp", ema=True)
    state = fq.shard_params(state, mesh)
    step = training.make_train_step(model, optimizer, loss=loss, ema_decay=0.5, accumulation=2, mesh=mesh, donate=False)
    begun, losses = state, []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert metrics.keys() == {"loss", "largest", "gradient_norm", "parameter_norm"}
    assert losses[-1] < 0.9 * losses[0]
    assert float(state.params["temp"]) == float(params["temp"])
    assert same(begun.params, params)  # not donated
    assert same(state.params["visual_encoder"], params["visual_encoder"])
    assert not same(state.params["proj_layer"], state.averaged_params["proj_layer"])
    with pytest.raises(fq.InputError, match="float16 is not supported: small gradients underflow"):
        training.make_train_step(model.clone(dtype=jnp.float16), optimizer)


def test_the_library_needs_none_of_the_programs_packages() -> None:
    program = """
import sys
for name in ("datasets", "grain", "tensorboardX"):
    sys.modules[name] = None
from flax_qformer.training import TrainState, make_optimizer, make_train_step, partition
from flax_qformer.commands.main import main
main(["train", "--data", "x", "--output", "y"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "flax-qformer train: this needs datasets, grain, tensorboardX as well; run pip install 'flax-qformer[train]'\n",
    )


# Retrieval


class Features:
    """A model whose features are its inputs; ITM is a matrix of scores, by image and text number."""

    def __init__(self, images: np.ndarray, texts: np.ndarray, scores: np.ndarray) -> None:
        self.images, self.texts, self.scores = jnp.asarray(images), jnp.asarray(texts), jnp.asarray(scores)

    def apply(self, _: Any, *arguments: Any, method: str, encoder_hidden_states: Any = None) -> Any:
        if method == "encode_image":
            return SimpleNamespace(last_hidden_state=arguments[0])
        if method == "image_features":
            return self.images[encoder_hidden_states]
        if method == "text_features":
            return self.texts[arguments[0]]
        return self.scores[encoder_hidden_states, arguments[1]]


def brute_force(scores: np.ndarray, belongs: np.ndarray, k: int) -> float:
    """The share of rows in which fewer than k other scores exceed the best matching one."""
    hits = 0
    for row, own in zip(scores, belongs, strict=True):
        best = max(row[own])
        hits += sum(value > best for value in row[~own]) < k
    return hits / len(scores)


def test_recall_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(20), 2)[1:-1]
    images, texts = rng.normal(size=(20, 3, 4)), rng.normal(size=(len(owner), 4))
    images += 0.5 * np.stack([texts[owner == i].mean(axis=0) for i in range(20)])[:, None]
    itm = rng.normal(size=(20, len(owner)))
    numbers = np.arange(len(owner))

    def examples() -> Iterator[tuple[dict[str, np.ndarray], int]]:
        for start in range(0, len(owner), 8):
            rows = numbers[start : start + 8]
            full = np.append(rows, np.repeat(rows[-1:], 8 - len(rows)))
            image = owner[full]
            ids = {"image_id": image + 100, "input_ids": full, "attention_mask": full}
            yield {"pixel_values": image, **ids}, len(rows)

    model: Any = Features(images.astype(np.float32), texts.astype(np.float32), itm.astype(np.float32))
    retrieval, sizes = Retrieval(model, 8), []
    read = retrieval._image
    retrieval._image = lambda params, pixels: sizes.append(len(pixels)) or read(params, pixels)
    figures = retrieval.evaluate({}, examples(), rerank=6)
    assert sizes == [8, 8, 8]  # 20 images, though there are 38 texts
    scores = np.einsum("iqd,td->iqt", images, texts).max(axis=1)
    belongs = np.arange(20)[:, None] == owner
    reranked = {}
    for direction, table, match in (("image_to_text", scores, itm), ("text_to_image", scores.T, itm.T)):
        best = np.argsort(-table, axis=1)[:, :6]
        new = table - 1000
        for row, columns in enumerate(best):
            new[row, columns] = table[row, columns] + match[row, columns]
        reranked[direction] = new
    assert (figures.pop("images"), figures.pop("texts")) == (20, len(owner))
    expected = {}
    for k in (1, 5, 10):
        expected[f"image_to_text/recall@{k}"] = brute_force(scores, belongs, k)
        expected[f"text_to_image/recall@{k}"] = brute_force(scores.T, belongs.T, k)
        expected[f"image_to_text/reranked_recall@{k}"] = brute_force(reranked["image_to_text"], belongs, k)
        expected[f"text_to_image/reranked_recall@{k}"] = brute_force(reranked["text_to_image"], belongs.T, k)
    assert figures == pytest.approx(expected)
    assert figures["text_to_image/recall@1"] != figures["text_to_image/reranked_recall@1"]
    assert not any("reranked" in name for name in retrieval.evaluate({}, examples(), rerank=0))
    with pytest.raises(fq.InputError, match="1 images are too few"):
        retrieval.evaluate({}, [(batch, 1) for batch, _ in list(examples())[:1]])
    result = retrieval.search({}, examples(), rerank=6)
    best = result.best_images(103, 4)  # its first text is the sixth
    assert best == [100 + image for image in np.argsort(-reranked["text_to_image"][5])[:4]]


# Samples


def test_samples_are_the_same_with_scanned_layers(folder: Path, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    model, params = tiny
    processor, mesh = fq.Processor.from_pretrained(folder / "model"), fq.make_mesh(data=1, fsdp=2)
    source = open_source(DataSettings(str(tmp_path / "data")), "all")
    (tmp_path / "data" / "1.png").write_bytes(b"broken")
    ids = list(dict.fromkeys(source.image_ids.tolist()))
    del ids[1]
    retrieved = RetrievalResult({}, ids, ids, np.eye(len(ids)))
    scanned = model.clone(config=model.config.scanned())
    drawn = []
    for one, tree in ((model, params), (scanned, fq.stack_layers(params))):
        sampler = Sampler(one, processor, source, 3, 8, mesh)
        drawn.append(sampler.draw(fq.shard_params(tree, mesh), retrieved))
    samples, other = drawn
    assert samples is not None
    assert samples.captions == other.captions
    for name, picture in samples.pictures.items():
        assert np.abs(picture - other.pictures[name].astype(int)).max() <= 1, name
    # One image is broken; the others keep their order, and the first of two captions counts.
    assert [true for true, _ in samples.captions] == ["a red", "a blue", "a black"]
    # The image, the mean of the three queries, and each of them.
    assert samples.pictures["attention"].shape == (3 * SIDE, 5 * SIDE, 3)
    shown = np.asarray(PIL.Image.open(folder / "data" / "2.png").resize((SIDE, SIDE)))
    np.testing.assert_array_equal(samples.pictures["attention"][SIDE : 2 * SIDE, :SIDE], shown)


# Reading batches


def test_a_prefetched_batch_counts_when_it_is_taken() -> None:
    class Numbers:
        position = 0.0

        def __next__(self) -> dict[str, np.ndarray]:
            if self.position == 2:
                raise fq.InputError("a worker died")
            self.position += 1
            return {"x": np.full(2, self.position)}

        def get_state(self) -> dict[str, float]:
            return {"position": self.position}

        epoch = property(lambda self: self.position / 10)

    numbers: Any = Numbers()
    prefetcher = Prefetcher(numbers, fq.make_mesh())
    taken = []
    for _ in range(2):
        taken.append((int(prefetcher.take()["x"][0]), prefetcher.state["position"], prefetcher.epoch))
        prefetcher.prefetch()
        taken.append(prefetcher.state["position"])
    assert taken == [(1, 1, 0.1), 1, (2, 2, 0.2), 2]
    with pytest.raises(fq.InputError, match="a worker died"):
        prefetcher.take()


# Settings


@pytest.fixture
def parsed_settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that returns the settings that a command would run with."""
    seen: list[Any] = []
    monkeypatch.setattr("flax_qformer.training.loop.train", lambda settings: seen.append(settings))
    monkeypatch.setattr("flax_qformer.training.evaluation.evaluate", lambda settings: seen.append(settings) or {})

    def parse(*arguments: Any) -> Any:
        main(list(map(str, arguments)))
        return seen[-1]

    return parse


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one-line error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    # Warnings, of newly initialised modules or a missing evaluation, may come before.
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert [line.startswith(f"flax-qformer {arguments[0]}: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_settings_of_a_file(tmp_path: Path, parsed_settings: Any, capsys: Any) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "data: my data\noutput: -out\nsteps: 7\nlearning_rate: 1e-4\ntrain: [vision]\nflip: true\ndropout: null\n"
        "crop_scale: [0.2, 1]\nseed: 3\noptimizer: lion\ngroup_learning_rates: {vision: 1.0e-5, query_tokens: 1}\n"
    )
    expected = TrainSettings(
        "my data",
        output="-out",
        steps=7,
        train=("vision",),
        flip=True,
        crop_scale=(0.2, 1.0),
        seed=3,
        optimizer="lion",
        group_learning_rates={"vision": 1e-5, "query_tokens": 1.0},
    )
    assert parsed_settings("train", "--settings", file) == expected
    scanned = dataclasses.replace(expected, scan_layers=True)
    assert parsed_settings("train", "--settings", file, "--scan-layers") == scanned
    changed = parsed_settings("train", f"--settings={file}", "--steps", 9, "--no-flip", "--train", "qformer", "heads")
    assert changed == dataclasses.replace(expected, steps=9, flip=False, train=("qformer", "heads"))
    # The settings that a run writes can be read, also by an evaluation.
    written = dataclasses.replace(expected, scan_layers=False)
    file.write_text(to_yaml(written))
    assert parsed_settings("train", "--settings", file) == written
    wanted = EvaluateSettings("my data", model="m", crop_scale=(0.2, 1.0), flip=True, seed=3, dtype="bfloat16")
    assert parsed_settings("evaluate", "--settings", file, "--model", "m") == wanted

    for text, message in (
        ("bach_size: 3", "names unknown settings: bach_size"),
        ("a: [", "is not YAML"),
        ("- a", "must hold a setting a line"),
        ("steps: many", "--steps.*'many'"),
        ("steps: 1.5", "s.yaml: --steps is 1.5; it must be int"),
        ("optimizer: adam", "'adam'.*adamw"),
        ("steps: 0", "--steps is 0; it must be 1 or more"),
        ("steps:", "leaves steps empty"),
        ("crop_scale: [1]", r"s.yaml: --crop-scale is \[1\]"),
        ("group_learning_rates: {vision: fast}", "s.yaml: --group-learning-rates is {'vision': 'fast'}"),
        ("flip: often", "s.yaml: --flip is 'often'; it must be bool"),
    ):
        file.write_text(text)
        line = refused(capsys, "train", "--settings", file, "--data", "d", "--output", "o")
        assert re.search(message, line), line
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in refused(capsys, "train", "--settings", file)
    assert "none.yaml cannot be read" in refused(capsys, "train", "--settings", tmp_path / "none.yaml")


def test_help_names_every_setting_and_its_default(capsys: Any) -> None:
    for command, kind in (("train", TrainSettings), ("evaluate", EvaluateSettings)):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--settings FILE" in text
        for field in dataclasses.fields(kind):
            start = (
                text.index(f"--{field.name.replace('_', '-')} ")
                if field.type is not bool and field.name != "scan_layers"
                else text.index(f"--{field.name.replace('_', '-')},")
            )
            about = text[start:].replace("- ", "-")
            is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            default = {} if field.default is dataclasses.MISSING else field.default
            shown = " ".join(map(str, default)) if isinstance(default, tuple | dict) else str(default)
            assert ("(required)" if is_required else f"(default: {shown})") in about, field.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data STR"),
        (["--data", "d"], "--output STR"),
        (["--steps", "many"], "--steps: invalid literal"),
        (["--stesp", "3"], "--stesp"),
        (["--steps"], "--steps"),
        (["--group-learning-rates", "vision"], "'vision' is not a list of groups, each followed by its learning rate"),
        (["--group-learning-rates", "vision", "x"], "'vision x' is not a list of groups"),
        (["stray"], "stray"),
    ],
)
def test_a_command_line_that_cannot_be_read(arguments: list[str], message: str, capsys: Any) -> None:
    given = arguments if not arguments or "--data" in arguments else [*arguments, "--data", "d", "--output", "o"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *given])
    assert stop.value.code == 2
    text = " ".join(re.sub("[─│╭╮╰╯]", " ", capsys.readouterr().err).split())
    assert message in text
    assert "flax-qformer" in text
    assert "--help" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--learning-rate", "inf"], "--learning-rate is inf"),
        (["--b2", "1"], "--b2 is 1.0"),
        (["--train"], "--train names nothing"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--batch-size", "1"], "--batch-size is 1; it must be 2 or more"),
        (["--weight-decay", "inf"], "--weight-decay is inf"),
        (["--evaluate-on", "1"], "--evaluate-on is 1"),
        (["--dtype", "float16"], "small gradients underflow"),
        (["--group-learning-rates", "vision", "0"], "--group-learning-rates has 0.0 for vision"),
        (["--layer-decay", "2"], "--layer-decay is 2"),
    ],
)
def test_invalid_settings(arguments: list[str], message: str, capsys: Any) -> None:
    line = refused(capsys, "train", *arguments, "--data", "d", "--output", "o")
    assert message in line
    assert line.endswith("(see flax-qformer train --help)")


# The program


def program(folder: Path, run: str | Path, *more: Any) -> list[str]:
    """Settings that a wrong resume would show: workers, dropout, augmentation, moving average, accumulation."""
    arguments = {
        "data": folder / "data",
        "model": folder / "model",
        "output": folder / run,
        "held-out": 3,
        "steps": 8,
        "warmup": 3,
        "learning-rate": 0.003,
        "batch-size": 4,
        "accumulation": 2,
        "ema-decay": 0.9,
        "layer-decay": 0.9,
        "dropout": 0.2,
        "max-text-length": 8,
        "dtype": "float32",
        "num-workers": 1,
        "save-every": 2,
        "log-every": 1,
        "evaluate-every": 5,
        "rerank": 2,
    }
    return [
        "train",
        "--flip",
        *(str(word) for name, v in arguments.items() for word in (f"--{name}", v)),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the installed command. At the end, neither it nor its workers may still run."""
    started: list[subprocess.Popen[str]] = []

    def begin(arguments: list[str]) -> subprocess.Popen[str]:
        with (tmp_path / f"{len(started)}.txt").open("w") as err:
            process = subprocess.Popen(
                [BIN / "flax-qformer", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        process.stderr_file = tmp_path / f"{len(started)}.txt"  # type: ignore[attr-defined]
        started.append(process)
        return process

    yield begin
    left = []
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and _group_lives(process.pid):
            time.sleep(0.1)
        if _group_lives(process.pid):
            left.append(process.pid)
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdout:
            process.stdout.close()
    assert not left


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a command; its stderr."""
    process.wait(timeout=300)
    stderr = process.stderr_file.read_text()  # type: ignore[attr-defined]
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    return stderr


MANIFEST = "_CHECKPOINT_METADATA"
"""The file of a checkpoint in which orbax keeps the manifest."""


def last_step(run: Path) -> int:
    return max([0, *(int(path.parent.name) for path in (run / "checkpoints").glob("*/checksums.json"))])


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def result(run: Path) -> tuple[list[dict[str, float]], Any]:
    """The metrics of each step without times, and the saved parameters."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    _, params = fq.from_pretrained(run / "model")
    return figures, jax.tree.map(np.asarray, params)


def check_same(run: Path, expected: tuple[Any, Any]) -> None:
    figures, params = result(run)
    assert figures == expected[0]
    assert same(params, expected[1])


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, environment: dict[str, str]) -> tuple[Any, Any]:
    """The result of an uninterrupted run without workers; its paths are relative."""
    command = [BIN / "flax-qformer", *program(Path(), "whole", "--num-workers", 0)]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return result(folder / "whole")


def shown_steps(run: Path, prefix: str) -> dict[str, list[int]]:
    """The steps of each tag that TensorBoard shows; a resumed run discards entries after its start."""
    steps: dict[str, list[int]] = {}
    for path in sorted((run / "tensorboard").iterdir(), key=lambda path: path.stat().st_ctime):
        content = path.read_bytes()
        while content:
            # A record is its length, a checksum, an event, a checksum.
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                steps = {tag: [step for step in seen if step < event.step] for tag, seen in steps.items()}
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return {tag: seen for tag, seen in steps.items() if tag.startswith(prefix)}


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_stopped_run_resumes_bit_for_bit(folder: Path, start: Any, uninterrupted: Any, tiny: Any) -> None:
    run, command = folder / "stopped", program(folder, "stopped")
    process = start(command)
    wait_for(process, lambda: last_step(run) >= 4)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    saved = last_step(run)
    assert 4 <= saved < 8
    # The newest checkpoint is also damaged.
    flip_a_byte(largest_file(run / "checkpoints" / str(saved)))
    process = start(command)
    stderr = finish(process)
    assert f"the checkpoint of step {saved} is damaged" in stderr
    check_same(run, uninterrupted)
    figures, params = result(run)
    assert [line["step"] for line in figures] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 8]
    assert shown_steps(run, "samples/") == {
        name: [5, 8] for name in ("samples/attention", "samples/captions/text_summary", "samples/retrieved")
    }
    assert shown_steps(run, "loss") == {"loss": [1, 2, 3, 4, 5, 6, 7, 8]} | {
        f"loss_{name}": [1, 2, 3, 4, 5, 6, 7, 8] for name in ("itc", "itm", "itg")
    }
    assert "8/8 steps: loss" in stderr
    assert "step 8: images 3, texts" in stderr
    assert "recall@10 of 3 images is always 1; hold out at least 100 images" in stderr
    assert "\r" not in stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"6", "8"}
    assert same(params["visual_encoder"], tiny[1]["visual_encoder"])
    assert not same(params["itm_head"], tiny[1]["itm_head"])


def test_damaged_checkpoints_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(value: int) -> dict[str, Any]:
        return {"a": jnp.full((64, 8), value, jnp.float32), "b": {"c": jnp.int32(value)}}

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    checkpoints = Checkpoints(tmp_path / "whole", keep=2)
    assert checkpoints.restore(state(0)) is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"position": step})
    assert checkpoints.steps() == [3, 2]
    manifest = Path("3", MANIFEST)
    for damage, place in (
        (flip_a_byte, None),
        (truncate, None),
        (Path.unlink, None),
        (flip_a_byte, manifest),
        (truncate, manifest),
        (Path.unlink, manifest),
        (lambda path: path.write_text("[]"), manifest),
        (lambda path: path.write_text(path.read_text().replace('"position": 3', '"position": 4')), manifest),
    ):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        damaged = Checkpoints(folder)
        damage(folder / place if place else largest_file(folder / "3"))
        caplog.clear()
        restored = damaged.restore(state(0))
        assert restored is not None
        assert same(restored[0], state(2))
        assert restored[1] == {"position": 2}
        damaged.tidy(2)
        assert "3" in caplog.text
        assert {path.name for path in folder.iterdir()} == {"2"}
    flip_a_byte(folder / "2" / MANIFEST)
    with pytest.raises(fq.InputError, match="all checkpoints in .* are damaged; start anew with `overwrite=True`"):
        Checkpoints(folder).restore(state(0))

    with pytest.raises(fq.InputError, match=r"of another model: a was float32\[64, 8\] and is now float32\[2\]"):
        checkpoints.restore(state(0) | {"a": jnp.zeros(2)})
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(fq.InputError, match="step 4 cannot be written .* are needed.*goes on from step 3"):
            checkpoints.save(4, state(4), {})
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"2", "3"}
    # The remains of a killed save are removed.
    for name in ("4.orbax-checkpoint-tmp", "5"):
        (tmp_path / "whole" / name).mkdir()
    (tmp_path / "whole" / "5.json.partial").touch()
    checkpoints.tidy(3)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"2", "3"}


def test_a_checkpoint_without_checksums_is_the_last_resort(tmp_path: Path) -> None:
    """A kill after a step is complete and before its checksums are written leaves it so."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"a": jnp.int32(step)}, {"position": step})
    for expected in (1, 2):
        (tmp_path / str(3 - expected) / "checksums.json").unlink()
        restored, notes = checkpoints.restore({"a": jnp.int32(0)}) or (None, None)
        assert same(restored, {"a": jnp.int32(expected)})
        assert notes == checkpoints.notes() == {"position": expected}


def test_checkpoints_of_earlier_versions(tmp_path: Path) -> None:
    """They have the manifest beside the checkpoint, where it was written last."""
    state = {"a": jnp.arange(8.0), "b": {"c": jnp.int32(3)}}
    for step in (1, 2, 3):
        ocp.save(tmp_path / str(step), {"a": state["a"] + step, "b.c": state["b"]["c"]})
        content = {"arrays": {"a": "float32[8]", "b.c": "int32[]"}, "files": {}, "notes": {"position": step}}
        text = json.dumps({"sum": zlib.crc32(json.dumps(content, sort_keys=True).encode()), "content": content})
        (tmp_path / f"{step}.json").write_text(text)
    # A killed save.
    (tmp_path / "3.json").unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.notes() == {"position": 2}
    restored, notes = checkpoints.restore(state) or (None, None)
    assert same(restored, state | {"a": state["a"] + 2})
    assert notes == {"position": 2}
    checkpoints.tidy(2)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "1.json", "2", "2.json"}
    checkpoints.save(3, state, {"position": 3})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "2.json", "3"}
    assert checkpoints.notes() == {"position": 3}


def test_runs_that_cannot_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(*more: Any) -> str:
        return refused(capsys, *program(folder, tmp_path / "run", *more))

    assert "--batch-size: 5 does not divide into 2 parts (data x fsdp); 4 does" in line("--batch-size", 5)
    assert "no file or folder none" in line("--model", "none/of/these")
    assert "no column with a usual name" in line("--data", captionless(tmp_path / "captionless"))
    assert "no file or folder here" in line("--data", tmp_path / "nothing")
    assert "float64 is none" in line("--dtype", "float64")
    assert "at most 16" in line("--max-text-length", 17)
    assert not (tmp_path / "run").exists()
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir(mode=0)
    with monkeypatch.context() as patch:
        # Root can read every folder.
        patch.setattr(os, "access", lambda *_: False)
        assert "may not be read; change its permissions" in line("--data", unreadable)

    other = tmp_path / "other"
    other.mkdir()
    (other / "work.txt").touch()
    assert "holds something other than a run" in line("--output", other, "--overwrite")
    assert "is not a folder" in line("--output", other / "work.txt")
    assert "cannot write" in line("--output", other / "work.txt" / "run")
    assert [path.name for path in other.iterdir()] == ["work.txt"]


def captionless(folder: Path) -> Path:
    folder.mkdir()
    PIL.Image.new("RGB", (9, 9)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}')
    return folder


def test_a_refused_command_changes_no_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fail_in(monkeypatch, 5)
    refused(capsys, *program(folder, run, "--num-workers", 0))
    kept = run / "kept"
    shutil.copytree(folder / "model", kept)
    shutil.copytree(folder / "data", tmp_path / "fewer")
    rows = (tmp_path / "fewer" / "metadata.jsonl").read_text().splitlines()
    left = [row for row in rows if '"file_name": "11.png"' not in row and '"file_name": "10.png"' not in row]
    (tmp_path / "fewer" / "metadata.jsonl").write_text("\n".join(left))

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = files()
    for more, message in (
        (["--train", "heads"], "--train was ['qformer', 'heads'] and is now ['heads']"),
        (["--accumulation", 1, "--seed", 4], "--accumulation was 2 and is now 1. Set them back"),
        (["--overwrite", "--data", tmp_path / "nothing"], "no file or folder here"),
        (["--overwrite", "--model", tmp_path / "nothing"], "no file or folder"),
        (["--overwrite", "--model", kept], "kept is inside the run that --overwrite removes"),
        (["--data", tmp_path / "fewer"], "the number of examples (--data, --held-out) was"),
    ):
        assert message in refused(capsys, *program(folder, run, *more))
        assert files() == before
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        load = run_module.load_model
        patch.setattr(run_module, "load_model", lambda *of: signal.raise_signal(signal.SIGINT) or load(*of))
        main(list(map(str, program(folder, run, "--overwrite"))))
    assert stop.value.code == 128 + signal.SIGINT
    assert "stopped before the run began; nothing was changed" in capsys.readouterr().err
    assert files() == before
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another program trains in" in refused(capsys, *program(folder, run))
        assert files() == before
    # The settings that a run writes do not overwrite it again.
    refused(capsys, *program(folder, run, "--overwrite", "--num-workers", 0))
    assert yaml.safe_load((run / "settings.yaml").read_text())["overwrite"] is False


def fail_in(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Replace the step by one that computes nothing, and whose loss is NaN in one batch."""

    def make_step(*_: Any, **__: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            state = dataclasses.replace(state, step=state.step + 1)
            return state, {"loss": np.nan if state.step == batch else 1.0}

        return step

    monkeypatch.setattr("flax_qformer.training.run.make_train_step", make_step)
    monkeypatch.setattr("flax_qformer.training.step_logging._summary", str)


@pytest.mark.parametrize("is_delayed", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_delayed: bool
) -> None:
    fail_in(monkeypatch, 5)
    monkeypatch.setattr(StepLogger, "is_delayed", is_delayed)
    run = tmp_path / "broken"
    message = refused(capsys, *program(folder, run, "--num-workers", 0, "--evaluate-every", 0))
    assert "train: loss is not finite at step 3; the last good checkpoint is of step 2; lower --learning" in message
    assert last_step(run) == 2
    assert not (run / "model").exists()


def test_a_signal_before_an_evaluation_skips_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a signal that comes while the program waits for the last step."""
    fail_in(monkeypatch, 0)
    monkeypatch.setattr(StepLogger, "is_delayed", True)
    monkeypatch.setattr(
        StepLogger, "_check_finite", lambda _, number, __: number == 3 and signal.raise_signal(signal.SIGTERM)
    )
    evaluated: list[Any] = []
    monkeypatch.setattr(Retrieval, "search", lambda *_: evaluated.append(_) or RetrievalResult({}, [], [], np.zeros(0)))
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, program(folder, tmp_path / "run", "--num-workers", 0, "--evaluate-every", 3))))
    assert stop.value.code == 128 + signal.SIGTERM
    assert last_step(tmp_path / "run") == 3
    assert not evaluated


def test_a_step_is_logged_while_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepLogger, "is_delayed", True)
    monkeypatch.setattr("flax_qformer.training.step_logging._summary", str)
    logged: list[int] = []
    log: Any = SimpleNamespace(write=lambda step, _: logged.append(step))
    settings = TrainSettings(data="", output=str(tmp_path), model="", log_every=1)
    step_logger = StepLogger(settings, np.zeros(4), Checkpoints(tmp_path), log, Progress(4, "step"))
    for number in (1, 2, 3):
        step_logger.add(DispatchedStep(number, [{"loss": jnp.float32(0)}], 0, 0))
        assert logged == list(range(1, number))
    step_logger.flush()
    assert logged == [1, 2, 3]


@pytest.mark.slow
def test_evaluate_reproduces_the_metrics_of_a_run(folder: Path, start: Any, uninterrupted: Any) -> None:
    figures, _ = uninterrupted
    settings, model = folder / "whole" / "settings.yaml", folder / "whole" / "model"
    process = start(["evaluate", "--settings", settings, "--model", model, "--data", folder / "data"])
    finish(process)
    printed = dict(line.split(": ") for line in process.stdout.read().splitlines())
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(
        {name: value for name, value in figures[-1].items() if name != "step"}, rel=1e-4
    )
    assert (printed["images"], int(printed["texts"]) >= 3) == ("3", True)


@pytest.mark.slow
def test_a_diverged_run_stops(folder: Path, start: Any) -> None:
    run = folder / "hot"
    more = ["--learning-rate", 1e30, "--save-every", 1, "--evaluate-every", 0, "--warmup", 2, "--num-workers", 0]
    stderr = finish(start(program(folder, "hot", *more)), 2).splitlines()[-1]
    assert "flax-qformer train: parameter_norm is not finite at step 2; the last good checkpoint is of step 1" in stderr
    assert last_step(run) == 1
    assert not (run / "model").exists()


@pytest.mark.slow
def test_a_model_without_weights_and_no_held_out_images(folder: Path, start: Any) -> None:
    more = ["--model", folder / "words", "--held-out", 0, "--steps", 1, "--num-workers", 0]
    stderr = finish(start(program(folder, "fresh", *more)))
    assert "words has no weights: all are randomly initialised" in stderr
    assert "no evaluation" in stderr
    fq.from_pretrained(folder / "fresh" / "model", model_class=fq.Blip2ForPreTraining)
    # A finished run takes no further steps: only its model is written again.
    shutil.rmtree(folder / "fresh" / "model")
    settings = (folder / "fresh" / "settings.yaml").read_bytes()
    stderr = finish(start(program(folder, "fresh", *more, "--learning-rate", 1)))
    assert "the run has 1 steps already" in stderr
    assert (folder / "fresh" / "settings.yaml").read_bytes() == settings
    fq.from_pretrained(folder / "fresh" / "model", model_class=fq.Blip2ForPreTraining)


@pytest.mark.slow
def test_kills_at_random_moments(folder: Path, tmp_path: Path, start: Any, uninterrupted: Any) -> None:
    """At any time: during start, compilation, a step, a save or an evaluation."""
    print("seed", seed := time.time_ns())
    rng = random.Random(seed)
    command, run = program(folder, tmp_path / "run"), tmp_path / "run"
    begun = time.monotonic()
    finish(start(program(folder, tmp_path / "timed")))
    check_same(tmp_path / "timed", uninterrupted)
    usual = time.monotonic() - begun
    for _ in range(40):
        process = start(command)
        saving = rng.random() < 0.3
        deadline = time.monotonic() + rng.uniform(0.1, 1) * usual
        wait_for(process, lambda d=deadline: time.monotonic() > d)  # type: ignore[misc]
        if saving:
            wait_for(process, lambda: any((run / "checkpoints").glob("*tmp*")))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        process.send_signal(number)
        code = process.wait(timeout=300)
        stderr = process.stderr_file.read_text()
        assert "Traceback" not in stderr, stderr
        assert code in (0, -number, 128 + number), stderr
        left = sorted(path.name for path in (run / "checkpoints").glob("*"))
        print(f"{number.name}{' in a save' if saving else ''}: {code}, {left}")
        if code == 0:
            break
    else:
        finish(start(command))
    check_same(run, uninterrupted)


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_run(folder: Path, tmp_path: Path, start: Any, uninterrupted: Any) -> None:
    def garbage(path: Path) -> None:
        path.write_text("{garbage")

    begun, command = tmp_path / "begun", program(folder, tmp_path / "begun")
    process = start(command)
    wait_for(process, lambda: last_step(begun) >= 4)
    process.terminate()
    message = finish(process, 128 + signal.SIGTERM).splitlines()[-1]
    newest = last_step(begun)
    assert f"flax-qformer train: stopped after step {newest}, which is saved; the same command resumes it" in message
    assert 4 <= newest < 8
    checkpoint = begun / "checkpoints" / str(newest)
    array, manifest = largest_file(checkpoint), checkpoint / MANIFEST
    # test_damaged_checkpoints_are_skipped has more kinds of damage.
    for damage, path, message in (
        (flip_a_byte, array, f"the checkpoint of step {newest} is damaged"),
        (garbage, manifest, f"checkpoints/{newest}, which is damaged"),
    ):
        run = tmp_path / damage.__name__
        shutil.copytree(begun, run)
        damage(run / path.relative_to(begun))
        assert message in finish(start(program(folder, run)))
        check_same(run, uninterrupted)
    for path in (begun / "checkpoints").glob(f"*/{MANIFEST}"):
        garbage(path)
    assert "are damaged; start anew with --overwrite" in finish(start(command), 2)
    finish(start([*command, "--overwrite"]))
    check_same(begun, uninterrupted)
