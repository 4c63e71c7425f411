"""On a GPU in bfloat16, beside upstream under `torch.compile`: a forward pass in large batches, and whole pictures.

    python benchmarks/gpu.py --upstream-python PYTHON
    python benchmarks/gpu.py --toy                        # a small model, on any device

PYTHON has `tests/oracle/requirements.txt` and a PyTorch for the GPU installed; without it, only our side is measured.
The peak is the speed of XLA's own product of two large matrices in the same run.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

# PyTorch shares the GPU.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax
from diffusion import GUIDANCE, Drawing
from diffusion import TOY as DRAWING_TOY

import flax_qformer as fq
from flax_qformer.checkpoints.pipelines import SD_1_5
from flax_qformer.models.config import BLIP_DIFFUSION
from forward import PRODUCT_SIZE, Bench
from side_by_side import Other, in_turn, product, seconds, times_faster

STEPS = 50
PICTURE_OPERATIONS = 84.4e12
"""Of a picture in 50 steps of PNDM: 51 guided calls of the UNet at 1.607e12, and the decoder at 2.51e12."""

TOY = fq.Blip2Config(
    vision_config=dataclasses.replace(
        BLIP_DIFFUSION.vision_config, hidden_size=64, intermediate_size=128, num_hidden_layers=2, image_size=56
    ),
    qformer_config=dataclasses.replace(
        BLIP_DIFFUSION.qformer_config, vocab_size=50, hidden_size=48, intermediate_size=96, num_hidden_layers=2
    ),
    num_query_tokens=8,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream-python", metavar="PYTHON")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="a small model, to try the script")
    options = parser.parse_args()
    sizes = options.batch_sizes or ([2, 4] if options.toy else [64, 256])
    print(jax.devices()[0].device_kind)
    print("| batch | flax | torch.compile | times as fast | share of the peak | memory, flax | memory, PyTorch |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(TOY if options.toy else BLIP_DIFFUSION, Path(temporary), options.upstream_python)
        for size in sizes:
            result = bench.run("bfloat16", size, options.rounds, ("compiled",), repeats=10)
            rates = {
                name: f"{size / statistics.median(values):.1f} images/s" for name, values in result.figures.items()
            }
            faster = "-"
            if "compiled" in rates:
                faster = f"{times_faster(result.figures['flax'], result.figures['compiled']):.2f}"
            memory = " | ".join(f"{value / 1e9:.1f} GB" if value else "-" for value in result.memory)
            print(
                f"| {size} | {rates['flax']} | {rates.get('compiled', '-')} | {faster} "
                f"| {bench.rate(result, size):.0%} | {memory} |",
                flush=True,
            )
    draw_pictures(options)


def upstream_picture(other: Other) -> float:
    request = {"task": "picture", "dtype": "bfloat16", "compiled": True, "steps": STEPS}
    return float(other.request(**request, guidance=GUIDANCE)["seconds"])


def draw_pictures(options: argparse.Namespace) -> None:
    """Seconds per picture of 512x512 in 50 guided steps, batch 1 and 8."""
    multiply, size = product("bfloat16", PRODUCT_SIZE["cpu" if options.toy else "gpu"]), 64 if options.toy else 512
    print("| pictures | flax | torch.compile | times as fast | share of the peak |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        drawing = Drawing(DRAWING_TOY if options.toy else SD_1_5, size, STEPS, Path(temporary))
        other = None
        if options.upstream_python:
            other = Other(options.upstream_python, "torch_diffusion.py", temporary)
        for batch in (1, 8):
            program = drawing.programs("bfloat16", batch)["picture"]
            measures = {"flax": partial(seconds, program), "product": partial(seconds, multiply, 10)}
            if other:
                measures["compiled"] = partial(upstream_picture, other)
            figures = in_turn(3, measures)
            ours = statistics.median(figures["flax"]) / batch
            theirs = faster = "-"
            if other:
                theirs = f"{statistics.median(figures['compiled']) / batch:.3f} s"
                faster = f"{times_faster(figures['flax'], figures['compiled']):.2f}"
            peak = 2 * PRODUCT_SIZE["cpu" if options.toy else "gpu"] ** 3 / statistics.median(figures["product"])
            share = "-" if options.toy else f"{PICTURE_OPERATIONS / ours / peak:.0%}"
            print(f"| {batch} | {ours:.3f} s each | {theirs} | {faster} | {share} |", flush=True)


if __name__ == "__main__":
    main()
