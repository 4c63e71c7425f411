"""Build the API reference: `python .ci/docs/build.py OUTPUT`. A warning or a public name that is missing fails."""

import importlib
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import main as sphinx_build

PAGES = {"flax_qformer": "index.html", "flax_qformer.training": "training.html"}


def main() -> None:
    output = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as cache:
        status = sphinx_build(["-W", "--keep-going", "-q", "-d", cache, str(Path(__file__).parent), str(output)])
    if status:
        sys.exit(status)
    missing = []
    for module, page in PAGES.items():
        text = (output / page).read_text()
        names = [name for name in importlib.import_module(module).__all__ if not name.startswith("_")]
        missing += [f"{module}.{name}" for name in names if f'descname"><span class="pre">{name}<' not in text]
    sys.exit(f"the API reference lacks {', '.join(missing)}" if missing else None)


if __name__ == "__main__":
    main()
