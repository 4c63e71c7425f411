"""The package can be imported for each way to install it, from the repository's root and from elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import flax_qformer as fq, flax_qformer.convert.tables.qformer, flax_qformer.commands.main
fq.from_pretrained()
print(fq.__file__)
"""


def imported(path: Path, folder: Path) -> Path:
    """The path of the imported package, with one folder on the path; Python first searches the folder it runs in."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()).parents[1]


def test_a_path_is_enough(tmp_path: Path) -> None:
    assert imported(ROOT, tmp_path) == ROOT


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path: Path) -> None:
    """Needs the network to download setuptools. The wheel is built from the sdist."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT], check=True)
    archives = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix)
    assert [path.suffix for path in archives] == [".gz", ".whl"]
    for archive in archives:
        target = tmp_path / archive.suffix
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, archive]
        subprocess.run(install, check=True)
        assert (target / "flax_qformer" / "py.typed").is_file()
        assert imported(target, tmp_path) == target
        assert imported(target, ROOT) == ROOT
