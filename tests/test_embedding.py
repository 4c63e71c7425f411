"""Sources become Parquet shards, the same ones after any interruption and with any number of processes."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flax_qformer as fq
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.commands.main import main

BIN = Path(sys.executable).parent
IMAGES, SHARDS = 203, 26


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images without captions, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / ("more" if i > 100 else "") / f"{i:03}.png")
    (folder / "007.png").write_text("no image")
    (folder / "notes.txt").write_text("no image, and not taken for one")
    return folder


def program(data: Path, output: Path, *more: Any) -> list[str]:
    arguments = ["embed", "--data", data, "--output", output, "--text", "red circle", "--shard-size", 8]
    return list(map(str, [*arguments, "--batch-size", 3, "--num-workers", 1, *more]))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "new" / "embeddings"
    main(program(data, output, "--num-workers", 0))
    return output


def check_same(output: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in output.iterdir()) == names
    for name in names:
        assert pq.read_table(output / name).equals(pq.read_table(expected / name)), name


def test_content_of_the_shards(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert len(list(uninterrupted.iterdir())) == SHARDS
    # As in the README.
    rows = pd.read_parquet(uninterrupted)
    good = rows.dropna(subset="embeddings")
    embeddings = np.stack(good["embeddings"]).reshape(len(good), 8, 64)

    assert rows["id"].tolist() == [f"{'more/' if i > 100 else ''}{i:03}.png" for i in range(IMAGES)]
    assert rows["row"].tolist() == list(range(IMAGES))
    assert rows.index[rows["error"].notna()].tolist() == [7]
    assert "007.png is not an image" in rows["error"][7]
    assert good["row"].tolist() == [i for i in range(IMAGES) if i != 7]
    assert embeddings.dtype == np.float32
    model, params = fq.from_pretrained(DEFAULT_MODEL)
    some = [0, 6, 7, 150, 201]
    batch = fq.Processor.from_pretrained(DEFAULT_MODEL)([data / good["id"].iloc[i] for i in some], "red circle")
    apply = jax.jit(model.apply)
    expected = apply({"params": params}, **batch).query_embeddings
    np.testing.assert_allclose(embeddings[some], expected, atol=1e-5)

    loaded = datasets.load_dataset("parquet", data_dir=str(uninterrupted), cache_dir=str(tmp_path), split="train")
    assert loaded.with_format("numpy")[150]["embeddings"].tolist() == rows["embeddings"][150].tolist()


def start(arguments: Sequence[str], **details: Any) -> subprocess.Popen[str]:
    command = [BIN / "flax-qformer", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **details)


def shards(output: Path) -> int:
    return len(list(output.glob("*.parquet")))


@pytest.mark.slow
def test_a_stopped_run_resumes_with_any_number_of_processes(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "embeddings"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        before = shards(output)
        process = start(program(data, output))
        while shards(output) < before + 3 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == code, stderr
        assert before + 3 <= shards(output) < SHARDS
    assert (
        f"stopped with {SHARDS - shards(output)} shards to go; run the same command to write them"
        in stderr.splitlines()[-1]
    )
    # As a full disk or a crash of the machine may leave it.
    first = min(output.iterdir())
    first.write_bytes(first.read_bytes()[:-100])

    link = tmp_path / "link"
    link.symlink_to(data)
    both = [start(program(name, output, "--process", i, 2)) for i, name in enumerate((data, link))]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "13 shards of 26, the share of process 0 of 2: 104 rows, 1 with an error" in outputs[0][0]
    assert "13 shards of 26, the share of process 1 of 2: 99 rows, 0 with an error" in outputs[1][0]
    (rewritten,) = [line for line in outputs[0][1].splitlines() if line.endswith(": writing it again")]
    assert f"{first} is not a complete shard" in rewritten
    assert "Traceback" not in "".join(err for _, err in outputs)
    assert not any("leaked" in err for _, err in outputs)
    check_same(output, uninterrupted)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_ctrl_c_while_workers_start(data: Path, tmp_path: Path) -> None:
    """A terminal sends the signal to all processes; workers must not end before the program has handled it."""
    process = start(program(data, tmp_path / "embeddings"), start_new_session=True)

    def is_worker(folder: Path) -> bool:
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            return parent == str(process.pid) and b"spawn_main" in (folder / "cmdline").read_bytes()
        return False

    while not any(map(is_worker, Path("/proc").glob("[0-9]*"))) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT, stderr
    assert "Traceback" not in stderr
    assert "stopping after the work so far is saved" in stderr
    assert stderr.splitlines()[-1].endswith("shards to go; run the same command to write them")


@pytest.mark.slow
def test_kills_at_random_moments(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    print("seed", seed := time.time_ns())
    rng = random.Random(seed)
    output = tmp_path / "embeddings"
    for _ in range(40):
        process = start(program(data, output))
        # During the start, or at a random moment of the work.
        wanted, limit = shards(output) + rng.randrange(1, 8), time.monotonic() + rng.choice([rng.random() * 9, 300])
        while process.poll() is None and shards(output) < wanted and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        print(number.name, process.returncode, shards(output))
        if process.returncode == 0:
            break
    assert process.returncode == 0, stderr
    check_same(output, uninterrupted)


def test_runs_that_cannot_resume_are_refused(
    data: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *more: Any, data: Path = data, output: Path = uninterrupted) -> None:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(program(data, output, "--num-workers", 0, *more))
        (line,) = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert line.startswith("flax-qformer embed: ")
        assert message in line

    before = {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}
    refused("other settings: --truncate was False and is now True; --shard-size was 8", "--truncate", "--shard-size", 9)
    refused("--embedding-dtype was float32 and is now float16. Set them back", "--embedding-dtype", "float16")
    fewer = tmp_path / "fewer"
    shutil.copytree(data, fewer)
    (fewer / "000.png").unlink()
    refused("of other images (203 then, 202 now, by their ids)", data=fewer)
    shutil.copyfile(data / "001.png", fewer / "more" / "999.png")
    refused("of other images (203 then, 203 now, by their ids)", data=fewer)
    # Nothing is left to do. From another place and with another batch size, it is the same source.
    shutil.copytree(data, tmp_path / "moved")
    main(program(tmp_path / "moved", uninterrupted, "--batch-size", 9))
    assert "26 shards: 203 rows, 1 with an error" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir()} == before

    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"a": [1]}), other / "00000-of-00026.parquet")
    refused("00000-of-00026.parquet is no shard of embeddings", output=other)
    refused("lies inside the data", output=data / "embeddings")
    (other / "kept.parquet").touch()
    refused("other holds other files than shards, kept.parquet", output=other)
    refused("is not a folder", output=other / "kept.parquet")
    refused("cannot write", output=other / "kept.parquet" / "below")
    refused("no process 2 of 2; number them from 0 to 1", "--process", 2, 2, output=tmp_path / "out")
    refused("--num-workers is -1", "--num-workers", -1, output=tmp_path / "out")
    refused("--data names the images, and one --text goes for all", "--text", "dog", output=tmp_path / "out")
    refused("no file or folder none", "--model", "none/of/these", output=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused("empty has no rows; add images", data=tmp_path / "empty", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_and_only_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flax_qformer.commands.shards.SAMPLE", 64)
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(3):
        (broken / f"{i}.jpg").write_text("no image")
    output, model = tmp_path / "embeddings", tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL, model)
    command = program(broken, output, "--embedding-dtype", "float16", "--num-workers", 0, "--model", model)
    main(command)
    assert "1 shards: 3 rows, 3 with an error" in capsys.readouterr().out
    table = pq.read_table(output)
    assert table["embeddings"].null_count == 3
    assert str(table.schema.field("embeddings").type.value_type) == "halffloat"
    # The same model is recognised; then training changes it in the same place.
    main(command)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[len(weights) // 1000 * 500] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit):
        main(command)
    assert "model are others than those that the shards" in capsys.readouterr().err


def test_an_empty_text_is_a_text(data: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "images", tmp_path / "embeddings"
    folder.mkdir()
    shutil.copy(data / "000.png", folder)
    main(["embed", "--data", str(folder), "--output", str(output), "--text", "", "--num-workers", "0"])
    model, params = fq.from_pretrained(DEFAULT_MODEL)
    batch = fq.Processor.from_pretrained(DEFAULT_MODEL)([data / "000.png"], "")
    expected = jax.jit(model.apply)({"params": params}, **batch).query_embeddings
    (embeddings,) = pd.read_parquet(output)["embeddings"]
    np.testing.assert_allclose(embeddings, expected.ravel(), atol=1e-5)
