"""Run the notebooks: `python notebooks/run.py` saves their outputs, `--check` changes nothing.

Each notebook runs alone in an empty folder, without the hub. It fails on an error, and if all notebooks together take
longer than `LIMIT` seconds. The new and the saved outputs must come from a complete run, with each figure drawn and
nothing on stderr. With `--check` the package must be installed, not imported from the checkout: a notebook opened
elsewhere, such as in Colab, has no checkout.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
LIMIT = 300
LARGEST = 600_000
"""Largest size of a notebook in bytes, so that it opens quickly on the web."""
INSTALL = """\
# Install the package if it is missing. For a GPU add "jax[cuda12]" or "jax[cuda13]", as its driver allows.
import importlib.util

if importlib.util.find_spec("flax_qformer") is None:
    %pip install -q "flax-qformer[train]\""""
"""The first code cell of each notebook."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run them and write nothing")
    check = parser.parse_args().check
    os.environ["HF_HUB_OFFLINE"] = "1"
    if check and not is_installed():
        sys.exit("flax_qformer is not installed, or only editable; install it with pip install '.[notebooks]'")
    problems, total = [], 0.0
    for path in NOTEBOOKS:
        started = time.monotonic()
        fresh = run(path)
        seconds = time.monotonic() - started
        print(f"{path.name}: {seconds:.0f} s", flush=True)
        total += seconds
        if not check:
            nbformat.write(fresh, path)
        kept = nbformat.read(path, nbformat.NO_CONVERT)
        notebook_problems = faults(fresh) + faults(kept)
        if path.stat().st_size > LARGEST:
            notebook_problems.append(f"it has {path.stat().st_size} bytes; draw smaller pictures")
        problems += [f"{path.name}: {problem}" for problem in dict.fromkeys(notebook_problems)]
    print(f"together: {total:.0f} s of {LIMIT}")
    if total > LIMIT:
        problems.append("they take too long")
    sys.exit("\n".join(problems) or None)


def is_installed() -> bool:
    """Whether the package is imported from outside the checkout."""
    package = importlib.util.find_spec("flax_qformer")
    return package is not None and not Path(str(package.origin)).is_relative_to(Path(__file__).resolve().parents[1])


def run(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run, without metadata that differs between runs."""
    fresh = nbformat.read(path, nbformat.NO_CONVERT)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            fresh,
            timeout=LIMIT,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    fresh.metadata["language_info"] = {"name": "python"}
    return fresh


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Problems of a notebook's outputs."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if code[0].source != INSTALL:
        return ["its first cell does not install the package; copy that of another notebook"]
    outputs = [output for cell in code for output in cell.outputs]
    problems = [f"it says {output.text.strip()}" for output in outputs if output.get("name") == "stderr"]
    if not outputs or [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        problems.append("its outputs are not those of a complete run; run python notebooks/run.py")
    data = [output.get("data", {}) for output in outputs]
    if any(item.get("text/plain", "").startswith("<Figure") and "image/png" not in item for item in data):
        problems.append("a figure is not drawn")
    return problems


if __name__ == "__main__":
    main()
