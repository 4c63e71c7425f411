"""A forward pass in bfloat16 on a GPU, large batches, beside upstream under `torch.compile`.

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
from pathlib import Path

# PyTorch shares the GPU.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax

import flax_qformer as fq
from flax_qformer.models.config import BLIP_DIFFUSION
from forward import Bench
from side_by_side import times_faster

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


if __name__ == "__main__":
    main()
