"""The published geometry, 494 million parameters, against upstream, with random weights.

`UPSTREAM_PYTHON` names the Python of an environment of `oracle/requirements.txt`; `.ci/run` makes one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import cases
import flax_qformer as fq
from conftest import write_upstream
from flax_qformer.convert import export
from flax_qformer.models.config import BLIP_DIFFUSION

pytestmark = pytest.mark.slow

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full model as upstream writes it."""
    folder = tmp_path_factory.mktemp("full")
    write_upstream(folder, BLIP_DIFFUSION)
    return folder


@pytest.fixture(scope="module")
def upstream(folder: Path) -> dict[str, np.ndarray]:
    """Upstream's outputs for it."""
    done = subprocess.run(
        [os.environ["UPSTREAM_PYTHON"], ORACLE / "full_size.py", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "upstream.safetensors")


def test_outputs_and_gradients(folder: Path, upstream: dict[str, np.ndarray]) -> None:
    model, params = fq.from_pretrained(folder)
    batch = cases.full_batch()

    def loss(params: Any) -> tuple[jax.Array, fq.QFormerOutput]:
        output = model.apply({"params": params}, **batch)
        return cases.loss(vars(output)), output

    grads, output = jax.jit(jax.grad(loss, has_aux=True))(params)
    for name in ("last_hidden_state", "pooler_output", "query_embeddings"):
        error = np.abs(getattr(output, name) - upstream[name]).max()
        print(f"{name}: {error:.1e} of {np.abs(upstream[name]).max():.1f}")
        assert error < cases.ROUNDING, name
    samples = {name.removeprefix("gradient "): value for name, value in upstream.items() if "gradient " in name}
    grads = export(jax.tree.map(np.asarray, grads), model.config)
    assert grads.keys() - samples.keys() == {"embeddings.position_ids"}
    gradients = {name: cases.sample(name, grads[name]) for name in samples}
    error, worst = cases.gradient_error(gradients, samples)
    print(f"gradients: {error:.1e} relative ({worst})")
    assert error < 1e-4


def test_peak_memory_of_a_conversion(folder: Path, tmp_path: Path) -> None:
    """Peak memory of the process, from the system (getrusage would include the parent's)."""
    program = f"""
from pathlib import Path
from flax_qformer.commands.main import main
main(["convert", {str(folder)!r}, {str(tmp_path / "flax")!r}])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, size = int(done.stdout.split()[-1]) * 1024, (folder / "model.safetensors").stat().st_size
    print(f"converting {size / 1e9:.2f} GB takes {peak / 1e9:.2f} GB")
    assert size < peak < 1.5 * size
    assert json.loads((tmp_path / "flax" / "config.json").read_text())["num_query_tokens"] == 16
