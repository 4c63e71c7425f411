import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# No test may reach a real hub; pmap needs more than one device.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
# A compilation cache, shared by the workers and the commands that tests run; it is removed after the tests.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# XLA's fusion emitters take long to compile; since jaxlib 0.11 they cannot be disabled, only be made quick.
if version("jaxlib").startswith("0.10."):
    LOOPS, QUICK, FULL = "xla_cpu_use_fusion_emitters", "False", "True"
else:
    LOOPS, QUICK, FULL = "xla_cpu_opt_preset", "CPU_OPT_PRESET_FAST_COMPILE", "CPU_OPT_PRESET_DEFAULT"
# Tests run most programs once, so they compile without optimization; XLA_FLAGS='' compiles as users do.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_backend_optimization_level=0 --{LOOPS}={QUICK} --xla_cpu_parallel_codegen_split_count=1",
)

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import cases
import fake_hub
import flax_qformer as fq
from flax_qformer.convert.tables.qformer import Layout, parameters

# For tests that need optimized programs: jax.jit(compiler_options=...).
OPTIMIZED = {"xla_backend_optimization_level": 3, LOOPS: FULL}

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Upstream's recorded answers: the file of a geometry as a flat dictionary."""

    def load(name: str) -> dict[str, Any]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return dict(file)

    return load


def weights(config: fq.Blip2Config, layout: Layout = "diffusers") -> dict[str, np.ndarray]:
    """The weights of `cases` as PyTorch tensors, for any naming scheme."""
    names = {p.path: p.name for p in parameters(config, "diffusers")}
    return {p.name: cases.weight(names[p.path], p.torch_shape) for p in parameters(config, layout)}


@pytest.fixture(scope="session")
def upstream_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a folder as upstream does, for a geometry of `cases`."""
    made: dict[str, Path] = {}

    def make(geometry: str) -> Path:
        if geometry not in made:
            made[geometry] = tmp_path_factory.mktemp(geometry)
            write_upstream(made[geometry], fq.Blip2Config.from_dict(cases.GEOMETRIES[geometry]))
        return made[geometry]

    return make


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[fake_hub.Hub], dict[str, str]]]:
    """A hub on loopback that serves a folder, and the environment of a process that uses it."""

    class Served(fake_hub.Hub):
        files = tmp_path / "served"
        requests: list[str] = []

    Served.files.mkdir()
    with fake_hub.served(Served) as endpoint:
        environment = {
            name: value
            for name, value in os.environ.items()
            if "proxy" not in name.lower() and not name.startswith("HF_")
        }
        yield Served, environment | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}


def write_upstream(folder: Path, config: fq.Blip2Config) -> None:
    """A model with random weights, as upstream's `save_pretrained` writes it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(weights(config), folder / "model.safetensors", metadata={"format": "pt"})


def checkpointing(config: fq.Blip2Config, on: bool, **changes: Any) -> fq.Blip2Config:
    """The config with gradient checkpointing on or off in both of its parts."""
    parts = ("vision_config", "qformer_config")
    new = {part: dataclasses.replace(getattr(config, part), gradient_checkpointing=on, **changes) for part in parts}
    return dataclasses.replace(config, **new)


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same arrays."""
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))
