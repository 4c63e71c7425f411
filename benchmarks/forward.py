"""A forward pass of the published geometry, side by side with upstream, eager and compiled.

    python benchmarks/forward.py --upstream-python PYTHON

PYTHON is that of an environment of `tests/oracle/requirements.txt`. Weights are drawn and the same for both sides. The
measurements are taken in turn, round after round, with XLA's own product among them; medians are printed. Needs 2 GB of
disk in the temporary folder and 12 GB of memory.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image

import flax_qformer as fq
from flax_qformer.compilation import compiler_options
from flax_qformer.model_files import DEFAULT_MODEL
from flax_qformer.models.config import BLIP_DIFFUSION
from side_by_side import Other, draw_batch, in_turn, operations, product, seconds, times_faster, write_model

TEXT_TOKENS = 16
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192}
"""Of the matrices whose product is the measure."""


@dataclass
class Result:
    """Seconds of a batch round by round, and what belongs to them.

    Attributes:
      figures: of `flax`, `eager`, `compiled` and `product`, what of these was measured.
      compile_seconds: to trace and compile ours.
      difference: the largest between our query embeddings and those of whom we ran beside.
      memory: ours and theirs on a GPU, bytes.
    """

    figures: dict[str, list[float]]
    compile_seconds: float
    difference: float
    memory: tuple[int, int]


class Bench:
    """A drawn model on both sides. `other` is None to measure ours alone."""

    def __init__(self, config: fq.Blip2Config, folder: Path, python: str | None) -> None:
        self.config, self.folder = config, folder
        write_model(folder / "model", config)
        self.other = None
        if python:
            self.other = Other(python, "torch_forward.py", folder / "model", folder, folder, DEFAULT_MODEL)

    def run(self, dtype: str, size: int, rounds: int, modes: tuple[str, ...], repeats: int = 1) -> Result:
        batch = draw_batch(self.config, size, TEXT_TOKENS)
        np.savez(self.folder / f"{size}.npz", **batch)
        compiled, compile_seconds = self.forward(dtype, batch)
        theirs: dict[str, Any] = {}

        def ask(mode: str) -> float:
            assert self.other is not None
            theirs.update(self.other.ask(dtype=dtype, batch=size, compiled=mode == "compiled", repeats=repeats))
            return theirs["seconds"]

        multiply = product(dtype, PRODUCT_SIZE[jax.default_backend()])
        measures = {"flax": lambda: seconds(compiled, repeats), "product": lambda: seconds(multiply, repeats)}
        if self.other:
            measures |= {mode: lambda mode=mode: ask(mode) for mode in modes}
        figures, difference = in_turn(rounds, measures), 0.0
        if self.other:
            ours, answer = np.asarray(compiled()[0], np.float32), np.load(self.folder / "answer.npy")
            difference = float(np.abs(ours - answer).max())
        statistics_of_memory = jax.devices()[0].memory_stats() or {}
        memory = (statistics_of_memory.get("peak_bytes_in_use", 0), theirs.get("memory", 0))
        return Result(figures, compile_seconds, difference, memory)

    def forward(self, dtype: str, batch: dict[str, np.ndarray]) -> tuple[Callable[..., Any], float]:
        """A forward pass of ours, on this batch or another like it, and the seconds to compile it."""
        model, params = fq.from_pretrained(self.folder / "model", dtype=dtype, param_dtype=dtype)
        params, batch = jax.device_put((params, batch))

        @partial(jax.jit, compiler_options=compiler_options())
        def run(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            output = model.apply({"params": params}, **batch)
            return output.query_embeddings, output.last_hidden_state

        compiled: list[Any] = []
        took = seconds(lambda: compiled.append(run.lower(params, batch).compile()))
        return lambda batch=batch: compiled[0](params, batch), took

    def embed(self, dtype: str, size: int, rounds: int) -> float:
        """The speed from image files on (decode, resize, run) as a share of that of the bare forward pass."""
        processor = fq.Processor.from_pretrained(self.folder / "model", config=self.config, tokenizer=DEFAULT_MODEL)
        files = [self.folder / f"{i}.jpg" for i in range(size)]
        for i, file in enumerate(files):
            noise = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
            PIL.Image.fromarray(noise).resize((640, 480)).save(file)
        inputs = draw_batch(self.config, size, TEXT_TOKENS)
        run, _ = self.forward(dtype, inputs)

        def embed() -> np.ndarray:
            pixels = processor(files)["pixel_values"]
            return np.asarray(run({**inputs, "pixel_values": pixels})[0])

        figures = in_turn(rounds, {"bare": lambda: seconds(run), "embed": lambda: seconds(embed)})
        return times_faster(figures["embed"], figures["bare"])

    def rate(self, result: Result, size: int) -> float:
        """Operations in a second, as a share of those of XLA's own product."""
        ours = size * operations(self.config, TEXT_TOKENS) / statistics.median(result.figures["flax"])
        return ours / (2 * PRODUCT_SIZE[jax.default_backend()] ** 3 / statistics.median(result.figures["product"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream-python", required=True, metavar="PYTHON")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench, differences = Bench(BLIP_DIFFUSION, Path(temporary), options.upstream_python), {}
        print("| dtype, batch | flax | eager | compiled | times as fast | share of XLA's product | compile |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for dtype in options.dtypes:
            for size in options.batch_sizes:
                result = bench.run(dtype, size, options.rounds, ("eager", "compiled"))
                figures = result.figures
                flax, eager, compiled = (statistics.median(figures[name]) for name in ("flax", "eager", "compiled"))
                faster = times_faster(figures["flax"], figures["eager"], figures["compiled"])
                print(
                    f"| {dtype}, {size} | {flax:.2f} s | {eager:.2f} s | {compiled:.2f} s | {faster:.2f} "
                    f"| {bench.rate(result, size):.0%} | {result.compile_seconds:.1f} s |",
                    flush=True,
                )
                differences[f"{dtype}, {size}"] = f"{result.difference:.1e}"
        embedding = bench.embed(options.dtypes[0], options.batch_sizes[-1], options.rounds)
        print(f"embed, {options.dtypes[0]}, {options.batch_sizes[-1]}: {embedding:.2f} of the bare forward pass")
        print(f"largest differences from upstream: {differences}")


if __name__ == "__main__":
    main()
