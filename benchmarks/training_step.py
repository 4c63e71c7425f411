"""A training step (ITC, ITM, ITG, frozen tower) of the published stage-1 model, side by side with LAVIS's file.

    python benchmarks/training_step.py --lavis-python PYTHON

PYTHON has `tests/oracle/requirements-lavis.txt` installed. Both sides have random float32 weights, dropout and AdamW;
`--scan` scans our layers. The two sides run in turn, each in its own process. Prints medians, and the peak memory of
each process during a step, which needs Linux. Before the first step, glibc returns free memory (`malloc_trim`), such as
that of the compiler.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from flax_qformer.models.config import BLIP2_VIT_L
from side_by_side import Other, draw_batch, in_turn, times_faster

TEXT_TOKENS = 32
CLS, SEP = 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lavis-python", required=True, metavar="PYTHON")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scan", action="store_true", help="scan our layers")
    options = parser.parse_args()
    print("| batch | flax | LAVIS | times as fast | memory, flax | memory, LAVIS |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "config.json"
        config.write_text(json.dumps(BLIP2_VIT_L.to_dict()))
        for size in options.batch_sizes:
            batch = draw_batch(BLIP2_VIT_L, size, TEXT_TOKENS)
            batch["input_ids"][:, 0], batch["input_ids"][:, -1] = CLS, SEP
            file = Path(temporary) / f"{size}.npz"
            np.savez(file, **batch)
            flax, lavis, peaks = compare(options.lavis_python, config, file, options.rounds, options.scan)
            memory = " | ".join(f"{statistics.median(peaks[name]) / 1e9:.1f} GB" for name in ("flax", "LAVIS"))
            print(
                f"| {size} | {statistics.median(flax):.2f} s | {statistics.median(lavis):.2f} s "
                f"| {times_faster(flax, lavis):.2f} | {memory} |",
                flush=True,
            )


def compare(
    python: str, config: Path, batch: Path, rounds: int, scan: bool
) -> tuple[list[float], list[float], dict[str, list[float]]]:
    """Seconds of our steps and of LAVIS's, and the memory of both."""
    programs = {"flax": (sys.executable, "flax_training.py"), "LAVIS": (python, "torch_training.py")}
    peaks: dict[str, list[float]] = {name: [] for name in programs}
    with (
        Other(*programs["flax"], config, batch, *["scan"] * scan) as flax,
        Other(*programs["LAVIS"], config, batch) as lavis,
    ):
        sides: dict[str, Any] = {"flax": flax, "LAVIS": lavis}

        def step(name: str) -> float:
            answer = sides[name].request()
            peaks[name].append(answer["memory"])
            return answer["seconds"]

        figures = in_turn(rounds, {name: lambda name=name: step(name) for name in programs})
    return figures["flax"], figures["LAVIS"], {name: values[1:] for name, values in peaks.items()}


if __name__ == "__main__":
    main()
