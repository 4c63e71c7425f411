"""Compare two recordings: `python tests/oracle/check.py RECORDED AGAIN`, in an environment of `requirements.txt`."""

import sys
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    recorded, again = Path(sys.argv[1]), Path(sys.argv[2])
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) for folder in (recorded, again)]
    assert files[0] == files[1], f"other files: {set(files[0]) ^ set(files[1])}"
    for name in files[0]:
        if name.endswith(".npz"):
            compare_arrays(name, dict(np.load(recorded / name)), dict(np.load(again / name)))
    state = [torch.load(folder / "torch" / "training.pth")["model"] for folder in (recorded, again)]
    assert state[0].keys() == state[1].keys()
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    print(f"{len(files[0])} files agree")


def compare_arrays(file: str, recorded: dict[str, np.ndarray], again: dict[str, np.ndarray]) -> None:
    assert recorded.keys() == again.keys(), f"{file}: other arrays: {recorded.keys() ^ again.keys()}"
    for name, value in recorded.items():
        if value.dtype.kind == "U":
            assert again[name] == value, f"{file}: {name}"
            continue
        # In float64, another processor gives the same float32 or an adjacent one.
        scale = max(1.0, float(np.abs(value.astype(np.float64)).max(initial=0)))
        np.testing.assert_allclose(again[name], value, atol=1e-9 * scale, rtol=2e-7, err_msg=f"{file}: {name}")


if __name__ == "__main__":
    main()
