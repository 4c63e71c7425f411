"""Uploads to a fake hub on loopback."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flax_qformer as fq
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.training.push import model_card
from flax_qformer.training.settings import TrainSettings, to_yaml

SCRIPT = """
import json, os, sys
import numpy as np, jax
from huggingface_hub import hf_hub_download
import flax_qformer as fq
from flax_qformer.commands.main import main

run, model = sys.argv[1:]
answers = {"failed": 0}
main(["push", run, "someone/model", "--license", "mit"])
with open(hf_hub_download("someone/model", "README.md")) as card:
    answers["card"] = "base_model: someone/base" in card.read()
_, pushed = fq.from_pretrained("someone/model")
_, ours = fq.from_pretrained(run + "/model")
answers["loaded"] = jax.tree.all(jax.tree.map(np.array_equal, pushed, ours))
tokens = [fq.Processor.from_pretrained(name)(text="a red circle")["input_ids"] for name in ("someone/model", model)]
answers["tokens"] = np.array_equal(*tokens)
main(["push", model, "someone/model"])
for options in (["--private"], ["--license=mit"], []):
    if not options:
        del os.environ["HF_TOKEN"]
    try:
        main(["push", model, "someone/model", *options])
    except SystemExit as end:
        answers["failed"] += end.code == 2
print(json.dumps(answers))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished training run."""
    folder = tmp_path / "my_run"
    settings = TrainSettings(data=str(tmp_path / "photos"), output=str(folder), model="someone/base", steps=20)
    folder.mkdir()
    (folder / "settings.yaml").write_text(to_yaml(settings))
    lines: list[dict[str, Any]] = [
        {"step": 10, "loss": 5.0},
        {"step": 20, "loss": 2.5},
        {"step": 20, "images": 9, "text_to_image/recall@1": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "lo')
    model, params = fq.from_pretrained(DEFAULT_MODEL)
    fq.save_pretrained(folder / "model", model, params, fq.Processor.from_pretrained(DEFAULT_MODEL))
    (folder / "model" / "notes.txt").write_text("nobody else's business")
    return folder


def test_push(tmp_path: Path, hub: Any, run: Path) -> None:
    """A pushed run can be loaded; another model replaces it in one commit; without a token nothing is pushed."""
    served, environment = hub
    served.others = ("/api/models/someone/base",)
    served.commits = []
    (served.files / "figure.png").write_text("stays")
    other = tmp_path / "other"
    fq.export_checkpoint(run / "model", other)
    (other / "README.md").write_text("My own card.")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, run, other],
        env={**environment, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"failed": 3, "card": True, "loaded": True, "tokens": True}
    assert f"pushed {run / 'model'} to {environment['HF_ENDPOINT']}/someone/model" in done.stdout
    public, licensed, refused = [line for line in done.stderr.splitlines() if line.startswith("flax-qformer push: ")]
    assert "someone/model exists and is public" in public
    assert f"{other} has a README.md; name the license there" in licensed
    assert "401" in refused
    assert refused.endswith("run `hf auth login`, or set HF_TOKEN to a token that may write to someone/model")
    assert "/someone/model.git/info/lfs/objects/batch" in served.requests
    assert [deleted > 0 for _, deleted in served.commits] == [False, True]
    left = {path.relative_to(served.files).as_posix() for path in served.files.rglob("*") if path.is_file()}
    assert left == {path.name for path in other.iterdir()} | {"figure.png"}
    assert (served.files / "README.md").read_text() == "My own card."


def test_the_model_card(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card shows the model, settings and metrics, and no paths."""
    monkeypatch.setattr(
        "flax_qformer.training.push._if_public", lambda name, kind: name if name == "someone/base" else None
    )
    card = model_card(run / "model", run, "someone/model", "mit")
    for part in (
        "library_name: flax-qformer\n",
        "license: mit\n",
        "base_model: someone/base\n",
        "# model\n",
        'fq.from_pretrained("someone/model")',
        "| steps | 20 |",
        "| train | qformer heads |",
        "| loss | 2.5 | 20 |",
        "| text_to_image/recall@1 | 0.75 | 20 |",
    ):
        assert part in card
    assert str(tmp_path) not in card
    assert "datasets" not in card


def test_invalid_pushes(tmp_path: Path, run: Path) -> None:
    for model, repo_id, message in (
        ("nothing", "someone/model", "there is no folder .*nothing"),
        (".", "someone/model", "is not the folder of a model or of a training run"),
        ("my_run/model", "model", "'model' is not the name of a repository; give ORG/NAME"),
        ("my_run/model", "some one/model", "is not the name of a repository"),
        ("my_run", "someone/model", "cannot be pushed to someone/model .*offline.*; check the name and the connection"),
    ):
        with pytest.raises(fq.InputError, match=message):
            fq.push_to_hub(tmp_path / model, repo_id)
    config = run / "model" / "config.json"
    config.write_text(config.read_text().replace("Blip2QFormerModel", "Blip2ForConditionalGeneration"))
    with pytest.raises(fq.InputError, match="is a Blip2ForConditionalGeneration by its config.json; take"):
        fq.push_to_hub(run, "someone/model")
