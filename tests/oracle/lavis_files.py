"""LAVIS's stage-1 model from the files of its package, in an environment of `requirements-lavis.txt`.

The package's `__init__` files import every model of LAVIS and with them dozens of packages. These files need few names.
"""

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

PACKAGES = ("lavis", "lavis.models", "lavis.models.blip_models", "lavis.models.blip2_models")
"""Their `__init__` is left out, so that a file imports what it names and no more."""

UNUSED = (
    "fairscale.nn.checkpoint.checkpoint_activations",
    "lavis.common",
    "lavis.common.dist_utils",
    "lavis.common.logger",
    "lavis.common.utils",
    "lavis.models.eva_vit",
    "omegaconf",
)
"""Imported only for unused features: downloads, logs, other towers, fp16."""


def load() -> tuple[ModuleType, ModuleType, ModuleType]:
    """`blip2`, `blip2_qformer` and `clip_vit`, as modules for a single process."""
    spec = importlib.util.find_spec("lavis")
    assert spec is not None, "LAVIS is not installed"
    root = Path(spec.origin).parents[1]
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    for name in UNUSED:
        sys.modules[name] = mock.MagicMock()
    registry = mock.MagicMock()
    registry.registry.register_model = lambda name: lambda model: model
    sys.modules["lavis.common.registry"] = registry

    # LAVIS reads its rank without checking for a process group.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    names = ("blip2_models.blip2", "blip2_models.blip2_qformer", "clip_vit")
    blip2, blip2_qformer, clip_vit = (importlib.import_module(f"lavis.models.{name}") for name in names)
    gather(own_gradients=True)
    return blip2, blip2_qformer, clip_vit


def build(modules: tuple[ModuleType, ...], config: dict[str, Any], words: Sequence[str], **options: Any) -> Any:
    """The model as its `__init__` makes it, with parts of these sizes instead of downloaded ones.

    Args:
      modules: what `load` returns.
      words: the vocabulary, to which LAVIS adds [DEC].
      options: further arguments of `Blip2Qformer`.
    """
    blip2, blip2_qformer, clip_vit = modules
    vision, qformer = config["vision_config"], config["qformer_config"]
    bert = blip2.BertConfig(**qformer | {"vocab_size": len(words)})
    tower = clip_vit.VisionTransformer(
        input_resolution=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"] + 1,  # 1.0.2 omits the last one
        heads=vision["num_attention_heads"],
        use_grad_checkpointing=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(words))
        tokenizer = blip2.BertTokenizer(str(vocabulary))
    with (
        mock.patch.object(blip2.BertTokenizer, "from_pretrained", return_value=tokenizer),
        mock.patch.object(blip2.BertConfig, "from_pretrained", return_value=bert),
        mock.patch.object(blip2.BertLMHeadModel, "from_pretrained", lambda *_, config: blip2.BertLMHeadModel(config)),
        mock.patch.object(blip2, "create_clip_vit_L", return_value=tower),
    ):
        return blip2_qformer.Blip2Qformer(
            vit_model="clip_L",
            img_size=vision["image_size"],
            vit_precision="fp32",
            num_query_token=config["num_query_tokens"],
            cross_attention_freq=qformer["cross_attention_frequency"],
            embed_dim=config["image_text_hidden_size"],
            **options,
        )


def compute_in_float64() -> None:
    """Make modules that `build` makes from now on compute in float64, also where LAVIS casts to float32."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    for name in ("blip2_models.blip2", "clip_vit"):
        sys.modules[f"lavis.models.{name}"].LayerNorm.forward = torch.nn.LayerNorm.forward


def gather(own_gradients: bool) -> None:
    """Whether features gathered from all processes carry gradients: LAVIS's do not, once there is a process group."""
    base_model = sys.modules["lavis.models.base_model"]
    base_model.is_dist_avail_and_initialized = lambda: not own_gradients
