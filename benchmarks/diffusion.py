"""The parts of the drawing pipeline at Stable Diffusion 1.5's size, side by side with upstream, eager and compiled.

    python benchmarks/diffusion.py --upstream-python PYTHON
    python benchmarks/diffusion.py --upstream-python PYTHON --toy         # small parts, to try the script

PYTHON has `tests/oracle/requirements.txt` installed. Both sides have the same random weights. Each round measures all
sides in turn; medians are printed. Needs 5 GB of disk in the temporary folder and 12 GB of memory.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# PyTorch shares the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from flax_qformer.checkpoints.parts import DRAWING_PARTS, DrawingPart, part_config, part_rows
from flax_qformer.checkpoints.pipelines import LAVIS_SCHEDULER, SD_1_5
from flax_qformer.diffusion.denoising import Conditions, decoder, denoising_loop, encode_prompts
from flax_qformer.diffusion.schedulers import scheduler_from_config
from side_by_side import Other, in_turn, seconds, times_faster

PARTS = ("text_encoder", "unet", "vae")
QUERIES, GUIDANCE = 16, 7.5
TASKS = ("text encoder", "guided step", "VAE decode", "picture")
TOY: dict[str, dict[str, Any]] = {
    "unet": {**SD_1_5["unet"], "block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 48},
    "vae": {**SD_1_5["vae"], "block_out_channels": [32, 32, 32, 32]},
    "text_encoder": {**SD_1_5["text_encoder"], "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2},
}


class Drawing:
    """Our side: the compiled programs of the pipeline, and their inputs.

    Args:
      configs: upstream's config of each part.
      size: side of the pictures.
      steps: of a whole picture.
      folder: where the weights and inputs are written for upstream.
    """

    def __init__(self, configs: dict[str, dict[str, Any]], size: int, steps: int, folder: Path) -> None:
        self.configs, self.folder = configs, folder
        self.factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        self.size, self.steps = size, steps
        for name in PARTS:
            part = DRAWING_PARTS[name]
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(configs[name]))
            save_file(
                dict(random_tensors(part, configs[name])),
                folder / name / f"{part.weights}.safetensors",
                {"format": "pt"},
            )

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        """What both sides are measured on, also written for upstream."""
        rng, side = np.random.default_rng(1), self.size // self.factor
        width = self.configs["text_encoder"]["hidden_size"]
        values = {
            "input_ids": rng.integers(10, 1000, (batch, 77 - QUERIES), np.int64),
            "negative_ids": rng.integers(10, 1000, (batch, 77), np.int64),
            "subjects": rng.standard_normal((batch, QUERIES, width), np.float32),
            "latents": rng.standard_normal((batch, side, side, 4), np.float32),
            "text": rng.standard_normal((2, batch, 77, self.configs["unet"]["cross_attention_dim"]), np.float32),
        }
        np.savez(self.folder / "inputs.npz", **values)
        return values

    def programs(self, dtype: str, batch: int) -> dict[str, Callable[[], jax.Array]]:
        """For each of `TASKS`, a function that runs it."""
        modules, params = {}, {}
        for name in PARTS:
            part = DRAWING_PARTS[name]
            config = part_config(part, self.configs[name], name)
            modules[name] = part.model_class(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
            tensors = dict(random_tensors(part, self.configs[name]))
            params[name] = unflatten_dict(
                {
                    row.path: jnp.asarray(tensors[row.name].transpose(row.order).reshape(row.shape), dtype)
                    for row in part_rows(part, config)
                },
                sep="/",
            )
        inputs = self.inputs(batch)
        scheduler: Any = scheduler_from_config(LAVIS_SCHEDULER)
        state = scheduler.set_timesteps(scheduler.create_state(), self.steps, inputs["latents"].shape)
        calls = len(state.timesteps)
        loop, decode = denoising_loop(modules["unet"], (), scheduler), decoder(modules["vae"])

        def encode() -> tuple[jax.Array, jax.Array | None]:
            arrays = inputs["input_ids"].astype(np.int32), inputs["subjects"], inputs["negative_ids"].astype(np.int32)
            return encode_prompts(modules["text_encoder"], params["text_encoder"], *arrays, begin=2, repeats=1)

        def denoise(text: Any, negative: Any, number: int) -> jax.Array:
            conditions = Conditions(text, negative, np.float32(GUIDANCE), (), np.zeros((calls, 0)), np.uint32(0))
            trees = {"unet": params["unet"]}
            return loop(trees, conditions, inputs["latents"], state, np.int32(0), np.int32(number))[0]

        negative, text = jnp.asarray(inputs["text"], dtype)
        return {
            "text encoder": lambda: encode()[0],
            "guided step": lambda: denoise(text, negative, 1),
            "VAE decode": lambda: decode(params["vae"], inputs["latents"]),
            "picture": lambda: decode(params["vae"], denoise(*encode(), calls)),
        }


def random_tensors(part: DrawingPart, values: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Random weights by upstream's names, for which activations neither vanish nor grow."""
    rng = np.random.default_rng(0)
    for row in part_rows(part, part_config(part, values, part.name)):
        shape = row.torch_shape
        if len(shape) == 1:
            value = np.full(shape, row.name.endswith("weight"), np.float32)
        else:
            value = rng.standard_normal(shape, np.float32) * (0.5 / np.prod(shape[1:])) ** 0.5
        yield row.name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream-python", metavar="PYTHON")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, help="side of the pictures (default: 512)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a whole picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="small parts, to try the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        drawing = Drawing(
            TOY if options.toy else SD_1_5, options.size or (64 if options.toy else 512), options.steps, folder
        )
        other = Other(options.upstream_python, "torch_diffusion.py", folder) if options.upstream_python else None
        modes = options.modes if other else []
        print("| dtype, batch, task | flax | " + " | ".join(modes) + " | times as fast | compile | difference |")
        print("| --- " * (5 + len(modes)) + "|")
        for dtype in options.dtypes:
            for size in options.batch_sizes:
                programs = drawing.programs(dtype, size)
                for task in options.tasks:
                    print(
                        row(f"{dtype}, {size}, {task}", task, dtype, options, programs[task], other, modes, folder),
                        flush=True,
                    )


def row(
    label: str,
    task: str,
    dtype: str,
    options: argparse.Namespace,
    program: Callable[[], jax.Array],
    other: Other | None,
    modes: list[str],
    folder: Path,
) -> str:
    """A row of the table."""
    first = seconds(program)

    def upstream(mode: str) -> float:
        assert other is not None
        request = {"task": task, "dtype": dtype, "compiled": mode == "compiled", "steps": options.steps}
        return float(other.request(**request, guidance=GUIDANCE)["seconds"])

    measures: dict[str, Callable[[], float]] = {"flax": partial(seconds, program)}
    measures |= {mode: partial(upstream, mode) for mode in modes}
    figures = in_turn(options.rounds, measures)
    cells = [f"{statistics.median(figures[name]):.3g} s" for name in measures]
    faster = difference = "-"
    if other:
        faster = f"{times_faster(figures['flax'], *[figures[mode] for mode in modes]):.2f}"
        ours, theirs = np.asarray(program(), np.float32), np.load(folder / "answer.npy")
        difference = f"{np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}"
    compiling = first - statistics.median(figures["flax"])
    return f"| {label} | {' | '.join(cells)} | {faster} | {compiling:.1f} s | {difference} |"


if __name__ == "__main__":
    main()
