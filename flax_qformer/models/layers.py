"""Layers that all towers share, the dtype policy, activations, and the scan over layers.

The policy: parameters are stored in `param_dtype`. Products run in `dtype` and accumulate in float32. Activations,
LayerNorm statistics and softmax are float32 in any dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flax_qformer.compilation import rounds_at_once
from flax_qformer.errors import InputError
from flax_qformer.parallel.mesh import keep_batch, replicated

Activation: TypeAlias = Callable[[jax.Array], jax.Array]

INITIALIZER = nn.initializers.normal(0.02)
"""Initializer of BERT, ViT and, as in LAVIS, the queries. Upstream's queries are zero and would stay equal."""

LORA = ("lora_A", "lora_B")
"""Names of the LoRA weights beside a kernel, see `models.lora`."""


def _below(x: jax.Array) -> jax.Array:
    """The normal distribution function, by erf as upstream. XLA takes twice as long for erfc on a CPU."""
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_jvp
def _exact_gelu(x: jax.Array) -> jax.Array:
    return x * _below(x)


@_exact_gelu.defjvp
def _exact_gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Keep the slope as one array. JAX's own rule keeps four arrays, the largest of a layer."""
    (x,), (tangent,) = primals, tangents
    slope = _below(x) + x * jnp.exp(-(x**2) / 2) / (2 * jnp.pi) ** 0.5
    return _exact_gelu(x), slope * tangent


_tanh_gelu = partial(jax.nn.gelu, approximate=True)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _laplace(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.scipy.special.erf((x - 0.707107) / (0.282095 * 2**0.5)))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _exact_gelu,
    "gelu_10": lambda x: jnp.clip(_exact_gelu(x), -10, 10),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": _exact_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "laplace": _laplace,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Block(nn.Module, kw_only=True):
    """A module under the dtype policy, which its dense layers and LayerNorms inherit."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def policy(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def dense(self, name: str | None, in_shape: tuple[int, ...], out_shape: tuple[int, ...], **details: Any) -> "Dense":
        return Dense(in_shape, out_shape, name=name, **details, **self.policy)

    @nn.nowrap
    def layer_norm(self, name: str, eps: float) -> nn.Module:
        # The mean of squares minus the square of the mean would cancel at eps 1e-12.
        return LayerNorm(eps, use_fast_variance=False, name=name, **self.policy)

    @nn.nowrap
    def attention_dropout(self, rate: float, deterministic: bool) -> nn.Dropout | None:
        """The dropout of attention weights, or None where nothing is dropped, so that faster attention can run."""
        return None if deterministic or not rate else nn.Dropout(rate, deterministic=False)


class Dense(Block):
    """`x @ kernel + bias` over the last axes of x; input and output may have several axes. Source: `nn.Linear`.

    kernel: (*in_shape, *out_shape); bias: out_shape. The activation is computed in float32.

    If the parameters have LoRA weights, `lora_A` (*in_shape, rank) and `lora_B` (rank, *out_shape), the output also
    has `x @ lora_A @ lora_B`. The kernel then needs no gradient.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use_bias: bool = True
    activation: Activation | None = None
    kernel_init: nn.initializers.Initializer = INITIALIZER

    def setup(self) -> None:
        self.kernel = self.param("kernel", self.kernel_init, self.in_shape + self.out_shape, self.param_dtype)
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.out_shape, self.param_dtype)
        has_lora = self.has_variable("params", LORA[0])
        self.lora: Any = tuple(self.get_variable("params", name) for name in LORA) if has_lora else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., *in_shape) -> (..., *out_shape) in `dtype`."""
        x, axes = x.astype(self.dtype), len(self.in_shape)
        y = jnp.tensordot(x, self.kernel.astype(self.dtype), axes)
        if self.lora is not None:
            down, up = (leaf.astype(self.dtype) for leaf in self.lora)
            y += jnp.tensordot(jnp.tensordot(x, down, axes), up, 1)
        if self.use_bias:
            y += self.bias.astype(self.dtype)
        if self.activation is not None:
            y = self.activation(y.astype(jnp.float32)).astype(self.dtype)
        return keep_batch(y)

    def whole_kernel(self) -> jax.Array:
        """The kernel with its LoRA update, if it has one."""
        return self.kernel if self.lora is None else lora_kernel(self.kernel, *self.lora)


class MLP(Block):
    """A feed-forward of two dense layers. Source: transformers `Blip2MLP`, `CLIPMLP`."""

    inner: int
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, width) -> the same shape."""
        width = x.shape[-1:]
        x = self.dense("fc1", width, (self.inner,), activation=self.activation)(x)
        return self.dense("fc2", (self.inner,), width)(x)


# The gradient keeps only the input: memory traffic bounds a training step on GPUs and TPUs.
LayerNorm = nn.remat(nn.LayerNorm, prevent_cse=False)


class Embed(Block):
    """An embedding table; rows in `dtype`. Ids outside the table give NaN rather than a wrong row."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: (...) -> (..., width)."""
        # Rows of a table that is sharded by width would be sharded by width too, not by batch.
        table = replicated(self.param("embedding", INITIALIZER, self.shape, self.param_dtype))
        rows = table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(self.dtype)


@jax.jit
def lora_kernel(kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """`kernel + down @ up`, computed in float32, in the kernel's dtype.

    kernel: (*in_shape, *out_shape), down: (*in_shape, rank), up: (rank, *out_shape); or stacked layers of these.
    """
    if down.ndim + up.ndim - 2 > kernel.ndim:
        return jax.vmap(lora_kernel)(kernel, down, up)
    update = jnp.tensordot(down.astype(jnp.float32), up.astype(jnp.float32), 1, precision="highest")
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)


def check_stacked(encoder: Block, is_scanned: bool) -> None:
    """Raise InputError if parameters are stacked without `scan_layers`, or not stacked with it."""
    names = encoder.variables.get("params", {})
    if names and ("layers" in names) != is_scanned:
        form, remedy = ("apart", "fq.stack_layers") if is_scanned else ("stacked", "fq.unstack_layers")
        raise InputError(f"the parameters' layers are {form}, and `scan_layers` is {is_scanned}; take {remedy}(params)")


def scanned(encoder: Block, length: int, x: jax.Array, each: Any, run: Callable[[Any, jax.Array, Any], list]) -> list:
    """Run a short encoder `length` times, each time with its own parameters. XLA compiles it once.

    Args:
      encoder: its parameters get a leading axis of that length, under its name.
      each: a tree of arrays with that leading axis, one row for each run.
      run: (encoder, x, row) -> the outputs of the encoder's layers; the `states` of the last are the next x.

    Returns:
      The outputs of all layers. XLA drops unused ones.
    """

    def body(encoder: Block, x: jax.Array, row: Any) -> tuple[jax.Array, list]:
        outputs = run(encoder, x, row)
        return outputs[-1].states, outputs

    scan = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        unroll=rounds_at_once(length),
    )
    last, stacked = scan(encoder, x, each)
    outputs = [jax.tree.map(lambda leaf, i=i: leaf[i], layer) for i in range(length) for layer in stacked]
    return [*outputs[:-1], outputs[-1]._replace(states=last)]
