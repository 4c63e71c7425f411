"""LoRA files on a pipeline's kernels, against updates computed here in PyTorch's layout."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

import cases
from conftest import same
from flax_qformer.checkpoints.pipeline_lora import load_pipeline_lora
from flax_qformer.convert.tables.stable_diffusion import parameter_at
from flax_qformer.errors import InputError

BLOCK = "down_blocks_0/attentions_0"
ATTENTION = f"{BLOCK}/transformer_blocks_0/attn1"
CROSS = f"{BLOCK}/transformer_blocks_0/attn2"
LAYER = "text_model/encoder/layers_0"
SHAPES = {
    "unet": {
        f"{ATTENTION}/to_q/kernel": (8, 2, 4),
        f"{ATTENTION}/to_out_0/kernel": (2, 4, 8),
        f"{ATTENTION}/to_out_0/bias": (8,),
        f"{CROSS}/to_k/kernel": (6, 2, 4),
        f"{BLOCK}/transformer_blocks_0/ff/net_0/proj/kernel": (8, 64),
        f"{BLOCK}/proj_in/kernel": (1, 1, 8, 8),
        "down_blocks_0/resnets_0/conv1/kernel": (3, 3, 4, 8),
        "time_embedding/linear_1/kernel": (4, 16),
    },
    "text_encoder": {
        f"{LAYER}/self_attn/q_proj/kernel": (6, 3, 2),
        f"{LAYER}/self_attn/out_proj/kernel": (3, 2, 6),
        f"{LAYER}/mlp/fc1/kernel": (6, 24),
    },
    "vae": {"decoder/conv_in/kernel": (3, 3, 4, 8)},
}
RANK, ALPHA = 2, 6.0
KERNELS = [
    (part, path)
    for part in ("unet", "text_encoder")
    for path in SHAPES[part]
    if path.endswith("kernel") and path != f"{CROSS}/to_k/kernel"
]


@pytest.fixture
def params() -> dict[str, Any]:
    return {
        part: unflatten_dict({path: jnp.asarray(cases.draw(path, shape)) for path, shape in shapes.items()}, sep="/")
        for part, shapes in SHAPES.items()
    }


def module_of(part: str, path: str) -> str:
    """diffusers' name of a module, without its part."""
    return parameter_at(path, SHAPES[part][path]).name.removesuffix(".weight")


def matrices(part: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Down and up of a kernel, with PyTorch's shapes."""
    out, *inner = parameter_at(path, SHAPES[part][path]).torch_shape
    ones = [1] * (len(inner) - 1)
    return cases.draw(f"down of {path}", (RANK, *inner)), cases.draw(f"up of {path}", (out, RANK, *ones))


def kohya(part: str, module: str) -> tuple[str, str, str]:
    name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def peft(part: str, module: str) -> tuple[str, str]:
    return f"{part}.{module}.lora_A.weight", f"{part}.{module}.lora_B.weight"


def older_diffusers(part: str, module: str) -> tuple[str, str]:
    lora = "lora_linear_layer" if part == "text_encoder" else "lora"
    return f"{part}.{module}.{lora}.down.weight", f"{part}.{module}.{lora}.up.weight"


def oldest_diffusers(part: str, module: str) -> tuple[str, str]:
    """The processors of attention had the weights; both parts had the UNet's names."""
    stem, _, last = module.rpartition(".")
    if last == "0":
        stem, _, last = stem.rpartition(".")
    if "attn" not in stem:
        return peft(part, module)
    last = last.removesuffix("_proj").removeprefix("to_")
    processor = ".processor" if part == "unet" else ""
    return tuple(f"{part}.{stem}{processor}.to_{last}_lora.{kind}.weight" for kind in ("down", "up"))


@pytest.mark.parametrize("form", [kohya, peft, older_diffusers, oldest_diffusers])
def test_all_forms_update_the_same_kernels(form: Any, params: Any, tmp_path: Path) -> None:
    tensors = {}
    for part, path in KERNELS:
        values = (*matrices(part, path), np.float32(ALPHA))  # only kohya's form has an alpha
        names = form(part, module_of(part, path))
        tensors |= {name: np.asarray(value) for name, value in zip(names, values, strict=False)}
    save_file(tensors, tmp_path / "lora.safetensors")
    updated = load_pipeline_lora(tmp_path / "lora.safetensors", dict.fromkeys(params), params, scale=0.5)
    scale = 0.5 * ALPHA / RANK if form is kohya else 0.5
    for part, path in KERNELS:
        row = parameter_at(path, SHAPES[part][path])
        before, after = (
            row.to_torch(np.asarray(flatten_dict(tree[part], sep="/")[path])) for tree in (params, updated)
        )
        down, up = matrices(part, path)
        change = np.tensordot(up.reshape(len(up), RANK), down, 1)
        np.testing.assert_allclose(after, before + scale * change, rtol=1e-5, atol=1e-6)
    untouched = flatten_dict(updated["unet"], sep="/")
    for path in (f"{CROSS}/to_k/kernel", f"{ATTENTION}/to_out_0/bias"):
        assert untouched[path] is flatten_dict(params["unet"], sep="/")[path]
    assert updated["vae"] is params["vae"]


def save_two(folder: Path, **extra: np.ndarray) -> Path:
    """A file with an update of `to_q`, and more tensors."""
    module = module_of("unet", f"{ATTENTION}/to_q/kernel")
    tensors = dict(zip(peft("unet", module), matrices("unet", f"{ATTENTION}/to_q/kernel"), strict=True))
    save_file(tensors | extra, folder / "pytorch_lora_weights.safetensors")
    return folder


def test_a_folder_of_diffusers_and_bfloat16_kernels(params: Any, tmp_path: Path) -> None:
    half = {"unet": unflatten_dict({k: v.astype(jnp.bfloat16) for k, v in flatten_dict(params["unet"]).items()})}
    folder = save_two(tmp_path)
    updated = load_pipeline_lora(folder, half, half)
    path = tuple(f"{ATTENTION}/to_q/kernel".split("/"))
    kernel = flatten_dict(updated["unet"])[path]
    assert kernel.dtype == jnp.bfloat16
    assert not same(kernel, flatten_dict(half["unet"])[path])
    # The opposite update removes the first, up to rounding.
    back = flatten_dict(load_pipeline_lora(folder, half, updated, scale=-1.0)["unet"])[path]
    np.testing.assert_allclose(back.astype(np.float32), flatten_dict(params["unet"])[path], atol=0.05)


def test_a_file_of_the_unet_alone_needs_no_prefix(params: Any, tmp_path: Path) -> None:
    with_prefix = load_pipeline_lora(save_two(tmp_path), params, params)
    module = module_of("unet", f"{ATTENTION}/to_q/kernel")
    names = (name.removeprefix("unet.") for name in oldest_diffusers("unet", module))
    tensors = dict(zip(names, matrices("unet", f"{ATTENTION}/to_q/kernel"), strict=True))
    save_file(tensors, tmp_path / "unet.safetensors")
    assert same(load_pipeline_lora(tmp_path / "unet.safetensors", params, params), with_prefix)


Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"unet.up_blocks.9.attn1.to_q.lora_A.weight": (2, 8)}, ["unet.up_blocks.9.attn1.to_q.lora_A.weight"]),
        ({"lora_unet_x.hada_w1_a": (2, 2), "a.b": (1,)}, ["lora_unet_x.hada_w1_a", "a.b"]),
        ({f"{Q}.lora_magnitude_vector": (8,)}, ["lora_magnitude_vector"]),
        ({f"{K}.lora_A.weight": (2, 6)}, ["lora_A.weight has no matching up"]),
        ({f"{K}.lora_A.weight": (2, 5), f"{K}.lora_B.weight": (8, 2)}, ["lora_A.weight float32 (2, 5) for"]),
        ({f"{K}.lora_A.weight": (2, 6), f"{K}.lora_B.weight": (8, 3)}, ["lora_B.weight float32 (8, 3) for"]),
        ({f"{Q}.lora.down.weight": (2, 8)}, ["is there twice"]),
        ({f"{Q}.alpha": (2,)}, ["alpha float32 (2,)"]),
        ({"lora_te2_text_model.alpha": ()}, ["Stable Diffusion XL", "1.5"]),
        ({f"{K}.lora_A.weight": (2, 2048), f"{K}.lora_B.weight": (8, 2)}, ["Stable Diffusion XL"]),
    ],
)
def test_tensors_that_fit_nothing_are_listed(
    extra: dict[str, tuple[int, ...]], words: list[str], params: Any, tmp_path: Path
) -> None:
    folder = save_two(tmp_path, **{name: np.ones(shape, np.float32) for name, shape in extra.items()})
    with pytest.raises(InputError) as caught:
        load_pipeline_lora(folder, params, params)
    assert all(word in str(caught.value) for word in words), caught.value


def test_empty_folders_and_files(params: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pytorch_lora_weights.safetensors or .*; name the LoRA file"):
        load_pipeline_lora(tmp_path, params, params)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="it has no tensors"):
        load_pipeline_lora(tmp_path / "empty.safetensors", params, params)
