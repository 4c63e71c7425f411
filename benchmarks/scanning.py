"""Compile and run a forward pass of the published geometry, with layers one by one and scanned (`scan_layers`).

    python benchmarks/scanning.py

The weights are random. Both are measured in turn, and medians are printed. Needs 2 GB of disk in the temporary folder
and 10 GB of memory.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import flax_qformer as fq
from flax_qformer.models.config import BLIP_DIFFUSION
from side_by_side import draw_batch, in_turn, seconds, times_faster, write_model

TEXT_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| dtype, batch | one by one | compile | in a loop | compile | one by one is faster |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, BLIP_DIFFUSION)
        for dtype in options.dtypes:
            for size in options.batch_sizes:
                row, programs = [f"{dtype}, {size}"], {}
                for scans in (False, True):
                    programs[scans], took = compile_forward(folder, dtype, size, scans)
                    row += ["", f"{took:.1f} s"]
                runs = {scans: lambda run=run: seconds(run) for scans, run in programs.items()}
                figures = in_turn(options.rounds, runs)
                row[1], row[3] = (f"{statistics.median(figures[scans]):.2f} s" for scans in (False, True))
                print(f"| {' | '.join(row)} | {times_faster(figures[False], figures[True]):.2f} |", flush=True)


def compile_forward(folder: Path, dtype: str, size: int, scans: bool) -> tuple[Callable[[], Any], float]:
    """A forward pass on a random batch, and the seconds to compile it."""
    model, params = fq.from_pretrained(folder, dtype=dtype, param_dtype=dtype)
    if scans:
        config = dataclasses.replace(model.config, scan_layers=True)
        model, params = type(model)(config, dtype=dtype, param_dtype=dtype), fq.stack_layers(params)
    batch = jax.device_put(draw_batch(model.config, size, TEXT_TOKENS))
    forward = jax.jit(lambda params, batch: model.apply({"params": params}, **batch).query_embeddings)
    compiled: list[Any] = []
    took = seconds(lambda: compiled.append(forward.lower(params, batch).compile()))
    return lambda: compiled[0](params, batch), took


if __name__ == "__main__":
    main()
