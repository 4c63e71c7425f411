"""Memory and speed of `flax-qformer embed --data`, with few and with many images.

    python benchmarks/embedding.py

Draws folders of 100 and of 10,000 images, embeds them with the model inside the package, and prints the highest
resident memory of the program and of each process that decodes, images per second, and the rate of the model alone.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import PIL.Image

import flax_qformer as fq
from flax_qformer.model_files import DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--side", type=int, default=64, help="of an image, in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=2)
    options = parser.parse_args()
    print(f"the model alone: {forward(options.batch_size):.0f} images/s")
    with tempfile.TemporaryDirectory() as temporary:
        for number in options.images:
            folder = Path(temporary) / str(number)
            folder.mkdir()
            for i in range(number):
                pixels = np.random.default_rng(i).integers(0, 256, (options.side, options.side, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(folder / f"{i}.jpg")
            command = [Path(sys.executable).parent / "flax-qformer", "embed", "--data", folder, "--text", "red circle"]
            command += ["--output", f"{folder}.out", "--batch-size", options.batch_size]
            peaks, rate = watch([str(word) for word in [*command, "--num-workers", options.num_workers]])
            print(f"{number} images: {' + '.join(f'{peak / 1024:.0f}' for peak in peaks)} MB, {rate:.0f} images/s")


def forward(size: int) -> float:
    model, params = fq.from_pretrained(DEFAULT_MODEL)
    batch = fq.Processor.from_pretrained(DEFAULT_MODEL)([PIL.Image.new("RGB", (64, 64))] * size, "red circle")
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch).query_embeddings)
    run(params, batch).block_until_ready()
    begun = time.perf_counter()
    for _ in range(20):
        embeddings = run(params, batch)
    embeddings.block_until_ready()
    return 20 * size / (time.perf_counter() - begun)


def watch(command: list[str]) -> tuple[list[int], float]:
    """The highest resident memory in KiB of a process and its children, and images per second after the first batch."""
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            try:
                # Threads have children of their own.
                tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
                children = [int(pid) for task in tasks for pid in task.read_text().split()]
                for pid in (process.pid, *children):
                    status = Path(f"/proc/{pid}/status").read_text()
                    peaks[pid] = int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
            except (OSError, IndexError):
                pass
            time.sleep(0.05)
        told.seek(0)
        progress = told.read()
    assert process.returncode == 0, progress
    # As the progress bar counts: 64/100 [00:03<00:01, ...
    seen = [(int(done), 60 * int(m) + int(s)) for done, m, s in re.findall(r"(\d+)/\d+ \[(\d+):(\d+)<", progress)]
    (first, begun), (last, ended) = next(item for item in seen if item[0]), seen[-1]
    return sorted(peaks.values(), reverse=True), (last - first) / max(ended - begun, 1)


if __name__ == "__main__":
    main()
