"""The stage-1 model equals LAVIS's: losses, gradients, features, captions and checkpoints."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import cases
import flax_qformer as fq
from conftest import same
from flax_qformer.convert import export
from flax_qformer.models.captioning import nucleus
from torch_files import torch_save

END = 3
FLOAT32_MIN = np.finfo(np.float32).min


class Case:
    """LAVIS's answers of one geometry, and our model read from its checkpoint."""

    def __init__(self, golden: dict[str, np.ndarray], folder: Path) -> None:
        self.state = self.part(golden, "state/")
        self.inputs, self.outputs = self.part(golden, "inputs/"), self.part(golden, "outputs/")
        self.gradients, self.features = self.part(golden, "gradients/"), self.part(golden, "features/")
        self.captions = self.part(golden, "captions/")
        self.pixels = self.inputs["pixel_values"].transpose(0, 2, 3, 1)
        self.config = json.loads(str(golden["config"]))
        self.file = folder / "stage1.pth"
        torch_save({"model": self.state}, self.file)
        (folder / "config.json").write_text(json.dumps(self.config))
        self.model, self.params = fq.from_pretrained(self.file)
        self.variables = {"params": self.params}

    @staticmethod
    def part(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}

    def losses(self, params: Any) -> fq.PreTrainingOutput:
        """As in training, which reads the images once for all three losses, but without dropout."""
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = dataclasses.replace(
            self.model.config, qformer_config=dataclasses.replace(self.model.config.qformer_config, **none)
        )
        indices = {name: self.inputs[name] for name in ("negative_image_index", "negative_text_index", "image_id")}
        text = (self.inputs["input_ids"], self.inputs["attention_mask"])
        model, rngs = self.model.clone(config=config), {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, self.pixels, *text, **indices, deterministic=False, rngs=rngs)


@pytest.fixture(
    scope="module", params=["frequency_2", *(pytest.param(f"frequency_{n}", marks=pytest.mark.slow) for n in (1, 3))]
)
def case(request: pytest.FixtureRequest, golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(golden(f"pretraining_{request.param}"), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def one(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One geometry, for tests that do not depend on it."""
    return Case(golden("pretraining_frequency_1"), tmp_path_factory.mktemp("one"))


def close(value: Any, expected: np.ndarray, name: str) -> None:
    error = np.abs(np.asarray(value) - expected).max()
    assert error < cases.ROUNDING, (name, error)
    print(f"{name}: {error:.1e}")


def test_losses_and_gradients(case: Case) -> None:
    assert isinstance(case.model, fq.Blip2ForPreTraining)

    def loss(params: Any) -> tuple[jax.Array, fq.PreTrainingOutput]:
        output = case.losses(params)
        return output.loss, output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg", "image_features", "text_features", "itm_logits"):
        close(getattr(output, name), case.outputs[name], name)
    close(output.itg_logits, case.outputs["itg_logits"], "itg_logits")
    # Divided by a temperature of 0.125, so eight times as large.
    close(output.logits_per_image / 8, case.outputs["sim_i2t"] / 8, "logits_per_image")
    close(output.logits_per_text / 8, case.outputs["sim_t2i"] / 8, "logits_per_text")
    ours = export(gradients, case.model.config, "lavis")
    errors = {}
    for name, expected in case.gradients.items():
        # LAVIS has two names for one bias.
        value = ours["Qformer.cls.predictions.decoder.bias" if name == "Qformer.cls.predictions.bias" else name]
        error, norm = np.linalg.norm(value - expected), np.linalg.norm(expected)
        assert error < 1e-4 * norm + 1e-6, (name, error)
        if norm > 1e-2:  # the others are 0 up to rounding
            errors[name] = error / norm
    print(f"gradients: {max(errors.values()):.1e}, {max(errors, key=errors.__getitem__)}; {len(errors)} of {len(ours)}")


def test_negatives_are_drawn_as_lavis_weighs_them(case: Case) -> None:
    """The frequencies of many draws are LAVIS's probabilities."""
    text = (case.inputs["input_ids"], case.inputs["attention_mask"])

    @jax.jit
    def draw(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        image = case.model.apply(case.variables, case.pixels, method="encode_image").last_hidden_state
        about = {"image_id": case.inputs["image_id"], "encoder_hidden_states": image}

        def indices(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = case.model.apply(case.variables, None, *text, **about, rngs={"negatives": key})
            return output.negative_image_index, output.negative_text_index

        return jax.lax.map(indices, keys)

    keys, size = jax.random.split(jax.random.key(0), 2000), len(case.pixels)
    for drawn, name in zip(draw(keys), ("image", "text"), strict=True):
        shares = jax.nn.one_hot(drawn, size).mean(axis=0)
        expected = case.outputs[f"negative_{name}_probabilities"]
        np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / len(keys) ** 0.5)
        assert not (shares[expected == 0]).any()


def test_features_and_match(case: Case) -> None:
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    size, texts = len(case.pixels), len(ids)

    @jax.jit
    def compute(pixels: jax.Array, *text: jax.Array) -> Any:
        states = case.model.apply(case.variables, pixels, method="encode_image").last_hidden_state
        pairs = (np.tile(ids, (size, 1)), np.tile(mask, (size, 1)))
        return (
            case.model.apply(case.variables, encoder_hidden_states=states, method="image_features"),
            case.model.apply(case.variables, *text, method="text_features"),
            case.model.apply(
                case.variables, None, *pairs, encoder_hidden_states=jnp.repeat(states, texts, axis=0), method="match"
            ),
        )

    image, text, match = compute(case.pixels, case.features["input_ids"], case.features["attention_mask"])
    close(image, case.features["image_features"], "image")
    close(text, case.features["text_features"][:, 0], "text")
    close(match.reshape(size, texts), case.features["match"], "match")


def test_captions(case: Case) -> None:
    """The same words, by greedy and by beam search, with limits and penalties."""
    names = {name.split("/")[0] for name in case.captions} - {"nucleus"}
    assert len(names) == 8
    # The search does not depend on the geometry.
    for name in sorted(names)[: None if case.config["qformer_config"]["cross_attention_frequency"] == 2 else 2]:
        recorded = case.part(case.captions, f"{name}/")
        settings = {key: value.item() for key, value in recorded.items() if key not in ("ids", "scores")}

        @jax.jit
        def write(pixels: jax.Array, settings: dict = settings) -> jax.Array:
            return case.model.apply(case.variables, pixels, eos_token_id=END, method="caption", **settings)

        ids = np.asarray(write(case.pixels))
        expected = np.zeros_like(ids)
        expected[:, : recorded["ids"].shape[1]] = recorded["ids"]
        np.testing.assert_array_equal(ids, expected, err_msg=name)


def test_nucleus_keeps_what_transformers_keeps(golden: Any, one: Case) -> None:
    recorded = golden("pretraining_nucleus")
    kept = jax.nn.softmax(nucleus(jnp.asarray(recorded["logits"]), 0.9))
    np.testing.assert_allclose(kept, recorded["probabilities"], atol=1e-6)
    recorded = one.part(one.captions, "nucleus/")
    settings = {"top_p": 0.9, "max_length": recorded["ids"].shape[1], "min_length": recorded["min_length"].item()}

    def write(key: jax.Array) -> jax.Array:
        rules = {"eos_token_id": END, "use_nucleus_sampling": True, **settings}
        return one.model.apply(one.variables, one.pixels, method="caption", rngs={"sampling": key}, **rules)

    drawn = np.asarray(jax.jit(lambda keys: jax.lax.map(write, keys))(jax.random.split(jax.random.key(1), 300)))
    shares = jax.nn.one_hot(drawn[:, :, 1], recorded["probabilities"].shape[-1]).mean(axis=0)
    np.testing.assert_allclose(shares, recorded["probabilities"][:, 0], atol=0.12)


def test_checkpoints_round_trip(case: Case, tmp_path: Path) -> None:
    fq.convert_checkpoint(case.file, tmp_path / "flax")
    fq.export_checkpoint(tmp_path / "flax", tmp_path / "torch")
    again = load_file(tmp_path / "torch" / "model.safetensors")
    assert again.keys() == case.state.keys()
    for name, value in case.state.items():
        assert (again[name].dtype, again[name].shape) == (value.dtype, value.shape), name
        assert again[name].tobytes() == value.tobytes(), name


def test_a_frozen_tower_comes_from_its_own_file(one: Case, tmp_path: Path) -> None:
    """LAVIS saves only trained parameters; the tower that it downloads also has another block and a projection."""
    tower = {name: value for name, value in one.state.items() if name.startswith("visual_encoder.")}
    torch_save({"model": {name: one.state[name] for name in one.state.keys() - tower.keys()}}, tmp_path / "trained.pth")
    (tmp_path / "config.json").write_text(json.dumps(one.config))
    with pytest.raises(fq.InputError, match=r"no vision tower.*put LAVIS's clip_vit_L.pth beside it"):
        fq.from_pretrained(tmp_path / "trained.pth")
    rest = {"proj": np.zeros((4, 4), np.float32), "transformer.resblocks.2.ln_1.weight": np.zeros(4, np.float32)}
    own = {name.removeprefix("visual_encoder."): value for name, value in tower.items()}
    torch_save(own | rest, tmp_path / "clip_vit_L.pth")
    model, params = fq.from_pretrained(tmp_path / "trained.pth")
    assert isinstance(model, fq.Blip2ForPreTraining)
    assert same(params, one.params)


def test_what_a_class_lacks_is_initialised_and_named(
    one: Case, upstream_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, params = fq.from_pretrained(one.file, model_class=fq.Blip2QFormerModel)
    assert caplog.messages == [f"{one.file}: newly initialised: proj_layer: identity"]
    output = jax.jit(model.apply)({"params": params}, one.pixels)
    np.testing.assert_allclose(output.query_embeddings, output.last_hidden_state, rtol=1e-6)
    caplog.clear()
    model, params = fq.from_pretrained(upstream_folder("frequency_1"), model_class=fq.Blip2ForPreTraining)
    heads = dict.fromkeys(("itm_head", "lm_head", "text_proj", "vision_proj"), "randomly initialised")
    assert dict(model.config.newly_initialised) == {"temp": "constant 0.07", **heads}
    assert "itm_head: randomly initialised, lm_head: randomly initialised, temp: constant 0.07" in caplog.text
    assert float(params["temp"]) == pytest.approx(0.07)
    # Later programs see it until training changes the module.
    moved = {"kernel": params["itm_head"]["kernel"], "bias": params["itm_head"]["bias"] + 1e-4}
    fq.save_pretrained(tmp_path / "stage1", model, params | {"itm_head": moved})
    again, same = fq.from_pretrained(tmp_path / "stage1")
    assert isinstance(again, fq.Blip2ForPreTraining)
    assert dict(again.config.newly_initialised).keys() == heads.keys() - {"itm_head"} | {"temp"}
    assert jax.tree.all(jax.tree.map(np.array_equal, params | {"itm_head": moved}, same))


def test_an_export_names_what_it_adds(one: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = fq.export_checkpoint(one.file, tmp_path / "both", layout="diffusers")
    assert f"read {len(jax.tree.leaves(one.params))} tensors" in report
    assert "; newly initialised: proj_layer: identity; wrote" in report
    for model_class in (fq.Blip2ForPreTraining, fq.Blip2QFormerModel, None):
        caplog.clear()
        whole, _ = fq.from_pretrained(tmp_path / "both", model_class=model_class)
        assert caplog.messages == [f"{tmp_path / 'both'}: newly initialised: proj_layer: identity"]
        assert type(whole) is (model_class or fq.Blip2QFormerModel)


def test_cached_keys_and_values_continue_a_text(one: Case) -> None:
    """Two pieces of a text, each seeing the tokens before it, give the same as the text under a causal mask."""
    model, params = fq.from_pretrained(one.file, model_class=fq.Blip2QFormerModel)
    variables, ids = {"params": params}, one.inputs["input_ids"][:, :6]
    batch, num_queries = len(ids), model.config.num_query_tokens

    def causal(before: int, length: int) -> np.ndarray:
        seen = np.tri(length, num_queries + before + length, num_queries + before)
        return np.broadcast_to(seen, (batch, *seen.shape))

    @jax.jit
    def compute() -> tuple[jax.Array, jax.Array]:
        def follow(ids: jax.Array, past: Any, before: int) -> Any:
            mask = causal(before, ids.shape[1])
            return model.apply(variables, None, ids, mask, past_key_values=past, use_cache=True)

        past = model.apply(variables, one.pixels, use_cache=True).past_key_values
        whole, first = follow(ids, past, 0), follow(ids[:, :4], past, 0)
        second = follow(ids[:, 4:], first.past_key_values, 4)
        pieces = jnp.concatenate([first.last_hidden_state, second.last_hidden_state], axis=1)
        return pieces, whole.last_hidden_state

    pieces, whole = compute()
    np.testing.assert_allclose(pieces, whole, atol=1e-5)

    with pytest.raises(fq.InputError, match="`use_cache` is for an image"):
        model.apply(variables, None, ids, use_cache=True)
    past = jax.eval_shape(lambda: model.apply(variables, one.pixels, use_cache=True)).past_key_values
    with pytest.raises(fq.InputError, match=f"{batch} rows of `past_key_values` and 1 texts"):
        jax.eval_shape(lambda past: model.apply(variables, None, ids[:1], past_key_values=past), past)


def test_a_grown_vocabulary_changes_no_logit(one: Case) -> None:
    words = one.model.config.qformer_config.vocab_size
    config, params = fq.resize_token_embeddings(one.model.config, one.params, words + 5, jax.random.key(0))
    indices = {name: one.inputs[name] for name in ("negative_image_index", "negative_text_index")}
    inputs = (one.pixels, one.inputs["input_ids"], one.inputs["attention_mask"])

    @jax.jit
    def logits(variables: Any) -> list[jax.Array]:
        models = (one.model, one.model.clone(config=config))
        outputs = [model.apply(v, *inputs, **indices) for model, v in zip(models, variables, strict=True)]
        return [output.itg_logits[..., :words] for output in outputs]

    before, after = logits((one.variables, {"params": params}))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_texts_are_read_as_if_alone(one: Case) -> None:
    """With queries and captions, also for a text that is all padding."""
    ids, mask = one.inputs["input_ids"], np.array(one.inputs["attention_mask"])
    mask[0] = 0
    indices = {name: one.inputs[name] for name in ("negative_image_index", "negative_text_index")}
    together = jax.jit(one.model.apply)(one.variables, one.pixels, ids, mask, **indices).text_features
    alone = jax.jit(partial(one.model.apply, method="text_features"))(one.variables, ids, mask)
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_parameters_of_the_other_class(one: Case) -> None:
    """Each class names the parts it lacks; calls that need none of these run."""
    ids, index = one.inputs["input_ids"], np.arange(len(one.pixels))
    other = fq.Blip2QFormerModel(one.model.config)
    shapes = jax.eval_shape(other.init, jax.random.key(0), one.pixels, ids)
    heads = {"params": {"proj_layer": shapes["params"]["proj_layer"], **one.params}}

    def shape(model: Any, variables: Any, *arguments: Any, **details: Any) -> Any:
        return jax.eval_shape(partial(model.apply, **details), variables, *arguments)

    with pytest.raises(
        fq.InputError, match="no proj_layer: .* Blip2QFormerModel, perhaps those of Blip2ForPreTraining"
    ):
        shape(other, one.variables, one.pixels, ids)
    for method, arguments in (("__call__", (ids, None, index, index)), ("match", (ids,)), ("image_features", ())):
        with pytest.raises(fq.InputError, match="no .*: .* Blip2ForPreTraining, perhaps those of Blip2QFormerModel"):
            shape(one.model, shapes, one.pixels, *arguments, method=method)
    shape(one.model, heads, one.pixels, ids, None, index, index)
    shape(other, heads, one.pixels, ids)
    shape(other, one.variables, None, ids)
    shape(one.model, shapes, one.pixels, method="encode_image")


def test_the_output_of_the_tower_is_accepted_as_its_states(one: Case) -> None:
    ids, index = one.inputs["input_ids"], np.arange(len(one.pixels))
    whole = jax.eval_shape(partial(one.model.apply, method="encode_image"), one.variables, one.pixels)
    for method, arguments in (
        ("__call__", {"input_ids": ids, "negative_image_index": index, "negative_text_index": index}),
        ("image_features", {}),
        ("match", {"input_ids": ids}),
        ("read", {}),
    ):
        run = partial(one.model.apply, method=method)
        shapes = [
            jax.eval_shape(run, one.variables, encoder_hidden_states=states, **arguments)
            for states in (whole, whole.last_hidden_state)
        ]
        assert shapes[0] == shapes[1]
    write = partial(one.model.apply, method="caption", eos_token_id=3, num_beams=1, max_length=4)
    assert jax.eval_shape(write, one.variables, encoder_hidden_states=whole).shape == (len(index), 4)


def test_inputs_without_pairs(one: Case) -> None:
    ids = one.inputs["input_ids"]
    for arguments, message in (
        ((one.pixels, ids), "negatives are drawn"),
        ((one.pixels,), "losses need pairs"),
        ((one.pixels, ids[:2]), "images and 2 texts"),
        ((one.pixels, ids[:, :0]), "no tokens"),
        ((one.pixels, np.tile(ids, 50)), "positions: truncate the text"),
        ((one.pixels, ids, np.ones_like(ids)[:, 1:]), "`attention_mask` has shape"),
    ):
        with pytest.raises(fq.InputError, match=message):
            jax.eval_shape(one.model.apply, one.variables, *arguments)
