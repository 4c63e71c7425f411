"""The text encoder against upstream's recorded answers, and what it does with vectors that upstream cannot."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import cases
from flax_qformer import InputError
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.diffusion.text_encoder import CLIPTextConfig, ContextCLIPTextModel, TextOutput

LABELS = ("quick_gelu", "gelu")
BATCH, VECTORS = 3, 5
BEGIN = np.array([2, 0, 8])


@pytest.fixture(scope="module")
def answers(golden: Any) -> dict[str, Any]:
    return golden("diffusion_text_encoder")


def model_of(answers: dict[str, Any], label: str, **changes: Any) -> ContextCLIPTextModel:
    return ContextCLIPTextModel(CLIPTextConfig.from_dict(json.loads(str(answers[f"{label}/config"])) | changes))


def params_of(model: ContextCLIPTextModel) -> dict[str, Any]:
    """The weights that upstream had, by its names."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    rows = [parameter_at(path, leaf.shape) for path, leaf in flatten_dict(shapes, sep="/").items()]
    weights = {row: cases.weight(row.name, row.torch_shape) for row in rows}
    flat = {row.path: jnp.asarray(weight.transpose(row.order).reshape(row.shape)) for row, weight in weights.items()}
    return unflatten_dict(flat, sep="/")


def vectors_of(model: ContextCLIPTextModel, label: str) -> np.ndarray:
    return cases.draw(f"{label} vectors", (BATCH, VECTORS, model.config.hidden_size))


def encode(model: ContextCLIPTextModel, params: Any, *arguments: Any, **keywords: Any) -> TextOutput:
    return model.apply({"params": params}, *arguments, **keywords)


@pytest.mark.parametrize("label", LABELS)
def test_equals_upstream(answers: dict[str, Any], label: str) -> None:
    model = model_of(answers, label)
    params, ids, vectors = params_of(model), answers[f"{label}/input_ids"], vectors_of(model, label)
    run = jax.jit(lambda *arguments: encode(model, params, *arguments, output_hidden_states=True))
    outputs = {"text": run(ids), "subjects": run(ids, vectors, BEGIN), "one_subject": run(ids, vectors[:1], 2)}
    for case, output in outputs.items():
        for name in ("last_hidden_state", "pooler_output", "hidden_states"):
            value, expected = np.asarray(getattr(output, name)), answers[f"{label}/{case}/{name}"]
            assert value.shape == expected.shape
            np.testing.assert_allclose(value, expected, atol=cases.ROUNDING, rtol=0, err_msg=f"{case} {name}")


@pytest.mark.parametrize("label", LABELS)
def test_gradients_equal_upstream(answers: dict[str, Any], label: str) -> None:
    model = model_of(answers, label)
    ids = answers[f"{label}/input_ids"]

    def loss(params: Any, vectors: jax.Array) -> jax.Array:
        output = encode(model, params, ids, vectors, BEGIN)
        weighted = [
            (value * cases.draw(f"loss {name}", value.shape)).sum()
            for name, value in (
                ("last_hidden_state", output.last_hidden_state),
                ("pooler_output", output.pooler_output),
            )
        ]
        return sum(weighted, jnp.zeros(()))

    params = params_of(model)
    gradients, of_vectors = jax.jit(jax.grad(loss, (0, 1)))(params, vectors_of(model, label))
    flat = flatten_dict(gradients, sep="/")
    rows = [parameter_at(path, value.shape) for path, value in flat.items()]
    by_name = {row.name: row.to_torch(np.asarray(flat[row.path])) for row in rows}
    by_name["ctx_embeddings"] = np.asarray(of_vectors)
    prefix = f"{label}/gradient/"
    expected = {name.removeprefix(prefix): value for name, value in answers.items() if name.startswith(prefix)}
    assert by_name.keys() == expected.keys()
    error, name = cases.gradient_error(by_name, expected)
    assert error < 1e-4, name


@pytest.mark.parametrize("label", LABELS)
def test_pools_the_configs_end_of_text_before_added_words(answers: dict[str, Any], label: str) -> None:
    """transformers' `CLIPTextModel` pools there; upstream's model with vectors takes the highest id."""
    model = model_of(answers, label, eos_token_id=20)
    ids = np.where(np.arange(8) == 4, 20, answers[f"{label}/input_ids"])
    pooled = encode(model, params_of(model), ids).pooler_output
    np.testing.assert_allclose(pooled, answers[f"{label}/added_words/pooler_output"], atol=cases.ROUNDING, rtol=0)


def test_vectors_of_no_length_change_nothing(answers: dict[str, Any]) -> None:
    model = model_of(answers, "gelu")
    params, ids = params_of(model), answers["gelu/input_ids"]
    empty = np.zeros((1, 0, model.config.hidden_size), np.float32)
    with_none, text = encode(model, params, ids, empty, 2), encode(model, params, ids)
    np.testing.assert_array_equal(with_none.last_hidden_state, text.last_hidden_state)


def test_a_word_changes_no_earlier_state(answers: dict[str, Any]) -> None:
    model = model_of(answers, "quick_gelu")
    params, ids, vectors = params_of(model), answers["quick_gelu/input_ids"], vectors_of(model, "quick_gelu")
    changed = ids.copy()
    changed[:, 4] = (ids[:, 4] + 1) % 40
    one, other = (np.asarray(encode(model, params, tokens, vectors, 2).last_hidden_state) for tokens in (ids, changed))
    np.testing.assert_array_equal(one[:, : 4 + VECTORS], other[:, : 4 + VECTORS])
    assert (np.abs(one - other)[:, 4 + VECTORS :].max(axis=(1, 2)) > 1e-3).all()


def test_an_unknown_id_gives_nan_in_its_text_alone(answers: dict[str, Any]) -> None:
    model = model_of(answers, "gelu")
    ids = answers["gelu/input_ids"].copy()
    ids[1, 0] = model.config.vocab_size
    state = np.asarray(encode(model, params_of(model), ids).last_hidden_state)
    assert np.isnan(state[1]).all()
    assert np.isfinite(state[[0, 2]]).all()


def test_bfloat16_keeps_parameters_and_is_close(answers: dict[str, Any]) -> None:
    model = model_of(answers, "quick_gelu")
    half = model.clone(dtype=jnp.bfloat16)
    params, ids, vectors = params_of(model), answers["quick_gelu/input_ids"], vectors_of(model, "quick_gelu")
    output = encode(half, params, ids, vectors, BEGIN)
    assert output.last_hidden_state.dtype == jnp.bfloat16
    expected = answers["quick_gelu/subjects/last_hidden_state"]
    assert 0 < np.abs(np.asarray(output.last_hidden_state, np.float32) - expected).max() < 0.15
    shapes = jax.eval_shape(half.clone(param_dtype=jnp.bfloat16).init, jax.random.key(0), ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


def test_dropout_of_everything_leaves_the_output_bias(answers: dict[str, Any]) -> None:
    model = model_of(answers, "gelu", attention_dropout=1.0, num_hidden_layers=1)
    params, ids = params_of(model), answers["gelu/input_ids"]
    layer = params["text_model"]["encoder"]["layers_0"]["self_attn"]["out_proj"]
    dropped = encode(model, params, ids, deterministic=False, rngs={"dropout": jax.random.key(0)})
    layer["kernel"] = np.zeros_like(layer["kernel"])
    expected = encode(model, params, ids)
    np.testing.assert_allclose(dropped.last_hidden_state, expected.last_hidden_state, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 14), int),), r"14 tokens.* 13 positions"),
        ((np.zeros((2, 10), int), np.zeros((1, 4, 18)), 2), r"14 tokens, with 4 subject vectors.* 13 positions"),
        ((np.zeros((2, 4), int), np.zeros((2, 4, 18))), "give both"),
        ((np.zeros((2, 4), int), None, 2), "give both"),
        ((np.zeros((2, 4), int), np.zeros((3, 4, 18)), 2), r"2 texts take \(2 or 1, vectors, 18\)"),
        ((np.zeros((2, 4), int), np.zeros((2, 4, 16)), 2), r"shape \(2, 4, 16\)"),
        ((np.zeros((2, 4), int), np.zeros((1, 4, 18)), [1, 2, 3]), "`ctx_begin_pos`"),
        ((np.zeros((2, 4), int), np.zeros((1, 4, 18)), 1.5), "`ctx_begin_pos`"),
        ((np.zeros((2, 4), int), np.zeros((1, 4, 18)), [2, -1]), "negative"),
        ((np.zeros(4, int),), r"\(batch, tokens\)"),
        ((np.zeros((2, 4)),), "float32"),
    ],
)
def test_wrong_inputs_are_errors(answers: dict[str, Any], arguments: tuple[Any, ...], message: str) -> None:
    model = model_of(answers, "gelu")
    with pytest.raises(InputError, match=message):
        encode(model, params_of(model), *arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert"},
        {"hidden_size": 770},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 0},
        {"hidden_act": "softsign"},
        {"hidden_act": ["gelu"]},
        {"layer_norm_eps": "small"},
        {"layer_norm_eps": -1.0},
        {"attention_dropout": 2.0},
        {"max_position_embeddings": None},
    ],
)
def test_wrong_configs_are_errors_that_name_the_field(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        CLIPTextConfig.from_dict(fields)


def test_config_reads_what_it_writes_and_what_upstream_writes(answers: dict[str, Any]) -> None:
    upstream = json.loads(str(answers["gelu/config"]))
    config = CLIPTextConfig.from_dict(upstream)
    written = config.to_dict()
    assert written == {name: upstream[name] for name in written}
    assert CLIPTextConfig.from_dict(json.loads(json.dumps(written))) == config
