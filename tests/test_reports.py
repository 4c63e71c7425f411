"""Reports of a run: progress, samples of an evaluation, Weights & Biases."""

import importlib
import io
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flax_qformer as fq
from flax_qformer import progress
from flax_qformer.progress import Progress, print_line
from flax_qformer.training import evaluation, metrics
from flax_qformer.training.metrics import MetricsLogger, Samples

SAMPLES = Samples([("a|b", "c")], {"retrieved": np.zeros((4, 6, 3), np.uint8)})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "flax_qformer")
    return caplog


def test_progress_without_a_terminal_is_few_plain_lines(log: Any, monkeypatch: Any, capsys: Any) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)

    def run(**details: Any) -> list[str]:
        log.clear()
        with Progress(200, "image", "reading", **details) as shown:
            for number in range(1, 201):
                clock.now += 1
                shown.advance(text="loss 1" if number == 7 else "")
        return log.messages

    assert run() == [
        "reading 7/200 images: loss 1",
        "reading 67/200 images: 1 images/s",
        "reading 127/200 images: 1 images/s",
        "reading 187/200 images: 1 images/s",
    ]
    assert run(line_every=math.inf, initial=0) == ["reading 7/200 images: loss 1"]
    logging.getLogger("flax_qformer").setLevel(logging.WARNING)
    assert run() == []
    assert capsys.readouterr().err == ""


def test_results_and_a_bar_on_one_terminal_do_not_mix(log: Any, monkeypatch: Any) -> None:
    both = Terminal()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    handler = logging.StreamHandler(both)
    logging.getLogger().addHandler(handler)
    with Progress(3, "image") as shown:
        for number in range(3):
            print_line(f"{number}.png: a caption")
            logging.getLogger("flax_qformer").warning("a warning %d", number)
            shown.advance()
    logging.getLogger().removeHandler(handler)
    lines = [line.strip() for line in re.split(r"[\r\n]", both.getvalue())]
    reported = [line for line in lines if "a caption" in line or "warning" in line]
    assert reported == [
        f"{number}.png: a caption" if is_caption else f"a warning {number}"
        for number in range(3)
        for is_caption in (True, False)
    ]
    assert any("3/3" in line and "image/s" in line for line in lines)


@pytest.mark.parametrize(
    ("count", "warning"),
    [
        (3, "recall@10 of 3 images is always 1; hold out at least 100 images"),
        (10, "recall@10 of 10 images is always 1"),
        (50, "recall@10 of 50 images is 0.20 by chance; hold out at least 100 images"),
        (100, ""),
    ],
)
def test_a_small_split_is_named(count: int, warning: str, log: Any) -> None:
    evaluation.warn_of_few_images(count)
    assert warning in log.text
    assert bool(warning) == bool(log.text)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The calls to a fake package `wandb`, which only records them."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(
        """
calls = []
class Error(Exception): pass
class Settings(dict): pass
def Image(picture): return picture.shape
def Table(columns, data): return data
class Run:
    def define_metric(self, *names, **details): calls.append((names, details))
    def log(self, figures): calls.append(figures)
    def finish(self, exit_code=0): calls.append("finished")
def init(**details):
    if details["config"].get("fails"): raise Error("no key\\nmore")
    calls.append(details)
    return Run()
"""
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield importlib.import_module("wandb").calls
    del sys.modules["wandb"]


def test_a_resumed_run_continues_in_weights_and_biases(fake_wandb: list[Any], tmp_path: Path) -> None:
    metrics.check_reporters(["wandb"])
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        with MetricsLogger(run, step - 1, ["wandb"], {"steps": 9}) as log:
            log.write(step, {"loss": 0.5})
            log.show(step, SAMPLES)
    first, second = (call for call in fake_wandb if isinstance(call, dict) and "id" in call)
    assert first["id"] == second["id"] == (run / "wandb" / "run_id").read_text()
    assert (first["resume"], first["config"], first["name"], first["dir"]) == ("allow", {"steps": 9}, "run", str(run))
    assert fake_wandb.count("finished") == 2
    assert {"step": 2, "loss": 0.5} in fake_wandb
    assert {"step": 2, "samples/captions": [("a|b", "c")], "samples/retrieved": (4, 6, 3)} in fake_wandb
    assert not (run / "tensorboard").exists()
    with pytest.raises(fq.InputError, match=r"cannot start the run \(no key\); run `wandb login`"):
        MetricsLogger(run, 2, ["wandb"], {"fails": True})


def test_weights_and_biases_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The folder that wandb makes where it runs is not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    metrics.check_reporters(["tensorboard"])
    find: Callable[[str], Any] = metrics.importlib.util.find_spec
    monkeypatch.setattr(
        metrics.importlib.util, "find_spec", lambda name: None if (spec := find(name)) and spec.origin else spec
    )
    with pytest.raises(fq.InputError, match=r"pip install 'flax-qformer\[wandb\]'"):
        metrics.check_reporters(["tensorboard", "wandb"])
