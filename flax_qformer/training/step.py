"""The training state and the compiled training step, for any loop."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from flax_qformer.errors import InputError
from flax_qformer.models.pretraining import Blip2ForPreTraining, PreTrainingOutput
from flax_qformer.models.selection import Selection, merge, partition
from flax_qformer.parallel.mesh import mesh_context
from flax_qformer.parallel.partition_rules import shardings

LOSSES = ("loss_itc", "loss_itm", "loss_itg")

Loss: TypeAlias = Callable[[Any, Mapping[str, Any], Mapping[str, Any], Mapping[str, jax.Array], jax.Array], tuple]
"""(model, trained, frozen, batch, key) -> (loss, output): the loss is a float32 scalar; the output is a
`PreTrainingOutput` or a mapping, whose scalars become metrics."""


@flax.struct.dataclass
class TrainState:
    """The state that a step updates, with the frozen parameters.

    Attributes:
      trained: the parameters that steps update, as a tree.
      frozen: the other parameters; `params` merges both.
      opt_state: optax's state for `trained`.
      ema: the moving average of `trained`, or None.
      step: number of batches so far, scalar int32.
      rng: data of the random key from which each step derives its own key.
    """

    trained: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    ema: dict[str, Any] | None
    step: jax.Array
    rng: jax.Array

    @classmethod
    def create(
        cls,
        params: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        train: Selection = ("qformer", "heads"),
        *,
        ema: bool = False,
        seed: int = 0,
    ) -> "TrainState":
        """The state before the first step.

        Args:
          params: the whole parameter tree.
          optimizer: an optax optimizer, which is initialised for the trained parameters.
          train: the parameters to train, see `Selection`; the rest are frozen.
          ema: keep a moving average, see `make_train_step`.
          seed: seed of dropout and of the sampled negatives.

        Raises:
          InputError: the selection matches nothing, or selects parameters in float16.
        """
        trained, frozen = partition(params, train)
        float16 = [path for path, leaf in flatten_dict(trained, sep="/").items() if leaf.dtype == jnp.float16]
        if float16:
            raise InputError(
                f"{len(float16)} trained parameters, such as {float16[0]}, are float16, which is too coarse for "
                "updates; load them with `param_dtype=float32`"
            )
        return cls(
            trained=trained,
            frozen=frozen,
            opt_state=optimizer.init(trained),
            ema=jax.tree.map(jnp.array, trained) if ema else None,
            step=jnp.int32(0),
            rng=jax.random.key_data(jax.random.key(seed)),
        )

    @property
    def params(self) -> dict[str, Any]:
        return merge(self.trained, self.frozen)

    @property
    def averaged_params(self) -> dict[str, Any]:
        """`params` with the moving average of the trained parameters, if there is one."""
        return self.params if self.ema is None else merge(self.ema, self.frozen)


def pretraining_loss(
    model: Blip2ForPreTraining,
    trained: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, PreTrainingOutput]:
    """The sum of the three losses, with dropout and sampled negatives; differentiable in `trained`.

    batch: arguments of `Blip2ForPreTraining.__call__`: pixel_values, input_ids, attention_mask and optionally image_id.
    """
    dropout, negatives = jax.random.split(key)
    rngs = {"dropout": dropout, "negatives": negatives}
    params: Any = {"params": merge(trained, frozen)}
    output: Any = model.apply(params, **dict[str, Any](batch), deterministic=False, rngs=rngs)
    return output.loss, output


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = pretraining_loss,
    ema_decay: float = 0.0,
    accumulation: int = 1,
    mesh: Mesh | None = None,
    donate: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled step: (state, batch) -> (next state, metrics). Metrics are losses, gradient_norm and parameter_norm.

    Parameters that the loss does not read keep their values, without weight decay. On a mesh, with the batch sharded,
    losses are computed over the global batch.

    Args:
      loss: the function to differentiate, with the arguments and results of `pretraining_loss`.
      ema_decay: decay of the state's moving average, which is updated every `accumulation` batches.
      accumulation: the optimizer's `accumulation`.
      mesh: the mesh of the state, which stays sharded as `shard_params` shards it.
      donate: reuse the memory of the input state. This deletes its arrays, and with them the parameters from which
        `TrainState.create` made it.
      compiler_options: options of `jax.jit`, see `flax_qformer.compilation`; with them, the step cannot run inside
        another `jax.jit`.

    Raises:
      InputError: the model computes in float16.
    """
    if getattr(model, "dtype", None) == jnp.float16:
        raise InputError(
            "training in float16 is not supported: small gradients underflow without loss scaling; give the model "
            "`dtype=bfloat16` or float32"
        )

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def loss_of(trained: dict[str, Any]) -> tuple[jax.Array, Any]:
            return loss(model, trained, state.frozen, batch, key)

        with mesh_context(mesh):
            is_read = _reads(loss_of, state.trained)
            (value, output), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        updates = jax.tree.map(lambda update, read: update if read else jnp.zeros_like(update), updates, is_read)
        trained = optax.apply_updates(state.trained, updates)
        ema = state.ema
        if ema is not None:
            is_updated = (state.step + 1) % accumulation == 0
            ema = optax.incremental_update(trained, ema, jnp.where(is_updated, 1 - ema_decay, 0.0))
        metrics = {"loss": value, **_scalars(output)}
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(trained)}
        state = replace(state, trained=trained, opt_state=opt_state, ema=ema, step=state.step + 1)
        return state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, mesh)), metrics

    options = None if compiler_options is None else dict(compiler_options)
    return jax.jit(train_step, donate_argnums=0 if donate else (), compiler_options=options)


def _reads(loss: Callable[[Any], tuple], trained: Any) -> Any:
    """Whether a loss depends on each parameter, as a tree of bools."""
    jaxpr = jax.make_jaxpr(lambda trained: loss(trained)[0])(trained).jaxpr
    _, is_used = partial_eval.dce_jaxpr(jaxpr, [True])
    return jax.tree.unflatten(jax.tree.structure(trained), is_used)


def _scalars(output: Any) -> dict[str, jax.Array]:
    named = output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in LOSSES}
    return {name: value for name, value in named.items() if value is not None and jnp.ndim(value) == 0}
