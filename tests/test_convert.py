"""The converter: tables, accounting, sources, round trips."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import cases
import flax_qformer as fq
from conftest import GOLDEN, same, weights, write_upstream
from flax_qformer.convert import convert, export
from flax_qformer.convert.files import open_tensors
from flax_qformer.convert.tables.qformer import Layout, parameters
from flax_qformer.models.config import BLIP_DIFFUSION
from torch_files import torch_save


@st.composite
def configs(draw: st.DrawFn) -> fq.Blip2Config:
    """Random small models, some with pruned heads."""
    number = st.integers(1, 3)
    heads, image_heads, layers = draw(number), draw(number), draw(st.integers(0, 3))
    patch = draw(number)
    pruned = draw(st.dictionaries(st.integers(0, layers - 1), st.sets(st.integers(0, heads - 1)))) if layers else {}
    return fq.Blip2Config(
        fq.Blip2VisionConfig(
            hidden_size=image_heads * draw(number),
            intermediate_size=draw(number),
            num_hidden_layers=draw(st.integers(0, 2)),
            num_attention_heads=image_heads,
            image_size=patch * draw(number),
            patch_size=patch,
            qkv_bias=draw(st.booleans()),
        ),
        fq.Blip2QFormerConfig(
            vocab_size=draw(number),
            hidden_size=heads * draw(number),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=draw(number),
            max_position_embeddings=draw(number),
            cross_attention_frequency=draw(number),
        ),
        num_query_tokens=draw(number),
        image_text_hidden_size=draw(number),
        pruned_heads=pruned,
    )


LAYOUTS = st.sampled_from(["diffusers", "lavis"])


@given(configs())
@settings(max_examples=8, deadline=None)
def test_tables_name_every_parameter_of_the_modules(config: fq.Blip2Config) -> None:
    size = config.vision_config.image_size
    images, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), int)
    models = [fq.Blip2QFormerModel, fq.Blip2ForPreTraining]
    # Without a layer, a text cannot see its image.
    for model_class in models if config.qformer_config.num_hidden_layers else models[:1]:
        tree = jax.eval_shape(model_class(config).init, jax.random.key(0), images, ids)["params"]
        expected = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
        for layout in ("diffusers", "lavis"):
            rows = list(parameters(config, layout, model_class.parts))
            assert {row.path: row.shape for row in rows} == expected
            assert len({row.name for row in rows}) == len(rows)


@given(configs(), LAYOUTS, st.sampled_from([np.float32, np.float16, jnp.bfloat16]), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_convert_and_export_are_inverse(
    tmp_path: Path, config: fq.Blip2Config, layout: Layout, dtype: Any, prefix: bool
) -> None:
    tensors = {name: value.astype(dtype) for name, value in weights(config, layout).items()}
    in_blip = prefix and layout == "lavis"
    named = {name if name.startswith("proj_layer") or not in_blip else f"blip.{name}": t for name, t in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    params, _ = convert(open_tensors(tmp_path / "model.safetensors"), config)
    again = export(params, config, layout)
    again = {name: value for name, value in again.items() if not name.endswith("position_ids")}
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (again[name].dtype, again[name].shape) == (value.dtype, value.shape)
        assert again[name].tobytes() == value.tobytes()


def test_axes_are_mapped_as_upstream_computes(upstream_folder: Any) -> None:
    """One element of each kind of kernel, located by hand."""
    folder = upstream_folder("frequency_1")
    torch, (_, params) = load_file(folder / "model.safetensors"), fq.from_pretrained(folder)
    flat = flatten_dict(params, sep="/")
    heads, dim = 4, 8
    qkv = torch["visual_encoder.encoder.layers.1.self_attn.qkv.weight"]
    # value (2) of head 3, its 5th number, input 7
    assert (
        flat["visual_encoder/encoder/layers_1/self_attn/qkv/kernel"][7, 2, 3, 5]
        == qkv[2 * heads * dim + 3 * dim + 5, 7]
    )
    out = torch["encoder.layer.2.crossattention.output.dense.weight"]
    assert flat["encoder/layer_2/crossattention/output/dense/kernel"][1, 6, 20] == out[20, 1 * 8 + 6]
    patch = torch["visual_encoder.embeddings.patch_embedding.weight"]
    assert flat["visual_encoder/embeddings/patch_embedding/kernel"][3, 9, 2, 30] == patch[30, 2, 3, 9]


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tensor_is_accounted_for(tmp_path: Path, data: st.DataObject) -> None:
    config, layout = data.draw(configs()), data.draw(LAYOUTS)
    tensors = weights(config, layout)
    # The layout is recognised by the embeddings, so they stay unchanged.
    names = [name for name in tensors if "embeddings" not in name]
    missing = data.draw(st.sets(st.sampled_from(names), max_size=30))
    misshapen = data.draw(st.sets(st.sampled_from(names), max_size=30)) - missing
    unexpected = {f"extra.{i}" for i in range(data.draw(st.integers(0, 30)))}
    damaged = {name: value for name, value in tensors.items() if name not in missing}
    damaged |= {name: np.zeros((*tensors[name].shape, 2), np.float32) for name in misshapen}
    damaged |= {name: np.zeros(1, np.float32) for name in unexpected}
    save_file(damaged, tmp_path / "model.safetensors")
    if not (missing or misshapen or unexpected):
        convert(open_tensors(tmp_path / "model.safetensors"), config)
        return
    with pytest.raises(fq.InputError) as caught:
        convert(open_tensors(tmp_path / "model.safetensors"), config)
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen}
    for kind, expected in kinds.items():
        assert (f"{len(expected)} {kind}: " in str(caught.value)) == bool(expected)
        if len(expected) <= 20:
            assert all(name in str(caught.value) for name in expected)
        else:
            assert f"and {len(expected) - 20} more" in str(caught.value)


def test_omitted_tensors_are_counted_and_no_parameter_is_filled_twice(tmp_path: Path) -> None:
    config = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_1"])
    lavis = weights(config, "lavis")
    extra = (
        "unet.conv_in.weight",
        "text_encoder.a",
        "vae.b",
        "ctx_embeddings_cache",
        "Qformer.bert.embeddings.position_ids",
    )
    left_out = {name: np.zeros(2, np.float32) for name in extra}
    save_file({**lavis, **left_out}, tmp_path / "lavis.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    report = fq.convert_checkpoint(tmp_path / "lavis.safetensors", tmp_path / "flax")
    assert f"read {len(lavis)} tensors" in report
    kinds = "ctx_embeddings_cache, position_ids, text_encoder, unet, vae"
    assert f"{len(extra)} tensors left out by rule ({kinds})" in report
    save_file({**lavis, "blip.query_tokens": lavis["query_tokens"]}, tmp_path / "lavis.safetensors")
    with pytest.raises(fq.InputError, match=r"filled twice, by blip\.query_tokens, query_tokens"):
        fq.from_pretrained(tmp_path / "lavis.safetensors")


def test_every_source_gives_the_same_model(tmp_path: Path) -> None:
    config = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_3"])
    text, tensors, lavis = json.dumps(config.to_dict()), weights(config), weights(config, "lavis")
    write_upstream(tmp_path / "folder", config)
    _, params = fq.from_pretrained(tmp_path / "folder")

    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "BlipDiffusionPipeline"}')
    write_upstream(pipeline / "qformer", config)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text(text)
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(text)
    (pickled / "pytorch_model.bin").write_bytes((GOLDEN / "torch" / "state_dict.bin").read_bytes())
    in_blip = {name if name.startswith("proj_layer") else f"blip.{name}": value for name, value in lavis.items()}
    torch_save({"model": in_blip, "epoch": 3}, pickled / "lavis.pth")
    bare = tmp_path / "bare"
    bare.mkdir()
    torch_save(lavis, bare / "lavis.pt")
    lavis_folder = tmp_path / "lavis"
    for folder in ("blip_model", "proj_layer"):
        (lavis_folder / folder).mkdir(parents=True)
    (lavis_folder / "config.json").write_text(text)
    is_proj = {name: name.startswith("proj_layer.") for name in lavis}
    torch_save({n: t for n, t in lavis.items() if not is_proj[n]}, lavis_folder / "blip_model" / "blip_weight.pt")
    proj = {n.removeprefix("proj_layer."): t for n, t in lavis.items() if is_proj[n]}
    torch_save(proj, lavis_folder / "proj_layer" / "proj_weight.pt")
    fq.convert_checkpoint(tmp_path / "folder", tmp_path / "flax")

    for source in (
        pipeline,
        pipeline / "qformer",
        pipeline / "qformer" / "model.safetensors",
        sharded,
        sharded / "model.safetensors.index.json",
        pickled,
        pickled / "lavis.pth",
        lavis_folder,
        tmp_path / "flax",
    ):
        model, loaded = fq.from_pretrained(source)
        assert model.config == config, source
        assert same(params, loaded), source
    assert same(params, fq.from_pretrained(bare / "lavis.pt", config=tmp_path / "folder" / "config.json")[1])
    with pytest.raises(fq.InputError, match="published geometry is assumed"):
        fq.from_pretrained(bare / "lavis.pt")
    with pytest.raises(fq.InputError, match="no config.json"):
        (sharded / "config.json").unlink()
        fq.from_pretrained(sharded)


def test_published_geometry() -> None:
    """494 million parameters; LAVIS's tower has PyTorch's eps."""
    assert sum(math.prod(p.shape) for p in parameters(BLIP_DIFFUSION, "lavis")) == 493_983_744
    assert BLIP_DIFFUSION.vision_config.layer_norm_eps == 1e-5
    assert BLIP_DIFFUSION.vision_config.num_positions == 257


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_round_trip_through_the_disk_keeps_every_byte(tmp_path: Path, dtype: str) -> None:
    config = dataclasses.replace(fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_2"]), pruned_heads={1: [2]})
    write_upstream(tmp_path / "torch", config)
    tensors = {name: value.astype(jnp.dtype(dtype)) for name, value in weights(config).items()}
    tensors["embeddings.position_ids"] = np.arange(config.qformer_config.max_position_embeddings)[None]
    save_file(tensors, tmp_path / "torch" / "model.safetensors")
    fq.convert_checkpoint(tmp_path / "torch", tmp_path / "flax")
    fq.export_checkpoint(tmp_path / "flax", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        assert again[name].dtype == value.dtype
        assert again[name].tobytes() == value.tobytes()
    assert fq.Blip2Config.from_json(tmp_path / "again" / "config.json") == config
    _, params = fq.from_pretrained(tmp_path / "flax", param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    fq.convert_checkpoint(tmp_path / "flax", tmp_path / "cast", dtype="float32")
    assert same(params, fq.from_pretrained(tmp_path / "cast")[1])


def test_invalid_dtypes_and_values(tmp_path: Path) -> None:
    config = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_3"])
    write_upstream(tmp_path, config)
    tensors = weights(config)

    def load(changed: dict[str, np.ndarray], **options: Any) -> Any:
        save_file({**tensors, **changed}, tmp_path / "model.safetensors")
        return fq.from_pretrained(tmp_path, **options)[1]

    double = {"query_tokens": tensors["query_tokens"].astype(np.float64)}
    with pytest.raises(fq.InputError, match=r"float64.*query_tokens.*`convert_checkpoint\(..., dtype='float32'\)`"):
        load(double)
    assert load(double, param_dtype="float32")["query_tokens"].dtype == jnp.float32
    with pytest.raises(fq.InputError, match="not floating point: query_tokens int8"):
        load({"query_tokens": tensors["query_tokens"].astype(np.int8)})
    for value in (np.nan, np.inf, -np.inf):
        damaged = np.array(tensors["encoder.layer.1.output.dense.weight"])
        damaged[3, 1] = value
        for dtype in (np.float32, np.float16, jnp.bfloat16):
            with pytest.raises(
                fq.InputError, match=r"in 1 tensors \(encoder.layer.1.output.dense.weight\).*allow_non_finite=True"
            ):
                load({"encoder.layer.1.output.dense.weight": damaged.astype(dtype)})
    kernel = load({"encoder.layer.1.output.dense.weight": damaged}, allow_non_finite=True)["encoder"]["layer_1"][
        "output"
    ]
    assert kernel["dense"]["kernel"][1, 3] == -np.inf


def test_a_cast_that_overflows(tmp_path: Path) -> None:
    config = fq.Blip2Config.from_dict(cases.GEOMETRIES["frequency_3"])
    write_upstream(tmp_path / "torch", config)
    for value, fits in ((-65504, True), (-65536, False)):
        large = {"query_tokens": np.full_like(weights(config)["query_tokens"], value)}
        save_file({**weights(config), **large}, tmp_path / "torch" / "model.safetensors")
        fq.convert_checkpoint(tmp_path / "torch", tmp_path / "flax", overwrite=True)
        for source in (tmp_path / "torch", tmp_path / "flax"):
            if fits:
                assert fq.from_pretrained(source, param_dtype="float16")[1]["query_tokens"].min() == value
            else:
                with pytest.raises(fq.InputError, match=r"in 1 tensors as float16 \(query_tokens\)"):
                    fq.convert_checkpoint(source, tmp_path / "half", dtype="float16")
                assert not (tmp_path / "half").exists()
                params = fq.from_pretrained(source, param_dtype="float16", allow_non_finite=True)[1]
                assert params["query_tokens"].max() == -np.inf


def test_real_files_of_pytorch() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    for name in ("training.pth", "protocol_4.pt"):
        views = {key: tensor.view() for key, tensor in open_tensors(GOLDEN / "torch" / name).items()}
        np.testing.assert_array_equal(views.pop("shares_storage"), whole[1:3, 2:])
        np.testing.assert_array_equal(views.pop("transposed"), whole.T)
        np.testing.assert_array_equal(views.pop("parameter"), whole * 2)
        np.testing.assert_array_equal(views.pop("whole"), whole)
        np.testing.assert_array_equal(views.pop("bool"), [True, False])
        assert views.pop("scalar") == 3.5
        assert views.pop("empty").shape == (0, 3)
        assert len(views) == 8
        for key, value in views.items():
            dtype = jnp.dtype(key.removeprefix("torch."))
            assert value.dtype == dtype
            np.testing.assert_allclose(
                value.astype(np.float64), np.trunc(whole / 3) if "int" in key else whole / 3, rtol=1e-2
            )
