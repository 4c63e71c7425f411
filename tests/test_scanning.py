"""Scanned layers give the same as layers one by one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import cases
import flax_qformer as fq
from conftest import checkpointing, write_upstream

GEOMETRIES = ("frequency_1", "frequency_2")


def models(geometry: str, folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """The model without and with scanned layers, and the parameters without."""
    config = dataclasses.replace(fq.Blip2Config.from_dict(cases.GEOMETRIES[geometry]), **changes)
    write_upstream(folder, config)
    model, params = fq.from_pretrained(folder)
    return model, fq.Blip2QFormerModel(dataclasses.replace(config, scan_layers=True)), params


def inputs(geometry: str) -> dict[str, np.ndarray]:
    batch = cases.batch(geometry)
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "head_mask": batch["head_mask_2d"],
    }


def used(gradients: Any) -> dict[str, np.ndarray]:
    """The gradients that are not all zero, by name: some parameters take no part in a forward pass."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(gradients, sep=".").items()}
    return {name: leaf for name, leaf in flat.items() if leaf.any()}


@pytest.mark.parametrize(
    ("geometry", "gradient_checkpointing"),
    [
        ("frequency_2", True),
        pytest.param("frequency_1", True, marks=pytest.mark.slow),
        pytest.param("frequency_1", False, marks=pytest.mark.slow),
    ],
)
def test_values_attentions_states_and_gradients(geometry: str, gradient_checkpointing: bool, tmp_path: Path) -> None:
    model, scanned, params = models(geometry, tmp_path)
    batch = inputs(geometry)

    def run(model: fq.Blip2QFormerModel, params: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            output = model.apply({"params": params}, **batch, output_attentions=True, output_hidden_states=True)
            return (output.query_embeddings**2).sum(), output

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    gradients, output = run(model, params)
    scanned = fq.Blip2QFormerModel(checkpointing(scanned.config, gradient_checkpointing))
    looped, looped_output = run(scanned, fq.stack_layers(params))
    for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(looped_output), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1, float(jnp.abs(a).max())))
    error, name = cases.gradient_error(used(fq.unstack_layers(looped)), used(gradients))
    assert error <= 1e-5, name


@pytest.mark.slow
def test_dropout_in_the_loop(tmp_path: Path) -> None:
    """Dropout depends on its key, and recomputed layers drop the same elements again."""
    config = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_1"])
    dropping = dataclasses.replace(config.qformer_config, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    _, model, params = models("frequency_1", tmp_path, qformer_config=dropping)
    batch = inputs("frequency_1")

    def run(model: fq.Blip2QFormerModel, seed: int) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            key = jax.random.key(seed)
            output = model.apply({"params": params}, **batch, deterministic=False, rngs={"dropout": key})
            return (output.query_embeddings**2).sum(), output.query_embeddings

        return jax.jit(jax.grad(loss, has_aux=True))(fq.stack_layers(params))

    gradients, embeddings = run(model, 0)
    assert not np.array_equal(embeddings, run(model, 1)[1])
    again, same = run(fq.Blip2QFormerModel(checkpointing(model.config, True)), 0)
    np.testing.assert_allclose(same, embeddings, atol=1e-5)
    error, name = cases.gradient_error(used(again), used(gradients))
    assert error <= 1e-5, name


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_stacking_round_trip(geometry: str, tmp_path: Path) -> None:
    plain, scanned, params = models(geometry, tmp_path)
    stacked = fq.stack_layers(params)
    jax.tree.map(np.testing.assert_array_equal, fq.unstack_layers(stacked), params)
    with pytest.raises(fq.InputError, match="no model's parameters, which have an encoder, but params"):
        fq.stack_layers({"params": params})
    for model, tree, message in ((scanned, params, "fq.stack_layers"), (plain, stacked, "fq.unstack_layers")):
        with pytest.raises(fq.InputError, match=message):
            model.apply({"params": tree}, **inputs(geometry))
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), inputs(geometry)["pixel_values"], np.zeros((3, 2), int))
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, stacked)
    fq.save_pretrained(tmp_path / "saved", scanned, stacked)
    jax.tree.map(np.testing.assert_array_equal, fq.from_pretrained(tmp_path / "saved")[1], params)


@pytest.mark.parametrize(
    ("geometry", "changes", "message"),
    [
        ("frequency_1", {"pruned_heads": {0: [1]}}, "pruned"),
        ("frequency_3", {}, "no groups of 3"),
    ],
)
def test_layers_that_differ_cannot_be_scanned(geometry: str, changes: Any, message: str) -> None:
    config = fq.Blip2Config.from_dict(cases.GEOMETRIES[geometry] | changes)
    with pytest.raises(fq.InputError, match=message):
        dataclasses.replace(config, scan_layers=True)
