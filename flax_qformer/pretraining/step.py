"""One step of training, for a loop of one's own or the program's."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flax_qformer.pretraining.hashing import hashed
from flax_qformer.pretraining.model import Blip2ForPreTraining, PreTrainingOutput
from flax_qformer.pretraining.optimizer import Group, merge, partition
from flax_qformer.sharding import on, shardings

LOSSES = ("loss", "loss_itc", "loss_itm", "loss_itg")


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and the frozen parameters beside it.

    Attributes:
      trained: the part of the parameter tree that steps change.
      frozen: the other part; `params` is the whole.
      opt_state: optax's, of what is trained.
      ema: the moving average of what is trained; None without one.
      step: batches so far.
      rng: a key's data, from which each step derives its own.
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
        train: Iterable[Group] = ("qformer", "heads"),
        *,
        ema: bool = False,
        seed: int = 0,
    ) -> "TrainState":
        trained, frozen = partition(params, train)
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
        """`params` with the moving average in place of what is trained, if there is one."""
        return self.params if self.ema is None else merge(self.ema, self.frozen)


def pretraining_loss(
    model: Blip2ForPreTraining,
    trained: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, PreTrainingOutput]:
    """The sum of the three losses with dropout on and negatives drawn; to differentiate by `trained`.

    batch: the arguments of `Blip2ForPreTraining.__call__`: pixel_values, input_ids, attention_mask, perhaps image_id.
    """
    dropout, negatives = jax.random.split(key)
    rngs = {"dropout": hashed(dropout), "negatives": negatives}
    params: Any = {"params": merge(trained, frozen)}
    output: Any = model.apply(params, **dict[str, Any](batch), deterministic=False, rngs=rngs)
    return output.loss, output


def make_train_step(
    model: Blip2ForPreTraining,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.0,
    accumulation: int = 1,
    mesh: Mesh | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled step: (state, batch) -> the next state, the losses, and the norms of gradient and parameters.

    The state is given up, and with it the parameters that it was made of. On a mesh, with the batch sharded, the losses
    are those of the whole batch.

    Args:
      ema_decay: of the state's moving average, which takes every `accumulation`-th batch into account.
      accumulation: the optimizer's.
      mesh: keep the state on it as `shard_params` lays it out.
      compiler_options: of `jax.jit`, as `flax_qformer.compiler` has; they exclude another `jax.jit` around the step.
    """

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def loss(trained: dict[str, Any]) -> tuple[jax.Array, PreTrainingOutput]:
            return pretraining_loss(model, trained, state.frozen, batch, key)

        with on(mesh):
            (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(state.trained)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        ema = state.ema
        if ema is not None:
            is_updated = (state.step + 1) % accumulation == 0
            ema = optax.incremental_update(trained, ema, jnp.where(is_updated, 1 - ema_decay, 0.0))
        metrics = {name: getattr(output, name) for name in LOSSES}
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(trained)}
        state = replace(state, trained=trained, opt_state=opt_state, ema=ema, step=state.step + 1)
        return state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, mesh)), metrics

    options = None if compiler_options is None else dict(compiler_options)
    return jax.jit(train_step, donate_argnums=0, compiler_options=options)
