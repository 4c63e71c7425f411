"""The published sizes against upstream, with random weights: the Q-Former (494 million parameters), UNet, autoencoder.

`UPSTREAM_PYTHON` names the Python of an environment of `oracle/requirements.txt`; `.ci/run` makes one.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cases
import flax_qformer as fq
import unet_cases
from conftest import write_upstream
from flax_qformer.checkpoints.parts import DRAWING_PARTS, part_config, part_rows
from flax_qformer.checkpoints.pipelines import SD_1_5
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
    return run_upstream("full_size.py", folder)


def run_upstream(script: str, folder: Path) -> dict[str, np.ndarray]:
    done = subprocess.run(
        [os.environ["UPSTREAM_PYTHON"], ORACLE / script, folder], capture_output=True, text=True, check=False
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


@pytest.mark.parametrize(("name", "size"), [("unet", 859_520_964), ("vae", 83_653_863)])
def test_drawing(name: str, size: int) -> None:
    """Latents of 32x32. The upstream program has ended when ours loads the weights: 12 GB of memory suffice."""
    part = DRAWING_PARTS[name]
    rows = part_rows(part, part_config(part, SD_1_5[name], name))
    assert sum(int(np.prod(row.shape)) for row in rows) == size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(SD_1_5[name]))
        tensors = {row.name: unet_cases.weight(row.name, row.torch_shape) for row in rows}
        save_file(tensors, folder / f"{part.weights}.safetensors", metadata={"format": "pt"})
        del tensors
        upstream = run_upstream("full_size_drawing.py", folder)
        model, params = fq.from_pretrained(folder)

    @jax.jit
    def run(params: Any, latents: jax.Array, timestep: jax.Array, text: jax.Array, pixels: jax.Array) -> dict[str, Any]:
        apply = partial(model.apply, {"params": params})
        if name == "unet":
            return vars(apply(latents, timestep, text))
        return vars(apply(pixels, method="encode")) | {"decoded": apply(latents, method="decode")}

    outputs = run(params, **unet_cases.full_inputs())
    assert outputs.keys() == upstream.keys()
    for key, output in outputs.items():
        expected = upstream[key].transpose(0, 2, 3, 1)
        assert output.shape == expected.shape
        error, scale = np.abs(output - expected).max(), np.abs(expected).max()
        print(f"{key}: {error:.1e} of {scale:.1f}")
        assert error < 1e-3 * scale, key


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
