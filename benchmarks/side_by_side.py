"""Shared by the benchmarks: programs in another Python, rounds of measurements, and a random model for both sides."""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import flax_qformer as fq
from flax_qformer.convert.tables.qformer import parameters

REST = 0.3
"""Seconds between two measurements: PyTorch's threads spin for a moment before they sleep."""


class Other:
    """A program in another Python that answers JSON requests, one a line. The end of the block ends it."""

    def __init__(self, python: str, program: str, *arguments: object) -> None:
        command = [python, str(Path(__file__).parent / program), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def request(self, **request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args[1]} ended before it answered")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def in_turn(rounds: int, measures: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """The figures of each measure, taken in turn, after a warm-up round that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds + 1):
        for name, measure in measures.items():
            time.sleep(REST)
            figures[name].append(measure())
    return {name: values[1:] for name, values in figures.items()}


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds that a JAX function takes until its result is ready."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def times_faster(ours: list[float], *others: list[float]) -> float:
    """The median over rounds of the other's time divided by ours; of several others, the one with the smallest median.

    Taking the fastest of each round would favour the others by chance.
    """
    other = min(others, key=statistics.median)
    return statistics.median(theirs / own for own, theirs in zip(ours, other, strict=True))


def product(dtype: str, size: int) -> Callable[[], jax.Array]:
    """A product of two square matrices by XLA, which measures the machine's speed.

    The matrices are random: with constants, a GPU draws less power and is 15 % faster.
    """
    left, right = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    run = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)).lower(left, right).compile()
    return lambda: run(left, right)


def operations(config: fq.Blip2Config, text_tokens: int) -> float:
    """Floating-point operations of the matrix products for one image and its text, as upstream computes them."""
    v, q = config.vision_config, config.qformer_config
    image, queries, tokens = v.num_positions, config.num_query_tokens, config.num_query_tokens + text_tokens
    vision = image * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size) + 2 * image**2 * v.hidden_size
    attention = tokens * 4 * q.hidden_size**2 + 2 * tokens**2 * q.hidden_size
    forward = tokens * 2 * q.hidden_size * q.intermediate_size
    cross = queries * 2 * q.hidden_size**2 + 2 * image * (v.hidden_size + queries) * q.hidden_size
    crossing = sum(q.has_cross_attention(layer) for layer in range(q.num_hidden_layers))
    products = (
        v.grid_size**2 * v.patch_size**2 * 3 * v.hidden_size
        + v.num_hidden_layers * vision
        + q.num_hidden_layers * (attention + forward)
        + crossing * cross
        + queries * 8 * q.hidden_size**2
    )
    return 2.0 * products


def write_model(folder: Path, config: fq.Blip2Config) -> int:
    """Write a model with random weights as upstream does; returns the size of the weights in bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {p.name: 0.02 * rng.standard_normal(p.torch_shape, np.float32) for p in parameters(config, "diffusers")}
    for name, value in tensors.items():
        value += "norm" in name.lower() and name.endswith("weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return (folder / "model.safetensors").stat().st_size


def draw_batch(config: fq.Blip2Config, size: int, text_tokens: int) -> dict[str, np.ndarray]:
    rng, side = np.random.default_rng(1), config.vision_config.image_size
    return {
        "pixel_values": rng.standard_normal((size, side, side, 3), np.float32),
        "input_ids": rng.integers(10, config.qformer_config.vocab_size, (size, text_tokens), np.int32),
        "attention_mask": np.ones((size, text_tokens), np.int32),
    }
