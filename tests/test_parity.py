"""Each module equals upstream's answers, recorded in `golden/` with weights and inputs of `oracle/cases.py`."""

from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import cases
import flax_qformer as fq
from conftest import OPTIMIZED, checkpointing
from flax_qformer.convert import export
from flax_qformer.models.layers import ACTIVATIONS

GEOMETRIES = list(cases.GEOMETRIES)


class Case:
    """A geometry: our model on upstream's weights, its batch, and upstream's answers."""

    def __init__(self, name: str, folder: Any, golden: Any) -> None:
        self.name = name
        self.model, self.params = fq.from_pretrained(folder(name))
        self.batch, self.golden = cases.batch(name), golden(name)
        self.image = self.golden["vision/last_hidden_state"]

    def run(self, model: Any = None, params: Any = None, **inputs: Any) -> fq.QFormerOutput:
        """Run without jit, which would compile for each variant."""
        model, params = model or self.model, params or self.params
        return model.apply({"params": params}, **inputs, rngs={"dropout": jax.random.key(0)})

    def text(self) -> dict[str, np.ndarray]:
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}

    def expect(self, label: str, output: Any) -> None:
        """Compare all answers of a label, and fail if one is missing; `pytest -s` shows the errors."""
        answers = {
            key.removeprefix(f"{label}/"): value for key, value in self.golden.items() if key.startswith(f"{label}/")
        }
        assert answers
        largest = 0.0
        for key, expected in answers.items():
            name, _, index = key.partition("/")
            value = getattr(output, name)
            error = np.abs((value[int(index)] if index else value) - expected).max(initial=0)
            assert error < cases.ROUNDING, (label, key, error)
            largest = max(largest, float(error))
        print(f"{self.name} {label}: {largest:.1e}")


@pytest.fixture(scope="module", params=GEOMETRIES)
def case(request: pytest.FixtureRequest, upstream_folder: Any, golden: Any) -> Case:
    return Case(request.param, upstream_folder, golden)


def test_vision_tower(case: Case) -> None:
    pixels = case.batch["pixel_values"]
    output = case.run(pixel_values=pixels, method="encode_image", output_attentions=True, output_hidden_states=True)
    case.expect("vision", output)
    assert len(output.hidden_states) == case.model.config.vision_config.num_hidden_layers + 1
    alone = fq.Blip2VisionModel(case.model.config.vision_config)
    again = alone.apply({"params": case.params["visual_encoder"]}, pixels)
    np.testing.assert_allclose(again.pooler_output, output.pooler_output, atol=1e-5)
    assert again.attentions is None
    assert again.hidden_states is None


def test_pixels_and_text(case: Case) -> None:
    inputs = {"pixel_values": case.batch["pixel_values"], **case.text()}
    flags = {"output_attentions": True, "output_hidden_states": True}
    compiled = jax.jit(lambda p, i: case.model.apply({"params": p}, **i, **flags), compiler_options=OPTIMIZED)
    output = compiled(case.params, inputs)
    case.expect("multimodal", output)
    qformer = case.model.config.qformer_config
    assert len(output.cross_attentions) == -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
    assert len(output.hidden_states) == qformer.num_hidden_layers + 1


def test_queries_only_and_text_only(case: Case) -> None:
    flags = {"output_attentions": True, "output_hidden_states": True}
    case.expect("queries_only", case.run(encoder_hidden_states=case.image, **flags))
    text_only = case.run(**case.text(), **flags)
    case.expect("text_only", text_only)
    assert text_only.query_embeddings is None
    assert text_only.cross_attentions == ()


def test_masks(case: Case) -> None:
    ids, image, mask = case.batch["input_ids"], case.image, case.batch["attention_mask"]
    case.expect("mask_3d", case.run(encoder_hidden_states=image, input_ids=ids, attention_mask=case.batch["mask_3d"]))
    over_all = np.concatenate([np.ones((len(ids), case.model.config.num_query_tokens), int), mask], axis=1)
    case.expect(
        "multimodal",
        case.run(
            encoder_hidden_states=image,
            input_ids=ids,
            attention_mask=over_all,
            output_attentions=True,
            output_hidden_states=True,
        ),
    )
    for name in ("image_mask", "image_mask_3d"):
        case.expect(name, case.run(encoder_hidden_states=image, **case.text(), encoder_attention_mask=case.batch[name]))
    for name in ("head_mask_1d", "head_mask_2d"):
        case.expect(name, case.run(encoder_hidden_states=image, **case.text(), head_mask=case.batch[name]))
    five = np.broadcast_to(
        case.batch["head_mask_2d"][:, None, :, None, None],
        (*case.batch["head_mask_2d"].shape[:1], len(ids), case.batch["head_mask_2d"].shape[1], 1, 1),
    )
    case.expect("head_mask_2d", case.run(encoder_hidden_states=image, **case.text(), head_mask=five))


def gradients(case: Case, model: fq.Blip2QFormerModel) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """The oracle's loss, and its gradients by upstream's names."""

    def loss(params: Any) -> jax.Array:
        output = model.apply({"params": params}, case.batch["pixel_values"], **case.text())
        return cases.loss(vars(output))

    value, grads = jax.jit(jax.value_and_grad(loss))(case.params)
    return value, export(grads, model.config)


@pytest.mark.parametrize(
    ("geometry", "gradient_checkpointing"),
    [
        ("frequency_2", False),
        ("frequency_3", False),
        *(pytest.param("frequency_1", on, marks=pytest.mark.slow) for on in (False, True)),
    ],
)
def test_gradients(geometry: str, gradient_checkpointing: bool, upstream_folder: Any, golden: Any) -> None:
    case = Case(geometry, upstream_folder, golden)
    loss, grads = gradients(case, fq.Blip2QFormerModel(checkpointing(case.model.config, gradient_checkpointing)))
    np.testing.assert_allclose(loss, case.golden["loss"], rtol=1e-5)
    expected = {
        key.removeprefix("gradients/"): value for key, value in case.golden.items() if key.startswith("gradients/")
    }
    assert expected.keys() == grads.keys() - {"embeddings.position_ids"}
    error, worst = cases.gradient_error({name: grads[name] for name in expected}, expected)
    assert error < 1e-4, worst
    print(f"{geometry} gradients: {error:.1e} relative ({worst})")


def test_dropout_is_wherever_upstream_has_it(case: Case) -> None:
    for label, config in cases.dropouts(case.name).items():
        model = fq.Blip2QFormerModel(fq.Blip2Config.from_dict(config))
        output = case.run(model, pixel_values=case.batch["pixel_values"], **case.text(), deterministic=False)
        case.expect(f"dropout_{label}", output)


@pytest.mark.parametrize("geometry", [pytest.param("frequency_1", marks=pytest.mark.slow), "frequency_2"])
def test_pruned_heads(geometry: str, upstream_folder: Any, golden: Any) -> None:
    case = Case(geometry, upstream_folder, golden)
    heads = cases.PRUNED[geometry]
    # In two steps; the second names a head that is already pruned.
    first = {layer: gone[:1] for layer, gone in heads.items()}
    config, params = fq.prune_heads(case.model.config, case.params, first)
    config, params = fq.prune_heads(config, params, heads)
    flags = {"output_attentions": True, "output_hidden_states": True}
    inputs = {"encoder_hidden_states": case.image, **case.text()}
    case.expect("pruned", case.run(type(case.model)(config), params, **inputs, **flags))
    # A pruned head equals a masked one, except that cross-attention keeps it.
    size = {path: value.size for path, value in flatten_dict(params, sep="/").items()}
    for layer, gone in heads.items():
        all_heads = config.qformer_config.num_attention_heads
        kept = size[f"encoder/layer_{layer}/attention/attention/query/kernel"]
        assert kept == config.qformer_config.hidden_size * config.qformer_config.head_dim * (all_heads - len(gone))
    # In a mask, heads keep their original numbers.
    full_mask = np.ones(config.qformer_config.num_attention_heads, np.float32)
    case.expect("pruned", case.run(type(case.model)(config), params, **inputs, **flags, head_mask=full_mask))


def test_positions_for_images_of_another_size(case: Case, golden: Any) -> None:
    for size in cases.IMAGE_SIZES:
        config, params = fq.interpolate_positions(case.model.config, case.params, size)
        resized = params["visual_encoder"]["embeddings"]["position_embedding"]
        np.testing.assert_allclose(resized, golden("positions")[f"{case.name}/{size}"], atol=cases.ROUNDING, rtol=0)
    output = case.run(type(case.model)(config), params, pixel_values=cases.draw("large", (1, size, size, 3)))
    assert output.query_embeddings.shape == (1, config.num_query_tokens, config.qformer_config.hidden_size)
    with pytest.raises(fq.InputError, match="larger than image_size"):
        fq.interpolate_positions(config, params, 1)


def test_embedded_model_from_strings_and_pictures(golden: Any) -> None:
    from flax_qformer.checkpoints.model_files import DEFAULT_MODEL

    model, params = fq.from_pretrained(DEFAULT_MODEL)
    processor = fq.Processor.from_pretrained(DEFAULT_MODEL)
    images = [cases.image("RGB", 40 + 10 * i, 90) for i in range(len(cases.TEXTS))]
    output = jax.jit(lambda p, b: model.apply({"params": p}, **b))(params, processor(images, list(cases.TEXTS)))
    for key, expected in golden("default").items():
        np.testing.assert_allclose(getattr(output, key.removeprefix("default/")), expected, atol=cases.ROUNDING, rtol=0)


def test_activations(golden: Any) -> None:
    answers = golden("activations")
    x = answers.pop("x")
    assert answers.keys() == ACTIVATIONS.keys()
    for name, expected in answers.items():
        np.testing.assert_allclose(ACTIVATIONS[name](x), expected, atol=2e-6, rtol=1e-6, err_msg=name)
