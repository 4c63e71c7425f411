"""Measure and plot how the cost of a forward pass grows with the batch, the text and the image.

    python benchmarks/scaling.py

The published geometry with random weights; positions are interpolated for larger images. Each point is the median of
several runs. Writes `benchmarks/scaling.png`.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt

import flax_qformer as fq
from flax_qformer.compilation import compiler_options
from flax_qformer.models.config import BLIP_DIFFUSION
from side_by_side import draw_batch, operations, seconds, write_model

BATCH, TEXT, IMAGE = 1, 16, 224
BATCHES = (1, 2, 4, 8, 16, 32, 64)
TEXTS = (8, 16, 32, 64, 128, 256, 512)
IMAGES = (224, 280, 336, 392, 448)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, BLIP_DIFFUSION)
        model, params = fq.from_pretrained(folder, options.dtype, param_dtype=options.dtype)

    def measure(batch: int = BATCH, text: int = TEXT, image: int = IMAGE) -> tuple[float, float]:
        """Seconds and operations of a forward pass."""
        config, fitted = fq.interpolate_positions(model.config, params, image)
        sized = type(model)(config, dtype=options.dtype, param_dtype=options.dtype)

        @partial(jax.jit, compiler_options=compiler_options())
        def run(params: Any, inputs: Any) -> jax.Array:
            return sized.apply({"params": params}, **inputs).query_embeddings

        inputs = jax.device_put(draw_batch(config, batch, text))
        seconds(lambda: run(fitted, inputs))
        took = statistics.median(seconds(lambda: run(fitted, inputs)) for _ in range(options.rounds))
        print(f"batch {batch:3}, text {text:3}, image {image}: {took:7.3f} s", flush=True)
        return took, batch * operations(config, text)

    panels = {
        "images in a batch": (BATCHES, [measure(batch=batch) for batch in BATCHES]),
        "tokens of text": (TEXTS, [measure(text=text) for text in TEXTS]),
        "pixels along a side": (IMAGES, [measure(image=image) for image in IMAGES]),
    }
    figure, all_axes = plt.subplots(1, len(panels), sharey=True, figsize=(12, 3.6), layout="constrained")
    for axes, (label, (values, points)) in zip(all_axes, panels.items(), strict=True):
        took, work = zip(*points, strict=True)
        axes.plot(values, took, "o-", label="seconds")
        axes.plot(values, [took[0] * part / work[0] for part in work], "--", label="as the operations grow")
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.set_xticks(values, values)
        axes.minorticks_off()
        axes.legend()
    figure.suptitle(f"A forward pass in {options.dtype}; otherwise {BATCH} image of {IMAGE} pixels and {TEXT} tokens")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
