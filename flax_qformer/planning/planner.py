"""Plan a training step on a TPU pod: the TPU's compiler, which runs on any machine, reports what the step needs.

`generation` plans drawing in the same way.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding

from flax_qformer.checkpoints.loading import as_dtype, read_config
from flax_qformer.errors import InputError, first_line
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.models.selection import Selection
from flax_qformer.parallel.mesh import BATCH, check_divides, named_mesh
from flax_qformer.parallel.partition_rules import shardings
from flax_qformer.planning.traffic import count_traffic
from flax_qformer.training.optimizer import make_optimizer
from flax_qformer.training.step import TrainState, make_train_step


@dataclass(frozen=True)
class Chip:
    """Peaks of a chip: bfloat16 FLOP/s, bytes of memory, bytes/s to memory, bytes/s sent to other chips.

    `pod` is the shape of a small pod, `largest` that of the largest.
    """

    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    pod: str
    largest: tuple[int, ...]


CHIPS = {
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 200e9, "4x4", (16, 16)),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 600e9, "4x4x4", (16, 20, 28)),
    "v6e": Chip(918e12, 31.25 * 2**30, 1638e9, 400e9, "4x4", (16, 16)),
}
"""By the first part of a topology's name. Source: the page on each version at cloud.google.com/tpu/docs; the link
rate is half of the bidirectional rate there. The memory is libtpu 0.0.42's limit for a program."""


LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment in which libtpu does not look for chips, warn about missing ones, or refuse to be loaded twice."""

COMPILER: dict[str, Any] = {
    "optimization_level": 9,  # XLA's EFFORT_O0; JAX 0.10 accepts only its number
    "xla_tpu_enable_windowed_einsum_for_all_gather": False,
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}
"""Lowest effort, and no matrix products split to overlap with communication: a third of the compile time. The schedule
is worse; sizes and sent bytes are the same."""


@dataclass(frozen=True)
class Plan:
    """A training step on one chip of a pod; in bytes, FLOPs and seconds.

    Attributes:
      parameters, optimizer: memory that is kept from step to step.
      temporaries: peak memory of a step besides these.
      headroom: free memory of the chip; the missing memory if negative.
      flops: FLOPs of the matrix products of a step, including recomputed ones.
      memory_traffic: bytes read from and written to the chip's memory.
      wire: bytes sent, by kind of collective; `collectives` is their number in the program.
      seconds: lower bounds of this program by compute, memory and interconnect; a step takes at least the longest.
        With more effort, the compiler may need less memory traffic.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    batch: int
    parameters: float
    optimizer: float
    temporaries: float
    headroom: float
    flops: float
    memory_traffic: float | None
    wire: dict[str, float]
    collectives: dict[str, int]
    seconds: dict[str, float]
    fits: bool = True
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        rows = [
            ("parameters", with_unit(self.parameters, "B")),
            ("optimizer", with_unit(self.optimizer, "B")),
            ("temporaries", with_unit(self.temporaries, "B")),
            ("headroom" if self.fits else "missing", with_unit(abs(self.headroom), "B")),
            ("products", with_unit(self.flops, "FLOP")),
        ]
        if self.fits:
            rows.append(("to and from memory", with_unit(self.memory_traffic or 0, "B")))
            for kind, sent in sorted(self.wire.items()):
                rows.append((f"{self.collectives[kind]} {kind}", with_unit(sent, "B sent")))
            rows += [(f"time for {name}", f"{1e3 * least:.3g} ms") for name, least in self.seconds.items()]
        lines = [f"{self.topology}, {self.chips} chips as {mesh}; {self.batch} images a step; on each chip:"]
        lines += [f"  {name:24} {value:>14}" for name, value in rows]
        if self.fits:
            least = max(self.seconds.values())
            lines.append(f"at best {self.batch / least:,.0f} images/s: {self.bound} binds, {1e3 * least:.3g} ms a step")
        else:
            lines.append(f"does not fit; try {'; or '.join(self.advice) or 'more chips'}")
        return "\n".join(lines)

    @property
    def bound(self) -> str:
        """The longest of `seconds`, or "memory capacity" if the step does not fit."""
        return max(self.seconds, key=lambda name: self.seconds[name]) if self.fits else "memory capacity"


def plan(
    model: str,
    topology: str,
    batch: int,
    *,
    mesh: str = "data=-1",
    remat: bool = False,
    train: Selection = ("qformer", "heads"),
    text_length: int = 32,
    dtype: str = "bfloat16",
) -> Plan:
    """Compile the training step for a pod, without the pod.

    Args:
      model: a folder, hub id or `config.json`; weights are not read.
      topology: as Google names it, such as v5e:16x16.
      batch: images in a step, over all chips.
      mesh: as the `mesh` setting of training.
      remat: recompute the layers in the backward pass.
      text_length: tokens of a caption, padding included.

    Raises:
      InputError: libtpu is not installed, an argument is unfit, or the text of the compiled program is not understood.
    """
    chip = chip_of(topology)
    pod = pod_of(topology, mesh)
    check_divides(batch, pod, "`batch`")
    config = read_config(model).scanned()
    positions = config.qformer_config.max_position_embeddings
    if text_length > positions:
        raise InputError(f"`text_length` is {text_length}; the model has {positions} positions")
    if remat:
        config = config.recomputed()
    module = Blip2ForPreTraining(config, dtype=as_dtype(dtype))
    optimizer = make_optimizer(config, 1e-4)
    state, inputs = _state(module, optimizer, train, pod), _inputs(module, batch, text_length, pod)
    step: Any = make_train_step(module, optimizer, mesh=pod)
    traced = step.trace(state, inputs)
    kept = shard_bytes((state.trained, state.frozen)), shard_bytes(state.opt_state)
    described: dict[str, Any] = {
        "topology": topology,
        "chips": pod.size,
        "mesh": dict(pod.shape),
        "batch": batch,
        "parameters": kept[0],
        "optimizer": kept[1],
        "flops": flops(traced.jaxpr.jaxpr, "tpu") / pod.size,
    }
    try:
        compiled = traced.lower().compile(COMPILER)
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error), chip.memory)
        if needed is None:
            raise InputError(f"the step does not compile for {topology}: {first_line(error)}") from None
        temporaries, headroom = needed - sum(kept), chip.memory - needed
        advice = tuple(_advice(chip.memory, sum(kept), temporaries, shard_bytes(state.trained), batch, pod, remat))
        unknown: dict[str, Any] = {"memory_traffic": None, "wire": {}, "collectives": {}, "seconds": {}}
        return Plan(**described, **unknown, temporaries=temporaries, headroom=headroom, fits=False, advice=advice)
    # The peak includes the arguments; `temp_size_in_bytes` exceeds the peak.
    peak, traffic = compiled.memory_analysis().peak_memory_in_bytes, count_traffic(compiled.as_text())
    seconds = {
        "compute": described["flops"] / chip.flops,
        "memory": traffic.memory / chip.memory_rate,
        "interconnect": sum(traffic.wire.values()) / chip.link_rate,
    }
    return Plan(
        **described,
        temporaries=peak - sum(kept),
        headroom=chip.memory - peak,
        memory_traffic=traffic.memory,
        wire=traffic.wire,
        collectives=traffic.collectives,
        seconds=seconds,
    )


def flops(jaxpr: Any, platform: str | None = None) -> float:
    """FLOPs of the matrix products and convolutions that a program uses, once per iteration of a loop.

    XLA's own analysis counts a loop's body once, and no kernels. Of branches the largest counts; of the forms for
    different platforms, the one for `platform`, which by default is the plain form.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    total = 0.0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            sides = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(sides[axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            products = equation.outvars[0].aval.size * kernel.size // outputs
            total += 2.0 * products / math.prod(params["lhs_dilation"])
        inner = [flops(jaxpr, platform) for jaxpr in _inner(params)]
        if kind == "scan":
            total += params["length"] * sum(inner)
        elif kind == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * sum(inner)
        elif kind == "shard_map":  # its arrays are those of one device
            total += params["mesh"].size * sum(inner)
        elif kind == "cond":
            platforms = params.get("branches_platforms") or ()
            total += inner[_branch(platforms, platform)] if platforms else max(inner)
        else:
            total += sum(inner)
    return total


def _branch(platforms: Sequence[tuple[str, ...] | None], platform: str | None) -> int:
    """The index of a platform's form; None in `platforms` is the form for all others."""
    return next((i for i, names in enumerate(platforms) if names and platform in names), platforms.index(None))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def chip_of(topology: str) -> Chip:
    name = topology.split(":")[0]
    if name not in CHIPS or not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*)+", topology):
        raise InputError(f"{topology!r} is not a topology; take one such as v5e:16x16, of {', '.join(CHIPS)}")
    if topology.count("x") != CHIPS[name].pod.count("x"):
        raise InputError(f"{name} has no pods such as {topology}; take one such as {name}:{CHIPS[name].pod}")
    sides = sorted(map(int, topology.split(":")[1].split("x")))
    if any(side > most for side, most in zip(sides, CHIPS[name].largest, strict=True)):
        largest = "x".join(map(str, CHIPS[name].largest))
        raise InputError(f"{topology} is larger than any pod of {name}; the largest is {name}:{largest}")
    return CHIPS[name]


def pod_of(topology: str, mesh: str) -> Mesh:
    from jax.experimental import topologies

    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        # libtpu expects hosts of four chips unless it is told of a single chip.
        single = {"chips_per_host_bounds": (1, 1, 1)} if set(topology.split(":")[1]) <= set("1x") else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **single)
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
        pod = f"{topology.split(':')[0]}:{chip_of(topology).pod}"
        raise InputError(f"there is no pod {topology} ({first_line(error)}); take one such as {pod}") from None
    return named_mesh(mesh, described.devices)


def _state(module: Blip2ForPreTraining, optimizer: Any, train: Selection, pod: Mesh) -> TrainState:
    size = module.config.vision_config.image_size

    def create() -> TrainState:
        params = module.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), int))["params"]
        return TrainState.create(params, optimizer, train)

    shapes = jax.eval_shape(create)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings(shapes, pod)
    )


def _inputs(module: Blip2ForPreTraining, batch: int, text_length: int, pod: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    size, place = module.config.vision_config.image_size, NamedSharding(pod, BATCH)
    shapes = {
        "pixel_values": ((batch, size, size, 3), jnp.float32),
        "input_ids": ((batch, text_length), jnp.int32),
        "attention_mask": ((batch, text_length), jnp.int32),
        "image_id": ((batch,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(*shape, sharding=place) for name, shape in shapes.items()}


def shard_bytes(tree: Any) -> float:
    """Bytes of a tree's shards on one chip."""
    return float(
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )


def with_unit(value: float, unit: str) -> str:
    power = min(max(int(math.log10(value)) // 3, 0), 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def memory_needed(error: str, memory: float) -> float | None:
    """Memory needed by a step that does not fit, from the compiler's error; None if that is another error.

    The compiler's temporaries include the arguments.
    """
    if needed := re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds", error):
        return float(needed[1]) * UNITS[needed[2]]
    if beyond := re.search(r"[Ee]xceeded \w+ capacity by ([\d.]+)([KMGT]?)", error):
        return memory + float(beyond[1]) * UNITS[beyond[2]]
    return None


def _advice(
    memory: float, kept: float, temporaries: float, gradients: float, batch: int, pod: Mesh, remat: bool
) -> Iterator[str]:
    """Changes that may make the step fit. Temporaries grow with the batch, except the gradients."""
    parts = pod.shape["data"] * pod.shape["fsdp"]
    room, activations = memory - kept - gradients, max(temporaries - gradients, 1)
    if room > 0:
        if not remat:
            yield "`remat=True`, which keeps one layer's activations at a time"
        # For a step that does not fit, the compiler reduces memory further.
        fitting = int(batch * room / activations * 0.75) // parts * parts
        if fitting:
            yield f"`batch={fitting}`"
    if pod.shape["data"] > 1 and (kept + gradients) / pod.shape["data"] + activations < memory:
        tensor = f",tensor={pod.shape['tensor']}" if pod.shape["tensor"] > 1 else ""
        yield f"`mesh=fsdp=-1{tensor}`, which splits the parameters over all chips"
