"""LAVIS's stage-1 model from the files of its package, in an environment of `requirements-lavis.txt`.

The package's `__init__` files import every model of LAVIS and with them dozens of packages. These files need few names.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
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
"""Imported for what is not asked of them here: downloads, logs, other towers, fp16."""


def load() -> tuple[ModuleType, ModuleType, ModuleType]:
    """`blip2`, `blip2_qformer` and `clip_vit`, as modules that know one process."""
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

    # LAVIS asks for its rank without looking whether there are any.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    names = ("blip2_models.blip2", "blip2_models.blip2_qformer", "clip_vit")
    blip2, blip2_qformer, clip_vit = (importlib.import_module(f"lavis.models.{name}") for name in names)
    gather(own_gradients=True)
    return blip2, blip2_qformer, clip_vit


def gather(own_gradients: bool) -> None:
    """Whether features gathered from all processes carry gradients: LAVIS's do not, once there is a process group."""
    base_model = sys.modules["lavis.models.base_model"]
    base_model.is_dist_avail_and_initialized = lambda: not own_gradients
