"""Time to load the published geometry from upstream's folder, side by side with upstream; and to convert it.

    python benchmarks/load.py --upstream-python PYTHON

PYTHON is that of an environment of `tests/oracle/requirements.txt`. Each figure is taken in a process of its own,
without its imports; loading is run in turn with upstream's, and medians are printed. Needs 6 GB of disk in the
temporary folder.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flax_qformer.model_files import DEFAULT_MODEL
from flax_qformer.models.config import BLIP_DIFFUSION
from side_by_side import write_model

OURS = """
import sys, time
import jax
import flax_qformer as fq
jax.devices()
start = time.perf_counter()
model, params = fq.from_pretrained(sys.argv[1])
jax.block_until_ready(params)
print(time.perf_counter() - start)
"""

UPSTREAM = """
import sys, time
from diffusers.pipelines.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from transformers import Blip2Config
config = Blip2Config.from_pretrained(sys.argv[1])
config.tokenizer = sys.argv[2]
start = time.perf_counter()
model = Blip2QFormerModel.from_pretrained(sys.argv[1], config=config)
print(time.perf_counter() - start)
"""

CONVERT = """
import sys, time
from pathlib import Path
import flax_qformer as fq
start = time.perf_counter()
fq.convert_checkpoint(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], overwrite=True)
print(time.perf_counter() - start)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream-python", required=True, metavar="PYTHON")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "upstream"
        size = write_model(folder, BLIP_DIFFUSION)
        times: dict[str, list[float]] = {"from_pretrained": [], "upstream's": [], "copy": [], "convert": []}
        peaks = []
        for _ in range(options.runs):
            times["upstream's"] += run(options.upstream_python, UPSTREAM, folder, DEFAULT_MODEL)
            start = time.perf_counter()
            shutil.copyfile(folder / "model.safetensors", folder / "copy")
            times["copy"].append(time.perf_counter() - start)
            (folder / "copy").unlink()
            times["from_pretrained"] += run(sys.executable, OURS, folder)
        for _ in range(options.runs):
            seconds, peak = run(sys.executable, CONVERT, folder, Path(temporary) / "flax", DEFAULT_MODEL)
            times["convert"].append(seconds)
            peaks.append(peak * 1024)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{size / 1e9:.2f} GB, medians of {options.runs} runs")
    for name, value in medians.items():
        print(f"{name:16} {value:5.2f} s  ({min(times[name]):.2f} to {max(times[name]):.2f})")
    for which, copy in (("a copy", medians["copy"]), ("the fastest copy", min(times["copy"]))):
        ratio = (medians["upstream's"] + copy) / medians["from_pretrained"]
        print(f"upstream's and {which} of the file take {ratio:.2f} times as long as from_pretrained")
    print(f"convert's peak memory is {statistics.median(peaks) / size:.2f} times the file")


def run(python: str, program: str, *arguments: Path) -> list[float]:
    done = subprocess.run([python, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


if __name__ == "__main__":
    main()
