"""All functions under JAX's transformations and dtypes; memory, dropout and errors of the modules."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

import cases
import flax_qformer as fq
from conftest import checkpointing, write_upstream
from flax_qformer.models import attention, inputs, kernels, layers
from flax_qformer.models.pretraining import Blip2ForPreTraining

CONFIG = fq.Blip2Config.from_dict(
    {
        "vision_config": {**cases.GEOMETRIES["frequency_1"]["vision_config"], "num_hidden_layers": 1},
        "qformer_config": {**cases.GEOMETRIES["frequency_1"]["qformer_config"], "num_hidden_layers": 1},
        "num_query_tokens": 3,
    }
)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    write_upstream(folder, CONFIG)
    return fq.from_pretrained(folder)[1]


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    ids = np.array([[2, 9, 8, 3], [2, 7, 3, 0], [2, 30, 3, 0], [2, 3, 0, 0]], np.int32)
    images = cases.draw("pixels", (4, 28, 28, 3))
    return {"pixel_values": images, "input_ids": ids, "attention_mask": (ids > 0).astype(np.int32)}


def apply(dtype: Any = jnp.float32, **flags: Any) -> Any:
    model = fq.Blip2QFormerModel(CONFIG, dtype=dtype)
    return lambda params, batch: model.apply({"params": params}, **batch, **flags)


@pytest.fixture(scope="module")
def exact(params: Any, batch: Any) -> jax.Array:
    return jax.jit(apply())(params, batch).query_embeddings


def half_each(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.reshape(2, 2, *value.shape[1:]) for name, value in batch.items()}


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (jnp.float32, jnp.float16))]
)
def test_jit_vmap_pmap_and_grad_in_every_dtype(dtype: Any, params: Any, batch: Any, exact: jax.Array) -> None:
    function = apply(dtype)
    tolerance = {jnp.float32: 2e-6, jnp.bfloat16: 4e-2, jnp.float16: 5e-3}[dtype] * float(jnp.abs(exact).max())

    def check(embeddings: jax.Array) -> None:
        assert embeddings.dtype == dtype
        np.testing.assert_allclose(embeddings.reshape(exact.shape).astype(jnp.float32), exact, atol=tolerance)

    grads, output = jax.jit(jax.grad(loss_of(function), has_aux=True))(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype(dtype)}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    check(output.query_embeddings)
    vmapped = jax.jit(jax.vmap(function, in_axes=(None, 0)))
    check(vmapped(params, half_each(batch)).query_embeddings)
    check(jax.pmap(function, in_axes=(None, 0))(params, half_each(batch)).query_embeddings)


def loss_of(function: Any) -> Any:
    def loss(params: Any, batch: Any) -> tuple[jax.Array, fq.QFormerOutput]:
        output = function(params, batch)
        return (output.query_embeddings.astype(jnp.float32) ** 2).mean(), output

    return loss


def test_gradients_average_over_devices(params: Any, batch: Any) -> None:
    grad = jax.grad(loss_of(apply()), has_aux=True)

    def data_parallel(params: Any, batch: Any) -> Any:
        return jax.lax.pmean(grad(params, batch)[0], "devices")

    whole, _ = jax.jit(grad)(params, batch)
    averaged = jax.pmap(data_parallel, "devices", in_axes=(None, 0))(params, half_each(batch))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(averaged), strict=True):
        np.testing.assert_allclose(one, other[0], atol=largest * 1e-5)


def test_parameters_keep_their_dtype(batch: Any) -> None:
    model = fq.Blip2QFormerModel(CONFIG, dtype=jnp.float32, param_dtype=jnp.bfloat16)
    tree = jax.eval_shape(model.init, jax.random.key(0), **batch)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [fq.Blip2QFormerModel, Blip2ForPreTraining])
def test_gradient_checkpointing_changes_nothing_with_dropout(model_class: Any, batch: Any) -> None:
    """Both runs drop the same elements, also if a layer is called several times."""
    params = jax.jit(model_class(CONFIG).init)(jax.random.key(0), **batch)["params"]

    def value_and_grad(on: bool) -> Any:
        config = checkpointing(CONFIG, on)
        config = dataclasses.replace(
            config, vision_config=dataclasses.replace(config.vision_config, attention_dropout=0.2)
        )

        def loss(params: Any) -> tuple[jax.Array, Any]:
            rngs = {"dropout": jax.random.key(3), "negatives": jax.random.key(4)}
            output = model_class(config).apply({"params": params}, **batch, deterministic=False, rngs=rngs)
            return jnp.atleast_1d(jax.tree.leaves(output)[0])[..., 0].sum(), output

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert jax.tree.all(jax.tree.map(partial(np.allclose, rtol=1e-4, atol=1e-5), *map(value_and_grad, (True, False))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("images", [1, 3])
def test_attention_to_some_images_at_a_time(images: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"q": (10, 5, 3, 4), "k": (10, 7, 3, 4), "v": (10, 7, 3, 4)}
    query, key, value = (jnp.asarray(cases.draw(name, shape), dtype) for name, shape in shapes.items())

    def context_and_gradients(in_loop: bool) -> Any:
        attended = jax.jit(lambda *arrays: attention.dot_product_attention(*arrays)[0])
        assert ("while" in attended.lower(query, key, value).as_text()) == in_loop
        context, pull = jax.vjp(attended, query, key, value)
        return context, *pull(jnp.cos(context))

    whole = context_and_gradients(in_loop=False)
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", images * 3 * 5 * 7)
    rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}
    for part, expected in zip(context_and_gradients(in_loop=True), whole, strict=True):
        np.testing.assert_allclose(part.astype(np.float32), expected.astype(np.float32), **rounding)


def test_attention_of_many_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the scores of one image exceed those at once, here 4 of 10 queries."""
    shapes = {"q": (3, 10, 3, 4), "k": (3, 7, 3, 4), "v": (3, 7, 3, 4)}
    arrays = [jnp.asarray(cases.draw(name, shape)) for name, shape in shapes.items()]

    def context_and_gradients() -> Any:
        context, pull = jax.vjp(jax.jit(lambda *arrays: attention.dot_product_attention(*arrays)[0]), *arrays)
        return context, *pull(jnp.cos(context))

    whole = context_and_gradients()
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", 4 * 3 * 7)
    for part, expected in zip(context_and_gradients(), whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(130, 200, 160), pytest.param(256, 256, 40, marks=pytest.mark.slow)]
)
def test_flash_kernel_of_a_tpu(queries: int, keys: int, width: int) -> None:
    """In the interpreter: widths and lengths that are no multiples of the lanes are padded without a trace."""
    shapes = {"q": (2, queries, 2, width), "k": (2, keys, 2, width), "v": (2, keys, 2, width)}
    query, *rest = (jnp.asarray(cases.draw(name, shape)) for name, shape in shapes.items())
    arrays = [query / width**0.5, *rest]

    def context_and_gradients(form: Any) -> Any:
        context, pull = jax.vjp(form, *arrays)
        return context, *pull(jnp.cos(context))

    plain = context_and_gradients(lambda *arrays: attention.dot_product_attention(*arrays)[0])
    with pltpu.force_tpu_interpret_mode():
        for part, expected in zip(context_and_gradients(kernels._flash), plain, strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_saves_memory() -> None:
    """From the compiled program: the activations of several layers, large against the parameters.

    XLA's CPU compiler drops the barriers of `jax.checkpoint`, so only a loop over the layers saves memory there.
    """

    def temporary_bytes(on: bool) -> int:
        config = checkpointing(CONFIG, on, num_hidden_layers=4).scanned()
        config = dataclasses.replace(config, vision_config=dataclasses.replace(config.vision_config, image_size=140))
        model = fq.Blip2QFormerModel(config)
        images, ids = jnp.zeros((8, 140, 140, 3)), jnp.zeros((8, 16), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), images, ids)["params"]

        def loss(params: Any) -> jax.Array:
            return model.apply({"params": params}, images, ids).query_embeddings.sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(True) < 0.6 * temporary_bytes(False)


def test_forward_mode_derivatives_through_gradient_checkpointing(params: Any, batch: Any) -> None:
    def derivative(on: bool) -> jax.Array:
        model = fq.Blip2QFormerModel(checkpointing(CONFIG, on))
        call = jax.jit(lambda params: model.apply({"params": params}, **batch).query_embeddings)
        return jax.jvp(call, (params,), (params,))[1]

    np.testing.assert_allclose(derivative(True), derivative(False), rtol=1e-4, atol=1e-5)


def test_layer_norm_keeps_nothing_of_float32() -> None:
    x, layer = jnp.ones((2, 5, 16), jnp.bfloat16), layers.LayerNorm(1e-12, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    kept = jax.tree.leaves(jax.vjp(layer.apply, params, x)[1])
    assert [leaf.dtype for leaf in kept if jnp.size(leaf) >= x.size] == [x.dtype]


def test_a_gradient_of_the_queries_skips_the_last_text_layer(params: Any, batch: Any) -> None:
    model = fq.Blip2QFormerModel(CONFIG)

    def operations(last: Callable[[fq.QFormerOutput], Any]) -> float:
        gradient = jax.grad(lambda params: last(model.apply({"params": params}, **batch, method="read")).sum())
        return jax.jit(gradient).lower(params).compile().cost_analysis()["flops"]

    # A text's two matrix products in the feed-forward, forward and backward, with gradients of both.
    c, tokens = CONFIG.qformer_config, batch["input_ids"].size
    text = 3 * 2 * 2 * tokens * c.hidden_size * c.intermediate_size
    whole = operations(lambda output: output.last_hidden_state[:, : CONFIG.num_query_tokens])
    assert whole - operations(lambda output: output.query_embeddings) > text


@pytest.mark.slow
def test_dropout_does_not_depend_on_what_ran_before(batch: Any) -> None:
    rngs = {"dropout": jax.random.key(1), "negatives": jax.random.key(2)}

    def lowered(model_class: Any) -> str:
        model = model_class(CONFIG)
        params = jax.eval_shape(model.init, jax.random.key(0), **batch)["params"]
        call = partial(model.apply, **batch, deterministic=False, rngs=rngs)
        return jax.jit(lambda params: call({"params": params})).lower(params).as_text()

    programs = set()
    for _ in range(8):
        lowered(fq.Blip2QFormerModel)
        jax.clear_caches()  # so that its classes are freed, and their memory is reused
        programs.add(lowered(Blip2ForPreTraining))
        jax.clear_caches()
    assert len(programs) == 1


def test_dropout_needs_a_rng_and_follows_it(params: Any, batch: Any) -> None:
    model = fq.Blip2QFormerModel(CONFIG)

    def apart(seed: int) -> fq.QFormerOutput:
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, **batch, deterministic=False, rngs=rngs)

    function = jax.jit(apart)
    first, again, other = function(0), function(0), function(1)
    np.testing.assert_array_equal(first.query_embeddings, again.query_embeddings)
    np.testing.assert_allclose(first.query_embeddings, apart(0).query_embeddings, atol=2e-6)
    assert not np.allclose(first.query_embeddings, other.query_embeddings, atol=1e-3)
    # The last dropout, before the residual of proj_layer: a tenth of the results are the residual alone.
    kept = first.last_hidden_state[:, : CONFIG.num_query_tokens]
    assert 0.03 < float((first.query_embeddings == kept).mean()) < 0.2
    with pytest.raises(Exception, match="dropout"):
        apply(deterministic=False)(params, batch)


def test_padding_token_is_not_trained(params: Any, batch: Any) -> None:
    grads = jax.jit(jax.grad(lambda p: apply()(p, batch).last_hidden_state[..., 0].sum()))(params)
    rows = jnp.abs(fq.get_input_embeddings(grads)).max(axis=1)
    assert rows[0] == 0
    assert rows[9] > 0


def test_padding_changes_nothing(params: Any, batch: Any, exact: jax.Array) -> None:
    longer = {name: np.pad(value, ((0, 0), (0, 5))) for name, value in batch.items() if name != "pixel_values"}
    padded = jax.jit(apply())(params, {**longer, "pixel_values": batch["pixel_values"]}).query_embeddings
    np.testing.assert_allclose(padded, exact, atol=2e-6)


def test_nnx_takes_the_model(params: Any, batch: Any, exact: jax.Array) -> None:
    @jax.jit
    def run(params: Any, batch: Any) -> jax.Array:
        model = nnx.bridge.ToNNX(fq.Blip2QFormerModel(CONFIG), rngs=nnx.Rngs(0)).lazy_init(**batch)
        own = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
        nnx.update(model, params)
        return model(**batch).query_embeddings

    np.testing.assert_allclose(run(params, batch), exact, atol=2e-6)


def test_embeddings_are_read_replaced_and_grown(params: Any, batch: Any) -> None:
    config, grown = fq.resize_token_embeddings(CONFIG, params, 60, jax.random.key(1))
    assert config.qformer_config.vocab_size == 60
    table = fq.get_input_embeddings(grown)
    np.testing.assert_array_equal(table[:50], fq.get_input_embeddings(params))
    assert 0 < float(jnp.abs(table[50:]).max()) < 1
    model = fq.Blip2QFormerModel(config)
    new_words = {**batch, "input_ids": np.where(batch["input_ids"] == 30, 59, batch["input_ids"])}
    outputs = [model.apply({"params": p}, **b).last_hidden_state for p, b in ((grown, batch), (grown, new_words))]
    assert not np.allclose(outputs[0][2], outputs[1][2])
    np.testing.assert_allclose(outputs[0][3], outputs[1][3], atol=1e-6)
    config, replaced = fq.set_input_embeddings(config, grown, table[:10] * 2)
    assert (config.qformer_config.vocab_size, fq.get_input_embeddings(replaced).shape) == (10, (10, 24))
    with pytest.raises(fq.InputError, match="width|takes"):
        fq.set_input_embeddings(config, grown, table[:, :5])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "nothing to read"),
        ({"pixel_values": jnp.zeros((1, 3, 28, 28))}, "channels last"),
        ({"pixel_values": jnp.zeros((1, 56, 56, 3))}, "takes .batch, 28, 28, 3."),
        ({"pixel_values": jnp.zeros((1, 28, 28, 3)), "encoder_hidden_states": jnp.zeros((1, 5, 32))}, "not both"),
        ({"encoder_hidden_states": jnp.zeros((1, 5, 31))}, "image tokens, 32"),
        ({"pixel_values": np.zeros((1, 28, 28, 3), np.uint8)}, "uint8.*`Processor`"),
        ({"input_ids": "dog"}, "`input_ids` is no array of numbers.*`Processor`"),
        ({"input_ids": [[1, 2], [3]]}, "`input_ids` is no array of numbers"),
        ({"input_ids": jnp.zeros((1, 4))}, "whole numbers"),
        ({"input_ids": jnp.zeros((1, 0), int)}, "no tokens"),
        ({"input_ids": jnp.zeros((1, 25), int)}, "25 tokens, the model 24 positions"),
        ({"input_ids": jnp.zeros((2, 4), int), "pixel_values": jnp.zeros((3, 28, 28, 3))}, "3 images and 2 texts"),
        ({"input_ids": jnp.zeros((1, 4), int), "attention_mask": jnp.ones((1, 5))}, r"must be \(1, 4\)"),
        ({"input_ids": jnp.zeros((1, 4), int), "head_mask": jnp.ones((2, 3, 4))}, "`head_mask` has shape"),
        (
            {"encoder_hidden_states": jnp.zeros((1, 5, 32)), "encoder_attention_mask": jnp.ones(5)},
            "encoder_attention_mask",
        ),
    ],
)
def test_inputs_that_do_not_fit(params: Any, batch: Any, message: str) -> None:
    with pytest.raises(fq.InputError, match=message):
        apply()(params, batch)


def test_raw_pixels(params: Any) -> None:
    raw = np.full((1, 28, 28, 3), 255, np.float32)
    run = partial(fq.Blip2QFormerModel(CONFIG).apply, method="encode_image")
    inputs._warn_of_raw_pixels.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(run, {"params": params}, raw)
        inputs.check_pixels(jnp.full_like(raw, 19))
        assert not caught
        run({"params": params}, raw)
        run({"params": params}, raw)
    assert [str(warning.message) for warning in caught] == [
        "`pixel_values` lie beyond 20, but normalised pixels lie within 3 of zero; let `Processor` make them"
    ]
    with pytest.raises(fq.InputError, match="uint8"):
        jax.eval_shape(run, {"params": params}, raw.astype(np.uint8))


def test_ids_outside_the_vocabulary_give_nan(params: Any) -> None:
    states = apply()(params, {"input_ids": [[2, 9, -1], [2, 50, 3]]}).last_hidden_state
    assert jnp.isnan(states).all()
    lists = {"input_ids": [[2, 9, 3]], "attention_mask": [[1, 1, 0]], "head_mask": [1, 0, 1]}
    arrays = {name: np.array(value) for name, value in lists.items()}
    np.testing.assert_array_equal(*(apply()(params, batch).last_hidden_state for batch in (lists, arrays)))


def test_numbers_of_numpy_and_plain_mappings(params: Any, tmp_path: Any) -> None:
    pruned, _ = fq.prune_heads(CONFIG, params, {np.int64(0): np.array([1])})
    assert pruned == fq.prune_heads(CONFIG, params, {0: [1]})[0]
    assert fq.Blip2QFormerConfig(vocab_size=np.int32(9), layer_norm_eps=np.float64(1e-6)).to_dict()["vocab_size"] == 9
    values = CONFIG.to_dict()
    parts = {name: values[name] for name in ("vision_config", "qformer_config", "num_query_tokens")}
    assert fq.Blip2Config(**parts) == CONFIG
    write_upstream(tmp_path, CONFIG)
    assert fq.from_pretrained(tmp_path, config=parts)[0].config == CONFIG
    with pytest.raises(fq.InputError, match="no vision_config"):
        fq.from_pretrained(tmp_path, config={})
    with pytest.raises(fq.InputError, match='tree below "params"'):
        fq.prune_heads(CONFIG, {"params": params}, {0: [1]})
    for size in (0, -5):
        with pytest.raises(fq.InputError, match=f"`vocab_size` is {size}"):
            fq.resize_token_embeddings(CONFIG, params, size, jax.random.key(0))


def test_missing_heads(params: Any) -> None:
    for heads, message in (
        ({1: [0]}, "layers 0 to 0"),
        ({0: [3]}, "heads are 0 to 2"),
        ({0: [-1]}, "heads are 0 to 2"),
    ):
        with pytest.raises(fq.InputError, match=message):
            fq.prune_heads(CONFIG, params, heads)
