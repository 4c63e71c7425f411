"""A drawing pipeline on disk: upstream's folders, converted ones, LAVIS's, and each part alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import fake_hub
import flax_qformer as fq
import tiny_pipeline
from conftest import same
from flax_qformer.checkpoints import pipelines
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL, DEFAULT_PIPELINE
from flax_qformer.checkpoints.parts import DRAWING_PARTS, LoadedPart, part_config, part_rows
from flax_qformer.checkpoints.pipeline_writing import save_pipeline
from flax_qformer.checkpoints.pipelines import load_component, load_pipeline_parts
from flax_qformer.convert.files import open_tensors
from flax_qformer.convert.tables.qformer import PARTS as QFORMER_PARTS
from flax_qformer.convert.tables.qformer import parameters
from flax_qformer.convert.tables.vae import old_name
from flax_qformer.diffusion.controlnet import ControlNetConfig
from torch_files import torch_save

WIDTH = 64
CONTROLNET = {
    "_class_name": "ControlNetModel",
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "conditioning_embedding_out_channels": [4, 4],
}
PARTS = ("unet", "vae", "text_encoder")


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder with one checkpoint."""
    (path,) = [file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")]
    return {name: np.array(tensor.view()) for name, tensor in open_tensors(path).items()}


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def write_controlnet(folder: Path, seed: int = 0) -> None:
    write_json(folder / "config.json", CONTROLNET)
    config = ControlNetConfig.from_dict(CONTROLNET)
    params = tiny_pipeline.random_params(DRAWING_PARTS["controlnet"], config, seed)
    tensors = LoadedPart(DRAWING_PARTS["controlnet"], CONTROLNET, config, params).tensors()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pipeline with its Q-Former, as upstream's `save_pretrained` writes it now."""
    folder = tmp_path_factory.mktemp("modern") / "pipeline"
    shutil.copytree(DEFAULT_PIPELINE, folder)
    shutil.copytree(DEFAULT_MODEL, folder / "qformer", ignore=lambda *_: ["pipeline"])
    return folder


@pytest.fixture(scope="session")
def published(modern: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as pickles, with the oddities of the published folders."""
    folder = tmp_path_factory.mktemp("published") / "pipeline"
    for name in PARTS:
        tensors = tensors_in(modern / name)
        if name == "vae":
            tensors = {old_name(key): value for key, value in tensors.items()}
        (folder / name).mkdir(parents=True)
        shutil.copy(modern / name / "config.json", folder / name)
        file = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch_save(tensors, folder / name / file)
    for name in ("config.json", "vocab.txt"):
        (folder / "qformer").mkdir(exist_ok=True)
        shutil.copy(modern / "qformer" / name, folder / "qformer")
    torch_save(tensors_in(modern / "qformer"), folder / "qformer" / "pytorch_model.bin")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer").mkdir(exist_ok=True)
        shutil.copy(modern / "tokenizer" / name, folder / "tokenizer")
    shutil.copytree(modern / "scheduler", folder / "scheduler")
    (folder / "image_processor").mkdir()
    shutil.copy(modern / "qformer" / "preprocessor_config.json", folder / "image_processor")
    write_controlnet(folder / "controlnet")
    (folder / "vision_encoder").mkdir()
    (folder / "vision_encoder" / "pytorch_model.bin").write_bytes(b"left over")
    source = "src.diffusers.pipelines.blip_diffusion.modeling_ctx_clip"
    write_json(
        folder / "model_index.json",
        json.loads((modern / "model_index.json").read_text())
        | {
            "text_encoder": [source, "CtxCLIPTextModel"],
            "unet": ["blip_diffusion", "UNet2DConditionModel"],
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    return folder


@pytest.fixture(scope="session")
def converted(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    done = fq.convert_checkpoint(published, folder)
    assert "controlnet" in done
    return folder


@pytest.fixture
def copied(modern: Path, tmp_path: Path) -> Path:
    """A copy of the modern folder, to be changed."""
    return Path(shutil.copytree(modern, tmp_path / "copied"))


def test_a_published_folder_converted_and_exported(published: Path, converted: Path, tmp_path: Path) -> None:
    fq.export_checkpoint(converted, tmp_path / "back")
    for name in (*PARTS, "qformer", "controlnet"):
        before, after = tensors_in(published / name), tensors_in(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert (value.dtype, value.shape) == (after[key].dtype, after[key].shape)
            assert value.tobytes() == after[key].tobytes()
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors_in(tmp_path / "back" / "vae")
    assert tensors_in(tmp_path / "back" / "text_encoder")["text_model.embeddings.position_ids"].dtype == np.int64
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((published / name).read_text())
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "image_processor/preprocessor_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (published / name).read_bytes()


def test_the_same_parts_from_every_kind_of_folder(modern: Path, published: Path, converted: Path) -> None:
    loaded = [load_pipeline_parts(folder) for folder in (modern, published, converted)]
    for parts in loaded:
        assert set(parts.components) == {*PARTS, "qformer"}
        assert same(parts.params, loaded[0].params)
        assert parts.ctx_begin_pos == 2
        assert type(parts.scheduler) is fq.PNDMScheduler
        assert parts.tokenizer("a red circle")["input_ids"] == loaded[0].tokenizer("a red circle")["input_ids"]
    assert loaded[1].processor.image_processor.image_mean == (0.48145466, 0.4578275, 0.40821073)
    tensors = tensors_in(modern / "unet")
    unet = loaded[1].params["unet"]
    np.testing.assert_array_equal(
        unet["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]["kernel"].reshape(48, 48),
        tensors["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"].T,
    )
    np.testing.assert_array_equal(unet["conv_in"]["kernel"], tensors["conv_in.weight"].transpose(2, 3, 1, 0))


@pytest.mark.slow
def test_a_text_encoder_without_position_ids_is_exported_without(copied: Path, tmp_path: Path) -> None:
    tensors = tensors_in(copied / "text_encoder")
    del tensors["text_model.embeddings.position_ids"]
    save_file(tensors, copied / "text_encoder" / "model.safetensors")
    fq.convert_checkpoint(copied, tmp_path / "flax")
    fq.export_checkpoint(tmp_path / "flax", tmp_path / "back")
    assert tensors_in(tmp_path / "back" / "text_encoder").keys() == tensors.keys()


@pytest.mark.parametrize("name", [*PARTS, "controlnet"])
def test_each_part_loads_alone(published: Path, converted: Path, name: str) -> None:
    part = DRAWING_PARTS[name]
    model, params = fq.from_pretrained(published / name)
    assert type(model) is part.model_class
    for source in (converted / name, str(next((published / name).glob("*model*")))):
        again, same_params = fq.from_pretrained(source)
        assert again.config == model.config
        assert same(same_params, params)
    half, half_params = load_component(published, name, jnp.bfloat16, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half_params)} == {jnp.bfloat16.dtype}
    with pytest.raises(fq.InputError, match=r"`lora` is for the Q-Former"):
        fq.from_pretrained(published / name, lora="lora.safetensors")


def test_the_qformer_of_a_pipeline_loads_as_before(published: Path, converted: Path) -> None:
    for folder in (published, converted, converted / "qformer"):
        model, params = fq.from_pretrained(folder)
        assert type(model) is fq.Blip2QFormerModel
        assert same(params, load_component(published, "qformer")[1])
    with pytest.raises(fq.InputError, match="the parts of a pipeline are unet, vae, text_encoder, controlnet and q"):
        load_component(published, "safety_checker")


def test_a_pipeline_saved_from_memory(published: Path, tmp_path: Path) -> None:
    parts = load_pipeline_parts(published, param_dtype=jnp.bfloat16, with_controlnet=True)
    arguments = (parts.components, parts.params, parts.scheduler, parts.tokenizer, parts.processor, 3)
    save_pipeline(tmp_path / "saved", *arguments)
    again = load_pipeline_parts(tmp_path / "saved")
    assert same(again.params, parts.params)
    assert {name: module.config for name, module in again.components.items()} == {
        name: module.config for name, module in parts.components.items()
    }
    assert again.index["_class_name"] == "BlipDiffusionControlNetPipeline"
    assert again.ctx_begin_pos == 3
    assert again.scheduler == parts.scheduler
    assert again.tokenizer("a dog")["input_ids"] == parts.tokenizer("a dog")["input_ids"]
    with pytest.raises(fq.InputError, match="exists"):
        save_pipeline(tmp_path / "saved", *arguments)
    save_pipeline(tmp_path / "saved", *arguments, overwrite=True)
    with pytest.raises(fq.InputError, match="holds one ControlNet"):
        save_pipeline(tmp_path / "two", parts.components | {"controlnet": (1, 2)}, *arguments[1:])


@pytest.mark.slow
def test_other_controlnets(published: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_controlnet(tmp_path / str(seed), seed)
    own = load_pipeline_parts(published, with_controlnet=True)
    one = load_pipeline_parts(published, controlnet=tmp_path / "1")
    two = load_pipeline_parts(published, controlnet=[tmp_path / "1", tmp_path / "2"])
    assert not same(own.params["controlnet"], one.params["controlnet"])
    assert same(two.params["controlnet"][0], one.params["controlnet"])
    assert not same(*two.params["controlnet"])
    pipe = fq.BlipDiffusionControlNetPipeline.from_pretrained(published, controlnet=[tmp_path / "1", tmp_path / "2"])
    assert same(pipe.params, two.params)
    pipe = fq.BlipDiffusionControlNetPipeline.from_pretrained(published)
    assert same(pipe.params, own.params)
    with pytest.raises(
        fq.InputError, match="config of a UNet2DConditionModel; the controlnet must be a ControlNetModel"
    ):
        load_pipeline_parts(published, controlnet=published / "unet")
    for seed in (1, 2):
        change_json(tmp_path / str(seed) / "config.json", cross_attention_dim=32)
    with pytest.raises(fq.InputError, match="of the wrong shape"):
        load_pipeline_parts(published, controlnet=tmp_path / "1")


def test_a_pipeline_over_a_mesh(published: Path) -> None:
    mesh = fq.make_mesh(data=1, fsdp=2)
    parts, plain = load_pipeline_parts(published, mesh=mesh), load_pipeline_parts(published)
    assert same(jax.device_get(parts.params), jax.device_get(plain.params))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(parts.params))


def write_lavis(modern: Path, folder: Path) -> None:
    """The parts under the names that LAVIS's tar has."""
    for name in PARTS:
        tensors = tensors_in(modern / name)
        (folder / name).mkdir(parents=True)
        file = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch_save(tensors, folder / name / file)
    tensors = tensors_in(modern / "qformer")
    config = fq.Blip2Config.from_json(modern / "qformer" / "config.json")
    lavis = {row.path: row for row in parameters(config, "lavis", QFORMER_PARTS)}
    blip, projection = {}, {}
    for row in parameters(config, "diffusers", QFORMER_PARTS):
        renamed = lavis[row.path]
        value = tensors[row.name].reshape(renamed.torch_shape)
        if row.path.startswith("proj_layer/"):
            projection[renamed.name.removeprefix("proj_layer.")] = value
        else:
            blip[renamed.name] = value
    for name, values in (("blip_model/blip_weight.pt", blip), ("proj_layer/proj_weight.pt", projection)):
        (folder / name).parent.mkdir()
        torch_save(values, folder / name)


@pytest.mark.slow
def test_the_unpacked_tar_of_lavis(modern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lavis(modern, tmp_path / "lavis")
    small = {name: json.loads((modern / name / "config.json").read_text()) for name in PARTS}
    monkeypatch.setattr(pipelines, "SD_1_5", small)
    geometry = fq.Blip2Config.from_json(modern / "qformer" / "config.json")
    monkeypatch.setattr("flax_qformer.checkpoints.loading.BLIP_DIFFUSION", geometry)
    with pytest.raises(fq.InputError, match="clip-vit-large-patch14"):
        load_pipeline_parts(tmp_path / "lavis")
    monkeypatch.setattr("flax_qformer.processing.processor.BERT", str(DEFAULT_MODEL))
    parts = fq.BlipDiffusionPipeline.from_pretrained(tmp_path / "lavis", tokenizer=modern / "tokenizer")
    expected = load_pipeline_parts(modern)
    assert same(parts.params, expected.params)
    assert parts.scheduler == expected.scheduler
    fq.convert_checkpoint(tmp_path / "lavis", tmp_path / "flax", tokenizer=modern / "tokenizer")
    assert same(load_pipeline_parts(tmp_path / "flax").params, expected.params)
    shutil.rmtree(tmp_path / "lavis" / "vae")
    with pytest.raises(fq.InputError, match="has no vae"):
        load_pipeline_parts(tmp_path / "lavis", tokenizer=modern / "tokenizer")


@pytest.mark.slow
def test_a_fine_tuned_file_of_lavis(modern: Path, tmp_path: Path) -> None:
    tensors = {f"unet.{name}": value + 1 for name, value in tensors_in(modern / "unet").items()}
    vectors = np.random.default_rng(0).standard_normal((1, 8, WIDTH), np.float32)
    others = {"text_encoder.text_model.embeddings.position_ids": np.arange(77)[None]}
    file = tmp_path / "checkpoint_40.pth"
    torch_save(
        {
            "model": tensors | {"ctx_embeddings_cache": vectors} | others,
            "optimizer": {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}, "param_groups": [{"lr": 5e-6}]},
            "config": {"run": {"iters_per_inner_epoch": 40}},
            "scaler": None,
            "iters": 40,
        },
        file,
    )
    parts, base = load_pipeline_parts(modern, subject=file), load_pipeline_parts(modern)
    assert base.subject_embeddings is None
    np.testing.assert_array_equal(parts.subject_embeddings, vectors[0])
    pipe = fq.BlipDiffusionPipeline.from_pretrained(modern, subject=file)
    assert same(pipe.params, parts.params)
    # A call without photos draws the file's subject.
    options = {"target_subject_category": "dog", "height": 16, "width": 16, "num_inference_steps": 1}
    drawn, wanted = (
        pipe("in the snow", subject_embeddings=subject, output_type="latent", **options).images
        for subject in (None, vectors)
    )
    np.testing.assert_array_equal(drawn, wanted)
    assert same(parts.params["vae"], base.params["vae"])
    for path, leaf in flatten_dict(parts.params["unet"]).items():
        np.testing.assert_array_equal(leaf, flatten_dict(base.params["unet"])[path] + 1)
    for wrong, message in (
        (tensors, "it lacks unet"),
        ({"ctx_embeddings_cache": vectors}, "it lacks unet"),
        (tensors | {"ctx_embeddings_cache": vectors, "vae.x": vectors}, "it also holds vae.x"),
        (tensors | {"ctx_embeddings_cache": vectors, "unet.x": vectors}, "1 unexpected: x"),
        (tensors | {"ctx_embeddings_cache": vectors[0]}, r"it must be \(1, Q, D\)"),
    ):
        torch_save({"model": wrong}, file)
        with pytest.raises(fq.InputError, match=message):
            load_pipeline_parts(modern, subject=file)


def break_unet_name(folder: Path) -> None:
    tensors = tensors_in(folder / "unet")
    tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f / "unet"), "has no folder unet"),
        (lambda f: shutil.rmtree(f / "qformer"), "has no folder qformer"),
        (lambda f: (f / "vae" / "config.json").unlink(), "vae has no config.json"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae holds no checkpoint"),
        (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler/scheduler_config.json"),
        (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "no tokenizer of CLIP"),
        (lambda f: (f / "tokenizer" / "vocab.json").write_text("{}"), "tokenizer.*cannot be used"),
        (lambda f: (f / "model_index.json").unlink(), "it has no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "is not JSON"),
        (
            lambda f: change_json(f / "model_index.json", _class_name="StableDiffusionPipeline"),
            "names the class 'StableDiffusionPipeline'; it must be BlipDiffusionPipeline",
        ),
        (
            lambda f: change_json(f / "model_index.json", unet=["diffusers", "UNet2DModel"]),
            r"gives the unet as \['diffusers', 'UNet2DModel'\]; its class must be UNet2DConditionModel",
        ),
        (lambda f: change_json(f / "model_index.json", vae="AutoencoderKL"), "gives the vae as 'AutoencoderKL'"),
        (
            lambda f: change_json(f / "model_index.json", _class_name="BlipDiffusionControlNetPipeline"),
            "has no folder controlnet",
        ),
        (lambda f: change_json(f / "model_index.json", ctx_begin_pos=-1), "ctx_begin_pos is -1"),
        (
            lambda f: change_json(f / "unet" / "config.json", _class_name="UNet2DModel"),
            "is the config of a UNet2DModel",
        ),
        (
            lambda f: change_json(f / "unet" / "config.json", addition_embed_type="text_time"),
            "is the config of Stable Diffusion XL",
        ),
        (lambda f: change_json(f / "unet" / "config.json", class_embed_type="timestep"), "class_embed_type"),
        (lambda f: change_json(f / "text_encoder" / "config.json", hidden_size="64"), "hidden_size is '64'"),
        (lambda f: change_json(f / "text_encoder" / "config.json", num_hidden_layers=3), "16 missing"),
        (lambda f: change_json(f / "scheduler" / "scheduler_config.json", _class_name="Magic"), "Magic"),
        (break_unet_name, "1 missing: conv_in.weight; 1 unexpected: conv_inn.weight"),
    ],
)
def test_a_folder_that_cannot_be_used(copied: Path, change: Callable[[Path], Any], message: str) -> None:
    change(copied)
    with pytest.raises(fq.InputError, match=message):
        load_pipeline_parts(copied)


def test_parts_that_do_not_fit_each_other(modern: Path, copied: Path) -> None:
    config = json.loads((copied / "unet" / "config.json").read_text()) | {"cross_attention_dim": 32}
    write_json(copied / "unet" / "config.json", config)
    part = DRAWING_PARTS["unet"]
    parsed = part_config(part, config, "unet")
    params = tiny_pipeline.random_params(part, parsed, 0)
    save_file(
        LoadedPart(part, config, parsed, params).tensors(), copied / "unet" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(fq.InputError, match=r"has the width 64, but the unet's cross_attention_dim \(32\) differs"):
        load_pipeline_parts(copied)


def test_pipelines_are_written_only_where_they_may(modern: Path, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(fq.InputError, match="is not the folder of a model"):
        fq.convert_checkpoint(modern, tmp_path / "other", overwrite=True)
    with pytest.raises(fq.InputError, match="cannot replace what it is made from"):
        fq.convert_checkpoint(copied, copied, overwrite=True)
    with pytest.raises(fq.InputError, match="leave `layout` out"):
        fq.export_checkpoint(modern, tmp_path / "out", layout="lavis")
    shutil.rmtree(copied / "vae")
    with pytest.raises(fq.InputError, match="has no folder vae"):
        fq.convert_checkpoint(copied, tmp_path / "out")
    with pytest.raises(fq.InputError, match="1 missing: conv_in"):
        break_unet_name(modern_copy := Path(shutil.copytree(modern, tmp_path / "broken")))
        fq.convert_checkpoint(modern_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_published_sizes() -> None:
    published = dict(pipelines.SD_1_5)
    published["controlnet"] = {"attention_head_dim": 8, "cross_attention_dim": 768}
    counts = {}
    for name, values in published.items():
        part = DRAWING_PARTS[name]
        rows = part_rows(part, part_config(part, values, name))
        assert len({row.name for row in rows}) == len(rows)
        counts[name] = sum(int(np.prod(row.shape)) for row in rows)
    assert counts == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "controlnet": 361_279_120,
    }


def test_the_embedded_pipeline() -> None:
    files = [file for file in DEFAULT_PIPELINE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3e6
    assert type(fq.from_pretrained()[0]) is fq.Blip2QFormerModel
    parts = load_pipeline_parts()
    assert same(parts.params["qformer"], fq.from_pretrained()[1])
    # The script in examples/shapes makes these files.
    vocabulary, merges = tiny_pipeline.byte_pairs(tiny_pipeline.WORDS)
    assert parts.tokenizer.get_vocab() == {token: i for i, token in enumerate(vocabulary)}
    assert parts.tokenizer.tokenize("A red circle, naïve ☃")[:4] == ["a</w>", "red</w>", "circle</w>", ",</w>"]
    assert len(merges) < 1000
    for seed, (name, config) in enumerate(tiny_pipeline.configs(len(vocabulary)).items()):
        assert parts.components[name].config == config
        assert same(parts.params[name], tiny_pipeline.random_params(DRAWING_PARTS[name], config, seed))


HOSTILE = (None, -1, 0, 3, 1e308, "x", [], [0], [-1, 2], {}, True, 2**63, 10**6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*int64:UserWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", [*PARTS, "controlnet"])
def test_hostile_configs(modern: Path, name: str) -> None:
    part = DRAWING_PARTS[name]
    values = CONTROLNET if name == "controlnet" else json.loads((modern / name / "config.json").read_text())
    refused = 0
    for field in part.config_values(part_config(part, values, name)):
        for value in HOSTILE:
            try:
                part_rows(part, part_config(part, {**values, field: value}, name))
            except fq.InputError:
                refused += 1
    assert refused > 50


# The peak of the resident memory, over what is resident before, in parts of the parameters. getrusage would count the
# parent's memory from before the exec.
MEMORY = """
import sys
from pathlib import Path
import jax
from flax_qformer.checkpoints.pipelines import load_component

def resident(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024

load_component(sys.argv[2], "unet")
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
_, params = load_component(sys.argv[1], "unet")
print((resident("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_the_memory_of_loading(modern: Path, copied: Path) -> None:
    config = json.loads((copied / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [320, 640], "norm_num_groups": 32}
    write_json(copied / "unet" / "config.json", config)
    part = DRAWING_PARTS["unet"]
    rows = part_rows(part, part_config(part, config, "unet"))
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tensors = {row.name: np.zeros(row.torch_shape, np.float32) for row in rows}
    torch_save(tensors, copied / "unet" / "diffusion_pytorch_model.bin")
    done = subprocess.run([sys.executable, "-c", MEMORY, copied, modern], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.3


HUB = """
from flax_qformer.checkpoints.pipelines import load_pipeline_parts
parts = load_pipeline_parts("someone/model")
print(sorted(parts.components))
"""


@pytest.mark.slow
def test_a_pipeline_from_the_hub(published: Path, hub: tuple[type[fake_hub.Hub], dict[str, str]]) -> None:
    served, environment = hub
    shutil.copytree(published, served.files, dirs_exist_ok=True)
    save_file({"unused": np.zeros(1, np.float32)}, served.files / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "['qformer', 'text_encoder', 'unet', 'vae']", done.stderr
    fetched = [request for request in served.requests if "/resolve/" in request]
    assert not any("vision_encoder" in name or "controlnet" in name or "fp16" in name for name in fetched)
