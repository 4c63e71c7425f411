"""Upload a model to the hub, with a model card."""

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flax_qformer.checkpoints.loading import check_architecture
from flax_qformer.checkpoints.model_files import PARAMS, TOKENIZER_FILES, locate
from flax_qformer.errors import InputError, first_line
from flax_qformer.json_files import read_json
from flax_qformer.models.config import Blip2Config

CARD = "README.md"

MODEL_FILES = [
    "config.json",
    "preprocessor_config.json",
    *TOKENIZER_FILES,
    f"{PARAMS}/*",
    "model*.safetensors*",
    "pytorch_model*.bin*",
]
"""Patterns of the files that belong to a model; `*` also matches slashes."""

TEXT_SETTINGS = ("train", "optimizer", "dtype", "mesh")
"""Settings that the card shows although they are texts. Other texts can be paths or private names."""


def push_to_hub(
    model: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model to the hub in one commit, with a model card; `flax-qformer push`.

    The model's files replace those of a model in the repository; other files there stay. The card shows the settings
    and the last metrics of the training run, without paths and without names that are not public on the hub. A
    README.md in the model's folder is uploaded in place of a generated card.

    Args:
      model: the folder of a model, as `save_pretrained`, `convert_checkpoint` and `export_checkpoint` write it, or the
        folder of a training run, whose `model` is uploaded.
      repo_id: ORG/NAME. The repository is created if it does not exist.
      private: create the repository as a private one; by default the organisation's settings decide.
      license: the license that the card names, such as apache-2.0.
      token: access token of the hub; by default that of `hf auth login` or of the variable HF_TOKEN.

    Returns:
      A line on what was done.

    Raises:
      InputError: the folder holds no model or one of another class, or the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import filter_repo_objects

    folder, run = _model_and_run(Path(model))
    if not _is_repo_id(repo_id):
        raise InputError(f"{repo_id!r} is not the name of a repository; give ORG/NAME, such as my-name/my-model")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = list(filter_repo_objects(files, allow_patterns=[*MODEL_FILES, CARD]))
    if license and CARD in files:
        raise InputError(f"`license` goes into a generated card, but {folder} has a {CARD}; name the license there")
    operations: list[Any] = [CommitOperationAdd(name, files[name]) for name in names]
    try:
        if CARD not in files:
            operations.append(CommitOperationAdd(CARD, model_card(folder, run, repo_id, license).encode()))
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        repository = api.model_info(repo_id)
        if private and not repository.private:
            raise InputError(f"{repo_id} exists and is public; make it private on the hub, or give another name")
        # Files of an earlier upload would be read as a part of this model.
        stored = [file.rfilename for file in repository.siblings or ()]
        stale = [name for name in filter_repo_objects(stored, allow_patterns=MODEL_FILES) if name not in files]
        operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(repo_id, operations, commit_message="Upload model")
    except InputError:
        raise
    # Errors of the hub and of the libraries that upload have many types.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "check the name and the connection, and try again"
        if status in (401, 403):
            remedy = f"run `hf auth login`, or set HF_TOKEN to a token that may write to {repo_id}"
        elif "metadata" in str(error):
            remedy = f"correct the metadata at the top of {CARD}, or the license"
        raise InputError(f"{folder} cannot be pushed to {repo_id} ({first_line(error)}); {remedy}") from None
    return f"pushed {folder} to {api.endpoint}/{repo_id}"


def model_card(folder: Path, run: Path | None, repo_id: str, license: str | None = None) -> str:
    """The text of a model card: a description, how to load the model, and its training settings and metrics.

    Args:
      folder: of the model.
      run: folder of the training run, if there is one: its settings.yaml and metrics.jsonl are read.
      repo_id: ORG/NAME of the repository on the hub.
      license: by the hub's identifier.
    """
    from huggingface_hub import ModelCardData

    from flax_qformer.training.metrics import METRICS
    from flax_qformer.training.run_folder import SETTINGS
    from flax_qformer.training.settings import read_yaml

    settings = read_yaml(run / SETTINGS) if run else {}
    base_model, dataset = _if_public(settings.get("model"), "model"), _if_public(settings.get("data"), "dataset")
    details = ModelCardData(
        library_name="flax-qformer",
        license=license,
        base_model=base_model,
        datasets=dataset and [dataset],
        tags=["flax", "jax", "blip-2", "blip-diffusion", "q-former"],
    )
    load = (
        f'import flax_qformer as fq\n\nmodel, params = fq.from_pretrained("{repo_id}")\n'
        f'processor = fq.Processor.from_pretrained("{repo_id}")\n'
        'output = model.apply({"params": params}, **processor(images=image, text="dog"))'
    )
    parts = [
        f"---\n{details.to_yaml()}\n---",
        f"# {repo_id.split('/')[1]}",
        _description(folder / "config.json"),
        f"```python\n{load}\n```",
    ]
    shown = {"model": base_model, "data": dataset} | {name: _shown(name, value) for name, value in settings.items()}
    rows = [(name, value) for name, value in shown.items() if value]
    if rows:
        parts += ["## Training settings", _table(("setting", "value"), rows)]
    metrics = _last_metrics(run / METRICS) if run else []
    if metrics:
        parts += ["## Metrics", _table(("metric", "value", "step"), metrics)]
    return "\n\n".join(parts) + "\n"


def _model_and_run(path: Path) -> tuple[Path, Path | None]:
    """The folder of a model, and the folder of the training run that wrote it, if any."""
    from flax_qformer.training.run_folder import SETTINGS

    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give the folder of a model or of a training run")
    if (path / SETTINGS).is_file():
        if not (path / "model").is_dir():
            raise InputError(f"{path} holds no model yet; the training run writes it after its last step")
        path = path / "model"
    files = locate(path)
    if files.pipeline or not (path / "config.json").is_file() or not (files.params or files.weights):
        raise InputError(f"{path} is not the folder of a model or of a training run; `flax-qformer convert` writes one")
    check_architecture(files)
    run = path.resolve().parent
    return path, run if (run / SETTINGS).is_file() else None


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _if_public(name: str | None, kind: str) -> str | None:
    """The name, if it names a public repository."""
    from huggingface_hub import HfApi

    is_candidate = name is not None and _is_repo_id(name) and not os.path.exists(name)
    return name if is_candidate and HfApi(token=False).repo_exists(str(name), repo_type=kind) else None


def _description(path: Path) -> str:
    """A description of a model, from its config.json."""
    config, classes = Blip2Config.from_json(path), read_json(path).get("architectures")
    what = "BLIP-Diffusion's Q-Former: it turns an image and the name of its subject into subject embeddings."
    if classes == ["Blip2ForPreTraining"]:
        what = "A Q-Former with the heads of BLIP-2's first training stage: it searches, matches and captions images."
    vision, qformer = config.vision_config, config.qformer_config
    return (
        f"{what} The vision tower has {vision.num_hidden_layers} layers and reads images of "
        f"{vision.image_size}x{vision.image_size} pixels; the Q-Former has {qformer.num_hidden_layers} layers of width "
        f"{qformer.hidden_size} and {config.num_query_tokens} queries."
    )


def _shown(name: str, value: Any) -> str | None:
    """The text of a setting, if it is a number or cannot hold anything private."""
    if name == "group_learning_rates":
        return ", ".join(f"{group} {rate:g}" for group, rate in value.items()) or None
    items = value if isinstance(value, list) else [value]
    is_shown = name in TEXT_SETTINGS or all(isinstance(item, int | float) for item in items)
    return " ".join(map(str, items)) if is_shown else None


def _last_metrics(path: Path) -> list[tuple[str, str, str]]:
    """The last value of each metric of a run, and its step."""
    last: dict[str, tuple[str, str, str]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        # A kill may have cut off the last line.
        with contextlib.suppress(ValueError):
            figures = json.loads(line)
            step = str(figures.pop("step"))
            last |= {name: (name, f"{value:g}", step) for name, value in figures.items()}
    return list(last.values())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *escaped))
