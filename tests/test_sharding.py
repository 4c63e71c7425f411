"""Many devices give what one gives."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import flax_qformer as fq
from flax_qformer.sharding import parse_mesh

SCRIPT = Path(__file__).parent / "sharded_step.py"
SPLITS = [
    f"data={data},fsdp={fsdp},tensor={8 // data // fsdp}"
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if 8 % (data * fsdp) == 0
]


def start(devices: int, file: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), str(file), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    file = tmp_path_factory.mktemp("one") / "found.npz"
    finish(start(1, file, "data=1"))
    return np.load(file)["data=1"]


def check(found: np.ndarray, expected: np.ndarray, split: bool = True) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] > 20) == split
    assert np.linalg.norm(found[2:] - expected[2:]) <= 1e-5 * np.linalg.norm(expected[2:])


@pytest.mark.parametrize(
    "splits", [("data=2,fsdp=2,tensor=2", "data=1,fsdp=8,tensor=1"), pytest.param(SPLITS, marks=pytest.mark.slow)]
)
def test_splits_of_eight_devices(splits: Sequence[str], one_device: np.ndarray, tmp_path: Path) -> None:
    finish(start(8, tmp_path / "found.npz", *splits))
    found = np.load(tmp_path / "found.npz")
    assert set(found) == set(splits)
    for split in splits:
        check(found[split], one_device, split != "data=8,fsdp=1,tensor=1")


def test_two_processes(one_device: np.ndarray, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    splits = ["data=8", "data=2,fsdp=2,tensor=2"]
    finish(*(start(4, tmp_path / "found.npz", str(process), port, *splits) for process in range(2)))
    found = np.load(tmp_path / "found.npz")
    check(found["data=8"], one_device, split=False)
    check(found["data=2,fsdp=2,tensor=2"], one_device)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "their product must be"),
        ("data=-1,fsdp=-1", "one may be -1"),
        ("fsdp=0", "their product must be"),
        ("data", "write it as"),
        ("pipe=2", "write it as"),
    ],
)
def test_unfit_meshes_are_refused(text: str, message: str) -> None:
    with pytest.raises(fq.InputError, match=message):
        fq.make_mesh(**parse_mesh(text))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    mesh = fq.make_mesh()
    with pytest.raises(fq.InputError, match=f"{jax.device_count()} does"):
        fq.shard_batch({"input_ids": np.zeros((jax.device_count() + 1, 3))}, mesh)
