"""Plan the drawing of pictures on TPUs, without one: the compiled programs of the pipeline, on one chip of a pod."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_qformer.checkpoints.parts import DRAWING_PARTS
from flax_qformer.checkpoints.pipelines import LAVIS_SCHEDULER, SD_1_5
from flax_qformer.checkpoints.reading import as_dtype
from flax_qformer.diffusion.denoising import Conditions, decoder, denoising_loop, encode_prompts, state_specs
from flax_qformer.diffusion.schedulers import scheduler_from_config
from flax_qformer.errors import InputError, first_line
from flax_qformer.parallel.mesh import BATCH, check_divides, mesh_context
from flax_qformer.parallel.partition_rules import shardings
from flax_qformer.planning.planner import COMPILER, Chip, chip_of, flops, memory_needed, pod_of, shard_bytes, with_unit
from flax_qformer.planning.traffic import count_traffic

QUERIES = 16
"""Subject vectors in a prompt."""


@dataclass(frozen=True)
class ProgramPlan:
    """A compiled program on one chip of a pod; in bytes, FLOPs and seconds.

    Attributes:
      runs: how often it runs for a batch of pictures; all other numbers are of one run.
      flops: FLOPs of the model's products and convolutions.
      executed_flops: with the padding of attention's kernels.
      memory_traffic: bytes read from and written to the chip's memory; None if the program does not fit.
      sent: bytes that the chip sends to others.
      peak: memory at the fullest moment, with the program's arguments.
      seconds: lower bounds by compute, memory and interconnect.
    """

    runs: int
    flops: float
    executed_flops: float
    memory_traffic: float | None
    sent: float | None
    peak: float
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def least(self) -> float:
        """The least seconds of all runs."""
        return self.runs * self.seconds[self.bound]


@dataclass(frozen=True)
class GenerationPlan:
    """A batch of pictures on a pod.

    Attributes:
      batch: pictures, over all chips.
      parameters: bytes of the parameters on a chip.
      headroom: free memory of a chip in the largest program; the missing memory if negative.
      programs: text encoder, denoising step, decoder.
      pictures_per_second: of the whole pod, at best; None if a program does not fit.
      share_of_peak: the model's FLOPs in that time, as a share of the chip's peak in bfloat16.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    batch: int
    size: str
    steps: int
    parameters: float
    headroom: float
    programs: dict[str, ProgramPlan]
    pictures_per_second: float | None
    share_of_peak: float | None

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def bound(self) -> str:
        """What limits the longest program, or "memory capacity" if one does not fit."""
        return max(self.programs.values(), key=lambda program: program.least).bound if self.fits else "memory capacity"

    def __str__(self) -> str:
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        chips = f"{self.chips} chip{'s' * (self.chips > 1)}"
        lines = [
            f"{self.topology}, {chips} as {mesh}; {self.batch} pictures of {self.size} in {self.steps} steps; "
            "on each chip:",
            f"  {'parameters':24} {with_unit(self.parameters, 'B'):>14}",
            f"  {'headroom' if self.fits else 'missing':24} {with_unit(abs(self.headroom), 'B'):>14}",
        ]
        for name, program in self.programs.items():
            lines.append(f"  {name}, {program.runs} run{'s' * (program.runs > 1)}, each:")
            rows = [("peak memory", with_unit(program.peak, "B")), ("products", with_unit(program.flops, "FLOP"))]
            if program.memory_traffic is not None and program.sent is not None:
                rows.append(("products with padding", with_unit(program.executed_flops, "FLOP")))
                rows.append(("to and from memory", with_unit(program.memory_traffic, "B")))
                if program.sent:
                    rows.append(("to other chips", with_unit(program.sent, "B")))
                rows += [(f"time for {kind}", f"{1e3 * least:.3g} ms") for kind, least in program.seconds.items()]
            lines += [f"    {label:22} {value:>14}" for label, value in rows]
        if self.pictures_per_second is None or self.share_of_peak is None:
            lines.append("does not fit; try a smaller `batch`, or more chips")
        else:
            lines.append(
                f"at best {self.pictures_per_second:.3g} pictures/s: {self.bound} binds, "
                f"{self.batch / self.pictures_per_second:.3g} s a batch, {self.share_of_peak:.0%} of the peak"
            )
        return "\n".join(lines)


def plan_generation(
    topology: str,
    batch: int,
    *,
    size: tuple[int, int] = (512, 512),
    steps: int = 50,
    mesh: str = "data=-1",
    dtype: str = "bfloat16",
) -> GenerationPlan:
    """Compile the programs that draw a batch of guided pictures with Stable Diffusion 1.5's sizes.

    Parameters are in `dtype`. The subject's photo is read once for all pictures, and is not in the plan.

    Args:
      topology: as Google names it, such as v5e:4x4.
      batch: pictures, over all chips.
      size: width and height in pixels.
      steps: of the published scheduler, PNDM, which calls the UNet once more.
      mesh: as the `mesh` setting of training.

    Raises:
      InputError: libtpu is not installed, an argument is unfit, or the text of a compiled program is not understood.
    """
    chip, pod = chip_of(topology), pod_of(topology, mesh)
    check_divides(batch, pod, "`batch`")
    modules, params = _parts(as_dtype(dtype), pod)
    factor = modules["vae"].config.downscale
    if any(side % factor for side in size):
        raise InputError(f"`size` is {size[0]}x{size[1]}; both must be multiples of {factor}")
    latents = (batch, size[1] // factor, size[0] // factor, modules["unet"].config.in_channels)
    programs = _programs(modules, params, latents, steps, pod)
    plans = {name: _plan_program(program, chip, pod, topology) for name, program in programs.items()}
    parameters = shard_bytes(params)
    # The parameters of the other programs stay in memory.
    needed = max(
        plans[name].peak + parameters - shard_bytes(program.arguments[0]) for name, program in programs.items()
    )
    rate = share = None
    if needed <= chip.memory:
        seconds = sum(plan.least for plan in plans.values())
        rate = batch / seconds
        share = sum(plan.runs * plan.flops for plan in plans.values()) / seconds / chip.flops
    return GenerationPlan(
        topology=topology,
        chips=pod.size,
        mesh=dict(pod.shape),
        batch=batch,
        size=f"{size[0]}x{size[1]}",
        steps=steps,
        parameters=parameters,
        headroom=chip.memory - needed,
        programs=plans,
        pictures_per_second=rate,
        share_of_peak=share,
    )


def _parts(dtype: jnp.dtype, pod: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """The modules by name, and the shapes and shardings of their parameters."""
    modules, params = {}, {}
    for name, values in SD_1_5.items():
        part = DRAWING_PARTS[name]
        config = part.config_class.from_dict(values)
        modules[name] = part.model_class(config, dtype=dtype, param_dtype=dtype)
        shapes = jax.eval_shape(modules[name].init, jax.random.key(0), *part.inputs(config))["params"]
        params[name] = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, shardings(shapes, pod))
    return modules, params


@dataclass(frozen=True)
class Program:
    """A function, the shapes and shardings of its arguments, the parameters first, and how often it runs."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    runs: int


def _programs(
    modules: dict[str, Any], params: dict[str, Any], latents: tuple[int, ...], steps: int, pod: Mesh
) -> dict[str, Program]:
    """The programs of a batch of pictures; latents: their shape."""

    def array(shape: tuple[int, ...], kind: Any, spec: PartitionSpec | None = None) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(pod, spec or PartitionSpec()))

    encoder = modules["text_encoder"]
    batch, length, width = latents[0], encoder.config.max_position_embeddings, encoder.config.hidden_size

    def encode(params: Any, ids: Any, subjects: Any, negative: Any) -> Any:
        return encode_prompts(encoder, params, ids, subjects, negative, begin=2, repeats=1)

    prompts = (
        array((batch, length - QUERIES), jnp.int32, BATCH),
        array((batch, QUERIES, width), jnp.float32, BATCH),
        array((batch, length), jnp.int32, BATCH),
    )
    scheduler: Any = scheduler_from_config(LAVIS_SCHEDULER)
    state = jax.eval_shape(lambda: scheduler.set_timesteps(scheduler.create_state(), steps, latents))
    calls = len(state.timesteps)
    state = jax.tree.map(lambda leaf, spec: array(leaf.shape, leaf.dtype, spec), state, state_specs(state, latents))
    text, samples = array((batch, length, width), encoder.dtype, BATCH), array(latents, jnp.float32, BATCH)
    conditions = Conditions(
        text=text,
        negative=text,
        guidance_scale=array((), jnp.float32),
        control_images=(),
        control_scales=array((calls, 0), jnp.float32),
        seed=array((), jnp.uint32),
    )
    # The number of steps is an argument of the loop, so the program's text has the work of one step.
    loop_arguments = ({"unet": params["unet"]}, conditions, samples, state, *[array((), jnp.int32)] * 2)
    # The compiled functions have options of this machine's backend; the functions inside have none.
    loop: Any = denoising_loop(modules["unet"], (), scheduler)
    decode: Any = decoder(modules["vae"])
    return {
        "text encoder": Program(encode, (params["text_encoder"], *prompts), 1),
        "denoising step": Program(loop.__wrapped__, loop_arguments, calls),
        "decoder": Program(decode.__wrapped__, (params["vae"], samples), 1),
    }


def _plan_program(program: Program, chip: Chip, pod: Mesh, topology: str) -> ProgramPlan:
    with mesh_context(pod if pod.size > 1 else None):
        traced = jax.jit(program.function).trace(*program.arguments)
    useful, executed = (flops(traced.jaxpr.jaxpr, platform) / pod.size for platform in (None, "tpu"))
    try:
        compiled = traced.lower().compile(COMPILER)
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error), chip.memory)
        if needed is None:
            raise InputError(f"the program does not compile for {topology}: {first_line(error)}") from None
        return ProgramPlan(program.runs, useful, executed, None, None, needed, {"compute": math.inf})
    peak, traffic = compiled.memory_analysis().peak_memory_in_bytes, count_traffic(compiled.as_text())
    sent = sum(traffic.wire.values())
    seconds = {
        "compute": executed / chip.flops,
        "memory": traffic.memory / chip.memory_rate,
        "interconnect": sent / chip.link_rate,
    }
    return ProgramPlan(program.runs, useful, executed, traffic.memory, sent, float(peak), seconds)
