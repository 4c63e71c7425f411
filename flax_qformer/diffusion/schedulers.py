"""Schedulers: which noise levels a picture passes through, and how one step leads to the next.

They equal those of diffusers 0.32.2 and have its Flax schedulers' interface: a scheduler is a frozen, hashable set of
config fields; what changes from step to step is a small state.

    scheduler = PNDMScheduler.from_config(config)
    state = scheduler.set_timesteps(scheduler.create_state(), num_inference_steps=50, shape=latents.shape)
    for timestep in state.timesteps:
        noise = unet(scheduler.scale_model_input(state, latents, timestep), timestep)
        latents, state = (out := scheduler.step(state, noise, timestep, latents)).prev_sample, out.state

Every method but `set_timesteps` and `padded` runs under `jax.jit` with traced arguments. `padded` gives states of
different numbers of steps the same shapes, so that one compiled loop, over `state.num_timesteps`, serves all of them.

Samples have any shape and layout. Arithmetic is in float32, and the result has the sample's dtype.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_qformer.diffusion.config import PartConfig
from flax_qformer.errors import InputError
from flax_qformer.json_files import read_json

FIELDS_OF_ALL = frozenset(
    "algorithm_type beta_end beta_schedule beta_start clip_sample clip_sample_range disable_corrector "
    "dynamic_thresholding_ratio euler_at_final final_sigmas_type flow_shift interpolation_type lambda_min_clipped "
    "lower_order_final noise_sampler_seed num_train_timesteps original_inference_steps predict_x0 prediction_type "
    "rescale_betas_zero_snr rho sample_max_value set_alpha_to_one sigma_data sigma_max sigma_min sigma_schedule "
    "skip_prk_steps solver_order solver_p solver_type steps_offset thresholding timestep_scaling timestep_spacing "
    "timestep_type trained_betas use_beta_sigmas use_exponential_sigmas use_flow_sigmas use_karras_sigmas "
    "use_lu_lambdas variance_type".split()
)
"""Fields of diffusers' schedulers whose configs are exchangeable. A scheduler ignores those that it does not have."""

NO_THRESHOLDING: Mapping[str, tuple[Any, ...]] = {"thresholding": (False, None)}


class SchedulerState(struct.PyTreeNode):
    """The state that all schedulers have.

    Attributes:
      timesteps: (n,) int32, from noise to picture: one for each call of the model.
      num_timesteps: how many of them are not padding, int32.
      num_inference_steps: the number that `set_timesteps` was called with, int32; None before.
      init_noise_sigma: standard deviation of the initial noise.
    """

    timesteps: jax.Array
    num_timesteps: jax.Array
    num_inference_steps: jax.Array | None
    init_noise_sigma: jax.Array


class PNDMState(SchedulerState):
    """The state of PNDM.

    Attributes:
      counter: steps done.
      ets: the last three model outputs, newest first, (3, *shape).
      cur_sample: the sample from which the current Runge-Kutta or first linear multistep step starts.
      cur_model_output: weighted sum of the outputs within a Runge-Kutta step.
    """

    counter: jax.Array
    ets: jax.Array
    cur_sample: jax.Array
    cur_model_output: jax.Array


class DPMSolverState(SchedulerState):
    """The state of DPM-Solver.

    Attributes:
      sigmas: noise level, relative to the signal, of each timestep, (n,).
      coefficients: a step of each order from each timestep as a linear combination, (solver_order, n,
        2 + solver_order): weights of the sample, of fresh noise, and of the converted model outputs, newest first.
      step_index: index of the next timestep; -1 before the first step.
      lower_order_nums: steps done, at most solver_order.
      model_outputs: the last converted model outputs, newest first, (solver_order, *shape).
    """

    sigmas: jax.Array
    coefficients: jax.Array
    step_index: jax.Array
    lower_order_nums: jax.Array
    model_outputs: jax.Array


StateT = TypeVar("StateT", bound=SchedulerState)


class SchedulerOutput(struct.PyTreeNode):
    """The sample at the next lower noise level, the state after the step, and the predicted picture where known."""

    prev_sample: jax.Array
    state: Any
    pred_original_sample: jax.Array | None = None


class SchedulerConfig(dict[str, Any]):
    """A scheduler's config as upstream's: a dictionary whose items are also attributes.

    `_use_default_values` lists the fields that were left at their defaults. `from_config` of another class replaces
    them by its own defaults.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the scheduler's config has no field {name!r}") from None


@dataclass(frozen=True)
class Scheduler(PartConfig):
    """Base of the schedulers: the training noise, and how timesteps are chosen."""

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
    }

    LAST_RESCALED_ALPHA: ClassVar[float] = 0.0

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.trained_betas, np.ndarray):
            object.__setattr__(self, "trained_betas", self.trained_betas.tolist())
        super().__post_init__()
        for name, choices in self.CHOICES.items():
            self._check_choices(name, choices)
        if not 1 <= self.num_train_timesteps <= 100_000 or self.steps_offset < 0:
            raise InputError("num_train_timesteps must be from 1 to 100000, and steps_offset at least 0")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise InputError(f"num_train_timesteps must be {len(self.trained_betas)}, the length of trained_betas")
        betas = np.asarray(self.trained_betas or (self.beta_start, self.beta_end), np.float32)
        if not ((betas > 0) & (betas < 1)).all():
            raise InputError("beta_start, beta_end and trained_betas must lie between 0 and 1")
        given = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}
        object.__setattr__(self, "_given", given)

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | str | Path | Scheduler", **overrides: Any) -> Self:
        """Build the scheduler from the config of this or of another class, as upstream's `from_config`.

        Args:
          config: the contents of a `scheduler_config.json`, the path of such a file or of its folder, or a scheduler.
          overrides: fields that replace the config's.

        Raises:
          InputError: a field is unknown, or has a value that is not supported.
        """
        config = _contents(config)
        defaults = config.get("_use_default_values", ())
        given = {name: value for name, value in config.items() if name not in defaults} | overrides
        own = {field.name for field in dataclasses.fields(cls)} | cls.FIXED.keys()
        scheduler = cls.from_dict({name: given[name] for name in given if name in own or name not in FIELDS_OF_ALL})
        object.__setattr__(scheduler, "_given", {n: v for n, v in given.items() if not n.startswith("_")})
        return scheduler

    @property
    def config(self) -> SchedulerConfig:
        """All fields, and those of other classes that the config had."""
        given: dict[str, Any] = self._given  # type: ignore[attr-defined]
        defaults = [field.name for field in dataclasses.fields(self) if field.name not in given]
        return SchedulerConfig(given | self.to_dict() | {"_use_default_values": defaults})

    def to_dict(self) -> dict[str, Any]:
        """The fields as `scheduler_config.json` has them, with the class's name."""
        return {"_class_name": type(self).__name__} | super().to_dict()

    @cached_property
    def _betas(self) -> np.ndarray:
        """Variance of the noise that each training timestep adds, float32."""
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float32)
        if self.beta_schedule == "linear":
            return _linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.beta_schedule == "scaled_linear":
            return np.square(_linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps))
        n = self.num_train_timesteps
        kept = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return np.asarray([min(1 - kept[i + 1] / kept[i], 0.999) for i in range(n)], np.float32)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the signal in the variance at each training timestep, (num_train_timesteps,) float32."""
        # torch.cumprod, too, multiplies in float64 and rounds each product.
        alphas = np.cumprod(1 - self._betas, dtype=np.float64)
        if getattr(self, "rescale_betas_zero_snr", False):
            # Zero signal at the last timestep (arXiv 2305.08891, algorithm 1).
            roots = np.sqrt(alphas)
            alphas = np.square((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1])))
            alphas[-1] = self.LAST_RESCALED_ALPHA
        return alphas.astype(np.float32)

    def create_state(self) -> SchedulerState:
        """The state before `set_timesteps`: all training timesteps."""
        timesteps = jnp.arange(self.num_train_timesteps, dtype=jnp.int32)[::-1]
        return SchedulerState(timesteps, jnp.int32(len(timesteps)), None, jnp.float32(1))

    def set_timesteps(self, state: SchedulerState, num_inference_steps: int, shape: Iterable[int] = ()) -> Any:
        """The state at the start of a run.

        Args:
          state: from `create_state`.
          num_inference_steps: steps from noise to picture.
          shape: shape of the samples.

        Raises:
          InputError: the number of steps is not possible.
        """
        return self._started(state, self._spaced(num_inference_steps), num_inference_steps)

    def _started(self, state: SchedulerState, timesteps: np.ndarray, num_inference_steps: int) -> SchedulerState:
        if timesteps[0] >= self.num_train_timesteps:
            raise InputError(
                f"{num_inference_steps} steps with a steps_offset of {self.steps_offset} start at timestep "
                f"{timesteps[0]:.0f}, and training had {self.num_train_timesteps}; use fewer steps or a smaller offset"
            )
        return state.replace(
            # `jnp.asarray` compiles a copy for each length.
            timesteps=jax.device_put(timesteps.astype(np.int32)),
            num_timesteps=jnp.int32(len(timesteps)),
            num_inference_steps=jnp.int32(num_inference_steps),
        )

    def _spaced(self, n: int) -> np.ndarray:
        """n timesteps in descending order."""
        last = self.num_train_timesteps
        self._check_steps(n)
        if self.timestep_spacing == "linspace":
            timesteps: np.ndarray = np.linspace(0, last - 1, n).round()[::-1]
        elif self.timestep_spacing == "leading":
            timesteps = np.arange(n)[::-1] * (last // n) + self.steps_offset
        else:
            # arange can give one number too many, near 0; upstream then steps from timestep -1.
            timesteps = np.round(np.arange(last, 0, -last / n))[:n] - 1
        return timesteps.astype(np.int64)

    def _check_steps(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= self.num_train_timesteps:
            raise InputError(f"num_inference_steps is {n!r:.60}; it must be from 1 to {self.num_train_timesteps}")

    def padded(self, state: StateT, length: int) -> StateT:
        """The state with tables of `length` timesteps, the same for every number of steps; further timesteps are -1.

        Raises:
          InputError: the state has more timesteps.
        """
        if length < len(state.timesteps):
            raise InputError(f"the state has {len(state.timesteps)} timesteps; it cannot be padded to {length}")
        missing = length - len(state.timesteps)
        return state.replace(timesteps=jnp.asarray(np.pad(state.timesteps, (0, missing), constant_values=-1)))

    def scale_model_input(self, state: Any, sample: jax.Array, timestep: Any = None) -> jax.Array:
        """The model's input: with these schedulers the sample itself."""
        return sample

    def add_noise(self, state: Any, original_samples: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Samples at the noise levels of training `timesteps`, (B,) or a scalar; `state` may be None."""
        signal, sigma = self._levels(timesteps, original_samples)
        return (signal * original_samples + sigma * noise).astype(original_samples.dtype)

    def get_velocity(self, state: Any, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """What a model with `prediction_type` "v_prediction" learns to predict; `state` may be None."""
        signal, sigma = self._levels(timesteps, sample)
        return (signal * noise - sigma * sample).astype(sample.dtype)

    def _levels(self, timesteps: Any, sample: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Standard deviations of picture and noise at the timesteps, for samples of a batch."""
        alphas = jnp.asarray(self.alphas_cumprod)[jnp.asarray(timesteps)]
        alphas = alphas.reshape(alphas.shape + (1,) * (sample.ndim - alphas.ndim))
        return jnp.sqrt(alphas), jnp.sqrt(1 - alphas)

    def _original_and_noise(
        self, model_output: jax.Array, sample: jax.Array, signal: Any, sigma: Any
    ) -> tuple[Any, Any]:
        """Predicted picture and noise, from a model's output of any `prediction_type`.

        `signal` and `sigma` are the standard deviations of picture and noise in `sample`.
        """
        if self.prediction_type == "epsilon":
            return (sample - sigma * model_output) / signal, model_output
        if self.prediction_type == "sample":
            return model_output, (sample - signal * model_output) / sigma
        return signal * sample - sigma * model_output, signal * model_output + sigma * sample


@dataclass(frozen=True)
class PNDMScheduler(Scheduler):
    """Pseudo numerical methods for diffusion models (arXiv 2202.09778), upstream's default.

    With `skip_prk_steps`, as Stable Diffusion has it, n steps take n + 1 calls of the model: the second timestep occurs
    twice. Without, the first three steps are Runge-Kutta steps of four calls each.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Scheduler.CHOICES,
        "prediction_type": ("epsilon", "v_prediction"),
    }

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def set_timesteps(self, state: SchedulerState, num_inference_steps: int, shape: Iterable[int] = ()) -> PNDMState:
        steps = self._spaced(num_inference_steps)
        if self.skip_prk_steps:
            timesteps = np.concatenate([steps[:1], steps[1:2], steps[1:]])
        elif len(steps) < 4:
            raise InputError(
                f"PNDMScheduler needs at least 4 steps for its Runge-Kutta steps, here {num_inference_steps}; "
                "use more steps or skip_prk_steps"
            )
        else:
            half = self.num_train_timesteps // num_inference_steps // 2
            prk = [(steps[i], steps[i + 1] + half, steps[i + 1] + half, steps[i + 1]) for i in range(3)]
            timesteps = np.concatenate([*prk, steps[3:]])
        started = self._started(state, timesteps, num_inference_steps)
        zeros = jnp.zeros(tuple(shape), jnp.float32)
        return PNDMState(
            **vars(started),
            counter=jnp.int32(0),
            ets=jnp.stack([zeros] * 3),
            cur_sample=zeros,
            cur_model_output=zeros,
        )

    def step(
        self, state: PNDMState, model_output: jax.Array, timestep: Any, sample: jax.Array, rng: jax.Array | None = None
    ) -> SchedulerOutput:
        """One step. `state` and `timestep` follow `state.timesteps` in its order; `rng` is not used."""
        steps = _started_steps(state)
        _check_shape(state.cur_sample, sample)
        output, start = model_output.astype(jnp.float32), sample.astype(jnp.float32)
        linear = self._linear_multistep(state, output, timestep, start, self.num_train_timesteps // steps)
        if self.skip_prk_steps:
            prev_sample, new = linear
        else:
            half = self.num_train_timesteps // steps // 2
            runge_kutta = self._runge_kutta(state, output, timestep, start, half)
            prev_sample, new = jax.tree.map(partial(jnp.where, state.counter < 12), runge_kutta, linear)
        return SchedulerOutput(prev_sample.astype(sample.dtype), new.replace(counter=state.counter + 1))

    def _linear_multistep(
        self, state: PNDMState, output: jax.Array, timestep: Any, sample: jax.Array, ratio: Any
    ) -> tuple[jax.Array, PNDMState]:
        """A step from the last four outputs; the first steps have fewer."""
        # The second call repeats the first step with the mean of both outputs. Its own output is not kept.
        second = (state.counter == 1) & self.skip_prk_steps
        row = jnp.minimum(state.counter, 4) if self.skip_prk_steps else 4
        combined = _weighted(jnp.asarray(_PLMS_WEIGHTS)[row], [output, *state.ets])
        before = jnp.where(second, timestep + ratio, timestep)
        after = jnp.where(second, timestep, timestep - ratio)
        start = jnp.where(second, state.cur_sample, sample)
        new = state.replace(
            ets=jnp.where(second, state.ets, jnp.stack([output, *state.ets[:2]])),
            cur_sample=jnp.where(state.counter == 0, sample, state.cur_sample),
        )
        return self._transfer(start, before, after, combined), new

    def _runge_kutta(
        self, state: PNDMState, output: jax.Array, timestep: Any, sample: jax.Array, half: Any
    ) -> tuple[jax.Array, PNDMState]:
        """A quarter of a Runge-Kutta step of fourth order."""
        phase = state.counter % 4
        total = state.cur_model_output + jnp.asarray(_PRK_WEIGHTS)[phase] * output
        start = jnp.where(phase == 0, sample, state.cur_sample)
        before = state.timesteps[state.counter // 4 * 4]
        after = timestep - jnp.where(phase % 2 == 0, half, 0)
        new = state.replace(
            ets=jnp.where(phase == 0, jnp.stack([output, *state.ets[:2]]), state.ets),
            cur_sample=start,
            cur_model_output=jnp.where(phase == 3, 0, total),
        )
        return self._transfer(start, before, after, jnp.where(phase == 3, total, output)), new

    def _transfer(self, sample: jax.Array, before: Any, after: Any, output: jax.Array) -> jax.Array:
        """Formula (9) of the paper: from timestep `before` to `after`."""
        alphas = jnp.asarray(self.alphas_cumprod)
        alpha, alpha_after = alphas[before], _previous_alpha(alphas, after, self.set_alpha_to_one)
        if self.prediction_type == "v_prediction":
            output = jnp.sqrt(alpha) * output + jnp.sqrt(1 - alpha) * sample
        divisor = alpha * jnp.sqrt(1 - alpha_after) + jnp.sqrt(alpha * (1 - alpha) * alpha_after)
        return jnp.sqrt(alpha_after / alpha) * sample - (alpha_after - alpha) / divisor * output


_PLMS_WEIGHTS = (
    np.array([[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], np.float32) / 24
)
"""Adams-Bashforth weights of the newest and earlier outputs, for 0, 1, ... steps done; step 1 repeats step 0."""

_PRK_WEIGHTS = np.array([1, 2, 2, 1], np.float32) / 6


@dataclass(frozen=True)
class DDIMScheduler(Scheduler):
    """Denoising diffusion implicit models (arXiv 2010.02502)."""

    FIXED = NO_THRESHOLDING

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    def step(
        self,
        state: SchedulerState,
        model_output: jax.Array,
        timestep: Any,
        sample: jax.Array,
        rng: jax.Array | None = None,
        *,
        eta: Any = 0.0,
        use_clipped_model_output: bool = False,
        variance_noise: jax.Array | None = None,
    ) -> SchedulerOutput:
        """One step.

        Args:
          state: from `set_timesteps`.
          model_output: the model's prediction at `timestep`.
          timestep: scalar.
          sample: the sample at `timestep`.
          rng: key for the noise; needed if `eta` is not 0.
          eta: weight of fresh noise, from 0 (none) to 1 (as much as DDPM).
          use_clipped_model_output: derive the noise from the clipped picture.
          variance_noise: the noise itself, in place of `rng`.
        """
        before = timestep - self.num_train_timesteps // _started_steps(state)
        output, start = model_output.astype(jnp.float32), sample.astype(jnp.float32)
        alphas = jnp.asarray(self.alphas_cumprod)
        alpha, alpha_before = alphas[timestep], _previous_alpha(alphas, before, self.set_alpha_to_one)
        original, epsilon = self._original_and_noise(output, start, jnp.sqrt(alpha), jnp.sqrt(1 - alpha))
        if self.clip_sample:
            original = jnp.clip(original, -self.clip_sample_range, self.clip_sample_range)
        if use_clipped_model_output:
            epsilon = (start - jnp.sqrt(alpha) * original) / jnp.sqrt(1 - alpha)
        variance = eta**2 * (1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)
        prev_sample = jnp.sqrt(alpha_before) * original + jnp.sqrt(1 - alpha_before - variance) * epsilon
        if not (isinstance(eta, int | float) and eta == 0):
            prev_sample += jnp.sqrt(variance) * _noise(rng, variance_noise, sample, "eta is not 0")
        return SchedulerOutput(prev_sample.astype(sample.dtype), state, original.astype(sample.dtype))


@dataclass(frozen=True)
class DDPMScheduler(Scheduler):
    """Denoising diffusion probabilistic models (arXiv 2006.11239): the noise of training, and ancestral sampling."""

    FIXED = NO_THRESHOLDING
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Scheduler.CHOICES,
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    }

    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False

    def step(
        self,
        state: SchedulerState,
        model_output: jax.Array,
        timestep: Any,
        sample: jax.Array,
        rng: jax.Array | None = None,
        *,
        variance_noise: jax.Array | None = None,
    ) -> SchedulerOutput:
        """One step to the next of `state.timesteps`, with noise from the key `rng`, or `variance_noise` itself."""
        output, start = model_output.astype(jnp.float32), sample.astype(jnp.float32)
        alphas = jnp.asarray(self.alphas_cumprod)
        # Padding is timestep -1, the finished picture.
        following = jnp.append(state.timesteps[1:], -1)
        before = following[jnp.argmax(state.timesteps == timestep)]
        alpha, alpha_before = alphas[timestep], _previous_alpha(alphas, before, set_alpha_to_one=True)
        beta = 1 - alpha / alpha_before
        original, _ = self._original_and_noise(output, start, jnp.sqrt(alpha), jnp.sqrt(1 - alpha))
        if self.clip_sample:
            original = jnp.clip(original, -self.clip_sample_range, self.clip_sample_range)
        mean = jnp.sqrt(alpha_before) * beta / (1 - alpha) * original
        mean += jnp.sqrt(alpha / alpha_before) * (1 - alpha_before) / (1 - alpha) * start
        variance = beta
        if self.variance_type != "fixed_large":
            variance = jnp.maximum((1 - alpha_before) / (1 - alpha) * beta, 1e-20)
        noise = _noise(rng, variance_noise, sample, "each step adds noise")
        prev_sample = mean + jnp.where(timestep > 0, jnp.sqrt(variance), 0) * noise
        return SchedulerOutput(prev_sample.astype(sample.dtype), state, original.astype(sample.dtype))


@dataclass(frozen=True)
class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver and DPM-Solver++ (arXiv 2206.00927, 2211.01095): good pictures in 20 to 25 steps."""

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Scheduler.CHOICES,
        "solver_order": (1, 2, 3),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "solver_type": ("midpoint", "heun"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NO_THRESHOLDING,
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "sigma_min": (None,),
        "sigma_max": (None,),
        # Of DDPM's types only the learned ones, which have twice the channels, would change anything.
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    }

    # With 0, sigma would be infinite.
    LAST_RESCALED_ALPHA: ClassVar[float] = 2**-24

    timestep_spacing: str = "linspace"
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool | None = False
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        # The configs of DEIS and UniPC have these.
        if self.algorithm_type == "deis":
            object.__setattr__(self, "algorithm_type", "dpmsolver++")
        if self.solver_type in ("logrho", "bh1", "bh2"):
            object.__setattr__(self, "solver_type", "midpoint")
        super().__post_init__()
        if not self.algorithm_type.endswith("++") and self.final_sigmas_type == "zero":
            raise InputError(
                f"final_sigmas_type 'zero' does not go with algorithm_type {self.algorithm_type!r}; use 'sigma_min'"
            )
        if self.algorithm_type.startswith("sde-") and self.solver_order == 3:
            # Upstream's 'sde-dpmsolver++' has a wrong sign there, and its 'sde-dpmsolver' fails.
            raise InputError(f"algorithm_type {self.algorithm_type!r} has no solver_order 3; use 2")

    def set_timesteps(
        self, state: SchedulerState, num_inference_steps: int, shape: Iterable[int] = ()
    ) -> DPMSolverState:
        self._check_steps(num_inference_steps)
        timesteps, sigmas = self._timesteps_and_sigmas(num_inference_steps)
        started = self._started(state, timesteps, num_inference_steps)
        if not (np.diff(sigmas[:-1]) < 0).all():
            raise InputError(f"{num_inference_steps} steps repeat a noise level; use fewer steps")
        return DPMSolverState(
            **vars(started),
            sigmas=jax.device_put(sigmas[:-1]),
            coefficients=jax.device_put(self._coefficients(sigmas)),
            step_index=jnp.int32(-1),
            lower_order_nums=jnp.int32(0),
            model_outputs=jnp.zeros((self.solver_order, *shape), jnp.float32),
        )

    def _timesteps_and_sigmas(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n timesteps, and n + 1 sigmas in float32."""
        alphas = self.alphas_cumprod.astype(np.float64)
        lambdas = np.log(np.sqrt(alphas)) - np.log(np.sqrt(1 - alphas))
        last = int(self.num_train_timesteps - np.searchsorted(lambdas[::-1], self.lambda_min_clipped))
        if not last:
            raise InputError(f"lambda_min_clipped is {self.lambda_min_clipped}; it must be below {lambdas[0]:.4g}")
        if self.timestep_spacing == "linspace":
            timesteps: np.ndarray = np.linspace(0, last - 1, n + 1).round()[:0:-1]
        elif self.timestep_spacing == "leading":
            timesteps = np.arange(n + 1)[:0:-1] * (last // (n + 1)) + self.steps_offset
        else:
            timesteps = np.arange(last, 0, -self.num_train_timesteps / n).round()[:n] - 1
        all_sigmas = np.sqrt((1 - alphas) / alphas)
        if self.use_karras_sigmas:
            rho = 7.0
            high, low = all_sigmas[-1] ** (1 / rho), all_sigmas[0] ** (1 / rho)
            sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** rho
            timesteps = np.interp(np.log(sigmas), np.log(all_sigmas), np.arange(len(all_sigmas))).round()
        else:
            sigmas = np.interp(timesteps, np.arange(len(all_sigmas)), all_sigmas)
        final = 0.0 if self.final_sigmas_type == "zero" else all_sigmas[0]
        return timesteps, np.append(sigmas, final).astype(np.float32)

    def _coefficients(self, sigmas: np.ndarray) -> np.ndarray:
        """`DPMSolverState.coefficients`, computed in float64."""
        n = len(sigmas) - 1
        alphas = 1 / np.sqrt(sigmas.astype(np.float64) ** 2 + 1)
        noises = sigmas * alphas
        with np.errstate(divide="ignore"):
            lambdas = np.log(alphas) - np.log(noises)
        table = np.zeros((self.solver_order, n, 2 + self.solver_order))
        for done in range(self.solver_order):
            for i in range(n):
                # The last sigma can be sigma_min already; then the last step changes nothing.
                h = max(lambdas[i + 1] - lambdas[i], 0.0)
                order = min(done + 1, self._highest_order(i, n), i + 1) if h else 1
                sample, noise, weights = self._terms(order, h, alphas[i : i + 2], noises[i : i + 2])
                table[done, i, :2] = sample, noise
                # The last outputs' divided differences, D0, D1 and D2 upstream, as combinations of the outputs.
                differences = np.zeros((3, 3))
                differences[0, 0] = 1
                if order >= 2:
                    r0 = (lambdas[i] - lambdas[i - 1]) / h
                    differences[1] = np.array([1, -1, 0]) / r0
                if order == 3:
                    r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
                    change = (differences[1] - np.array([0, 1, -1]) / r1) / (r0 + r1)
                    differences[1] += r0 * change
                    differences[2] = change
                table[done, i, 2 : 2 + order] = (weights @ differences[:order])[:order]
        return table.astype(np.float32)

    def _highest_order(self, i: int, n: int) -> int:
        """The highest order that step i of n may have: the last steps have lower orders."""
        few = self.lower_order_final and n < 15
        if i == n - 1 and (self.euler_at_final or few or self.final_sigmas_type == "zero"):
            return 1
        return 2 if i == n - 2 and few else 3

    def _terms(self, order: int, h: float, alphas: np.ndarray, sigmas: np.ndarray) -> tuple[float, float, list[float]]:
        """Weights of the sample, of fresh noise, and of `order` divided differences of the outputs.

        Args:
          order: 1 to 3.
          h: the step in lambda, the logarithm of the ratio of signal to noise.
          alphas, sigmas: the standard deviations of signal and noise, before and after the step.
        """
        (alpha, alpha_next), (sigma, sigma_next) = alphas, sigmas
        if self.algorithm_type == "dpmsolver++":
            sample, noise, scale, x = sigma_next / sigma, 0.0, alpha_next, -h
        elif self.algorithm_type == "sde-dpmsolver++":
            sample, scale, x = sigma_next / sigma * math.exp(-h), alpha_next, -2 * h
            noise = sigma_next * math.sqrt(-math.expm1(-2 * h))
        elif self.algorithm_type == "dpmsolver":
            sample, noise, scale, x = alpha_next / alpha, 0.0, sigma_next, h
        else:
            sample, scale, x = alpha_next / alpha, 2 * sigma_next, h
            noise = sigma_next * math.sqrt(math.expm1(2 * h))
        growth = math.expm1(x)
        weights = [-scale * growth]
        if order == 2 and self.solver_type == "midpoint":
            weights.append(-0.5 * scale * growth)
        elif order >= 2:
            weights.append(-scale * (growth / x - 1))
        if order == 3:
            weights.append(-scale * ((growth - x) / x**2 - 0.5))
        return sample, noise, weights

    def step(
        self,
        state: DPMSolverState,
        model_output: jax.Array,
        timestep: Any,
        sample: jax.Array,
        rng: jax.Array | None = None,
        *,
        variance_noise: jax.Array | None = None,
    ) -> SchedulerOutput:
        """One step. The first starts at `timestep`; the others follow `state.timesteps` in its order.

        The `sde-` algorithms add noise from the key `rng`, or `variance_noise` itself.
        """
        _started_steps(state)
        _check_shape(state.model_outputs[0], sample)
        output, start = model_output.astype(jnp.float32), sample.astype(jnp.float32)
        # A timestep can occur twice in a row; upstream starts at the second.
        found = jnp.nonzero(state.timesteps == timestep, size=2, fill_value=-1)[0]
        first = jnp.where(found.max() < 0, state.num_timesteps - 1, found.max())
        index = jnp.where(state.step_index < 0, first, state.step_index)
        signal = 1 / jnp.sqrt(state.sigmas[index] ** 2 + 1)
        original, epsilon = self._original_and_noise(output, start, signal, state.sigmas[index] * signal)
        converted = original if self.algorithm_type.endswith("++") else epsilon
        outputs = jnp.stack([converted, *state.model_outputs[:-1]])
        weights = state.coefficients[jnp.minimum(state.lower_order_nums, self.solver_order - 1), index]
        prev_sample = weights[0] * start + _weighted(weights[2:], outputs)
        if self.algorithm_type.startswith("sde-"):
            prev_sample += weights[1] * _noise(rng, variance_noise, sample, f"{self.algorithm_type} adds noise")
        new = state.replace(
            step_index=index + 1,
            lower_order_nums=jnp.minimum(state.lower_order_nums + 1, self.solver_order),
            model_outputs=outputs,
        )
        return SchedulerOutput(prev_sample.astype(sample.dtype), new)

    def padded(self, state: StateT, length: int) -> StateT:
        wider: Any = super().padded(state, length)
        missing = length - len(state.timesteps)
        return wider.replace(
            sigmas=jnp.asarray(np.pad(wider.sigmas, (0, missing))),
            coefficients=jnp.asarray(np.pad(wider.coefficients, ((0, 0), (0, missing), (0, 0)))),
        )


SCHEDULERS = {c.__name__: c for c in (PNDMScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler)}


def scheduler_from_config(config: Mapping[str, Any] | str | Path | Scheduler) -> Any:
    """The scheduler that a `scheduler_config.json`, its contents or its folder describes.

    Raises:
      InputError: its `_class_name` is not one of `SCHEDULERS`, or a field is not supported.
    """
    values = _contents(config)
    name = str(values.get("_class_name")).removeprefix("Flax")
    if name not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise InputError(f"_class_name of the scheduler is {values.get('_class_name')!r:.60}; known are {known}")
    return SCHEDULERS[name].from_config(values)


def _contents(config: Mapping[str, Any] | str | Path | Scheduler) -> Mapping[str, Any]:
    """The fields of a config given in any form."""
    if isinstance(config, Scheduler):
        return config.config
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    return read_json(path / "scheduler_config.json" if path.is_dir() else path)


def _linspace(start: float, stop: float, n: int) -> np.ndarray:
    """As torch.linspace computes it in float32: from both ends, each number rounded once."""
    first, last = np.float32(start), np.float32(stop)
    step = (last - first) / np.float32(max(n - 1, 1))
    i = np.arange(n)
    rising, falling = float(first) + float(step) * i, float(last) - float(step) * (n - 1 - i)
    return np.where((i < n // 2) | (n == 1), rising, falling).astype(np.float32)


def _previous_alpha(alphas: jax.Array, timestep: Any, set_alpha_to_one: bool) -> jax.Array:
    """`alphas_cumprod` at a timestep; timesteps below 0 are the finished picture."""
    return jnp.where(timestep >= 0, alphas[jnp.maximum(timestep, 0)], 1 if set_alpha_to_one else alphas[0])


def _weighted(weights: jax.Array, arrays: Iterable[jax.Array]) -> jax.Array:
    """The weighted sum. A matrix product would round to bfloat16 on a TPU."""
    return jnp.sum(jnp.stack([weight * array for weight, array in zip(weights, arrays, strict=True)]), axis=0)


def _noise(rng: jax.Array | None, noise: jax.Array | None, sample: jax.Array, reason: str) -> jax.Array:
    if noise is not None:
        return noise.astype(jnp.float32)
    if rng is None:
        raise InputError(f"{reason}: pass a key as `rng`")
    return jax.random.normal(rng, sample.shape, jnp.float32)


def _started_steps(state: SchedulerState) -> jax.Array:
    if state.num_inference_steps is None:
        raise InputError("the state has no timesteps; call `set_timesteps` first")
    return state.num_inference_steps


def _check_shape(kept: jax.Array, sample: jax.Array) -> None:
    if kept.shape != sample.shape:
        raise InputError(
            f"the sample has shape {sample.shape}, and the state is for {kept.shape}; "
            "pass the sample's shape to `set_timesteps`"
        )
