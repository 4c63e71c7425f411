"""Many devices give the same numbers as one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import flax_qformer as fq
import scenes
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.parallel.mesh import parse_mesh
from flax_qformer.parallel.partition_rules import sharding_of

SCRIPT, LOADING = (Path(__file__).parent / name for name in ("sharded_step.py", "placed_loading.py"))
# Each axis alone but tensor, which test_two_processes has, and each pair of axes.
SPLITS = ("data=8", "fsdp=8", "data=4,fsdp=2", "data=2,tensor=4", "fsdp=4,tensor=2")


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
    file = tmp_path_factory.mktemp("one") / "results.npz"
    finish(start(1, file, "data=1"))
    return np.load(file)["data=1"]


def check(results: np.ndarray, expected: np.ndarray, split: bool = True) -> None:
    assert results[0] == pytest.approx(expected[0], rel=1e-5)
    assert (results[1] > 20) == split
    assert np.linalg.norm(results[2:] - expected[2:]) <= 1e-5 * np.linalg.norm(expected[2:])


@pytest.mark.parametrize("splits", [("data=2,fsdp=2,tensor=2",), pytest.param(SPLITS, marks=pytest.mark.slow)])
def test_splits_of_eight_devices(splits: Sequence[str], one_device: np.ndarray, tmp_path: Path) -> None:
    finish(start(8, tmp_path / "results.npz", *splits))
    results = np.load(tmp_path / "results.npz")
    assert set(results) == set(splits)
    for split in splits:
        check(results[split], one_device, split != "data=8")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def job(*command: object, devices: int = 2, output: int = subprocess.PIPE) -> list[subprocess.Popen[str]]:
    """Two processes that find each other, each with its own devices."""
    common = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
    common["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            list(map(str, command)),
            env=os.environ | common | {"JAX_PROCESS_ID": str(process)},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]


@pytest.mark.slow
def test_two_processes(one_device: np.ndarray, tmp_path: Path) -> None:
    port, splits = free_port(), ("data=2,fsdp=2,tensor=2", "tensor=8")
    finish(*(start(4, tmp_path / "results.npz", str(process), port, *splits) for process in range(2)))
    results = np.load(tmp_path / "results.npz")
    assert set(results) == set(splits)
    for split in splits:
        check(results[split], one_device)


def test_a_process_reads_only_the_shards_of_its_devices(tmp_path: Path) -> None:
    processes = job(sys.executable, LOADING, DEFAULT_MODEL, tmp_path / "model")
    for process in processes:
        stdout, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        # Gloo also writes to standard output, even in the middle of a line.
        line = re.search(r"read (\d+) bytes for (\d+) of (\d+)", stdout)
        assert line, stdout
        print(line[0])
        read, here, whole = map(int, line.groups())
        # Allowance for the files' index and the ends of chunks.
        assert read < here + 0.15 * whole


@pytest.mark.slow
def test_a_job_that_loses_a_process_ends_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    drawing = [sys.executable, scenes.__file__, tmp_path / "data", "--images", "40"]
    subprocess.run(drawing, check=True)

    def train(run: Path) -> list[subprocess.Popen[str]]:
        sizes = "--batch-size 8 --steps 24 --warmup 2 --save-every 4 --log-every 1 --max-text-length 12 --num-workers 0"
        split = "--distributed --mesh data=-1,fsdp=2 --held-out 0 --dtype float32"
        program = Path(sys.executable).with_name("flax-qformer")
        return job(program, "train", "--data", tmp_path / "data", "--output", run, *sizes.split(), *split.split())

    def wait_for(step: int) -> None:
        while not any(int(path.name) >= step for path in (lost / "checkpoints").glob("*") if path.name.isdecimal()):
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.02)

    lost, whole = tmp_path / "lost", tmp_path / "whole"
    first, second = train(lost)
    wait_for(4)
    second.terminate()
    errors = [process.communicate(timeout=300)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [128 + signal.SIGTERM] * 2, errors
    stopped = re.search(r"stopped after step (\d+)", errors[0])
    assert stopped, errors[0]
    assert stopped[0] in errors[1]
    first, second = train(lost)
    wait_for(int(stopped[1]) + 1)
    second.kill()
    second.communicate()
    _, stderr = first.communicate(timeout=300)
    # The process sees a broken connection at once, or JAX aborts it when the other's heartbeats are missing.
    ways = {2: "another process of the job has ended", -signal.SIGABRT: "another task died"}
    assert ways.get(first.returncode, "no such end") in stderr
    for run in (lost, whole):
        for process in train(run):
            _, stderr = process.communicate(timeout=600)
            assert process.returncode == 0, stderr
    steps = [json.loads(line)["step"] for line in (lost / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    (_, one), (_, other) = (fq.from_pretrained(run / "model") for run in (lost, whole))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_only_the_first_process_of_a_job_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also evaluations and their samples, which all processes compute."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    drawing = [sys.executable, scenes.__file__, tmp_path / "data", "--images", "40"]
    subprocess.run(drawing, check=True)
    sizes = "--batch-size 8 --steps 2 --warmup 1 --max-text-length 12 --num-workers 0 --held-out 8 --dtype float32"
    program, run = Path(sys.executable).with_name("flax-qformer"), tmp_path / "run"
    command = [program, "train", "--data", tmp_path / "data", "--output", run, *sizes.split()]
    processes = job(*command, "--distributed", "--mesh", "data=-1,fsdp=2")
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "step 2: images 8" in errors[0]
    assert "step" not in errors[1].replace("train_step", "")  # the compiler may say that it is slow
    (events,) = (run / "tensorboard").iterdir()
    assert b"samples/attention" in events.read_bytes()


@pytest.mark.slow
def test_a_job_embeds_as_one_process_does(tmp_path: Path) -> None:
    drawing = [sys.executable, scenes.__file__, tmp_path / "data", "--images", "40"]
    subprocess.run(drawing, check=True)
    program = Path(sys.executable).with_name("flax-qformer")
    command = [program, "embed", "--data", tmp_path / "data", "--shard-size", "8", "--batch-size", "4", "--output"]
    for process in job(*command, tmp_path / "job", "--distributed", "--mesh", "fsdp=2"):
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    subprocess.run([*command, tmp_path / "one"], check=True)
    results, expected = (
        np.stack(pd.read_parquet(tmp_path / name).sort_values("row")["embeddings"]) for name in ("job", "one")
    )
    np.testing.assert_allclose(results, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("encoder/layer_0/crossattention/attention/query/kernel", (64, 8, 8), ("fsdp", "tensor", None)),
        ("encoder/layer_0/crossattention/output/dense/kernel", (8, 8, 64), ("tensor", None, "fsdp")),
        ("encoder/layers/layer_0/output/dense/kernel", (2, 256, 64), (None, "tensor", "fsdp")),
        ("visual_encoder/encoder/layers_0/self_attn/qkv/kernel", (64, 3, 8, 8), ("fsdp", None, "tensor", None)),
        ("opt_state/v_row/encoder/layer_0/output/dense/kernel", (64,), (None,)),
        ("encoder/layer_0/output/LayerNorm/scale", (64,), (None,)),
    ],
)
def test_heads_are_sharded_along_tensor(path: str, shape: tuple[int, ...], spec: tuple[str | None, ...]) -> None:
    assert tuple(sharding_of(path, shape, fq.make_mesh()).spec) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "their product must be"),
        ("data=-1,fsdp=-1", "one of them may be -1"),
        ("fsdp=0", "their product must be"),
        ("data", "write it as"),
        ("pipe=2", "write it as"),
        ("data=1,data=1", "write it as"),
    ],
)
def test_unfit_meshes_are_refused(text: str, message: str) -> None:
    with pytest.raises(fq.InputError, match=message):
        fq.make_mesh(**parse_mesh(text))
    with pytest.raises(fq.InputError, match="whole numbers"):
        fq.make_mesh("2")


def test_a_mesh_of_other_axes_is_refused() -> None:
    mesh, arrays = jax.make_mesh((jax.device_count(),), ("data",)), {"kernel": np.zeros((2, 2))}
    for call in (
        lambda: fq.shard_params(arrays, mesh),
        lambda: fq.shard_batch(arrays, mesh),
        lambda: fq.from_pretrained(DEFAULT_MODEL, mesh=mesh),
    ):
        with pytest.raises(fq.InputError, match="make it with fq.make_mesh"):
            call()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    mesh = fq.make_mesh()
    with pytest.raises(fq.InputError, match=f"{2 * jax.device_count()} does"):
        fq.shard_batch({"input_ids": np.zeros((2 * jax.device_count() + 1, 3))}, mesh)
    with pytest.raises(fq.InputError, match="equally many rows; these have: a 2, b 4"):
        fq.shard_batch({"a": np.zeros(2), "b": np.zeros(4)}, mesh)
