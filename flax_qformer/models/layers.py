"""Layers that all towers share, and the dtype policy.

The policy: parameters are stored in `param_dtype`. Products run in `dtype` and accumulate in float32. LayerNorm
statistics and softmax are float32 in any dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flax_qformer.models import kernels
from flax_qformer.parallel.mesh import keep_batch

INITIALIZER = nn.initializers.normal(0.02)
"""Initializer of BERT, ViT and, as in LAVIS, the queries. Upstream's queries are zero and would stay equal."""

LORA = ("lora_A", "lora_B")
"""Names of the LoRA weights beside a kernel, see `models.lora`."""


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
    def layer_norm(self, name: str, eps: float) -> "LayerNorm":
        return LayerNorm(eps, name=name, **self.policy)

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **details: Any) -> Any:
        """Flax's `param`, which traces the initializer only if a stored value has another shape than `init_args[0]`.

        Flax always traces it, which takes more than half of a small model's call without `jax.jit`.
        """
        if not self.is_initializing():
            value: Any = self.get_variable("params", name)
            if value is not None and init_args[:1] == (np.shape(value),):
                return value
        return super().param(name, init_fn, *init_args, **details)


class Dense(Block):
    """`x @ kernel + bias` over the last axes of x; input and output may have several axes. Source: `nn.Linear`.

    kernel: (*in_shape, *out_shape); bias: out_shape. The product accumulates in float32 in any dtype. Bias and
    activation are float32 too: on a CPU, a chain of half-precision operations rounds after each.

    If the parameters have LoRA weights, `lora_A` (*in_shape, rank) and `lora_B` (rank, *out_shape), the output also
    has `x @ lora_A @ lora_B`. The kernel then needs no gradient.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use_bias: bool = True
    activation: Callable[[jax.Array], jax.Array] = lambda y: y
    kernel_init: nn.initializers.Initializer = INITIALIZER

    def setup(self) -> None:
        self.kernel = self.param("kernel", self.kernel_init, self.in_shape + self.out_shape, self.param_dtype)
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.out_shape, self.param_dtype)
        has_lora = self.has_variable("params", LORA[0])
        self.lora: Any = tuple(self.get_variable("params", name) for name in LORA) if has_lora else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., *in_shape) -> (..., *out_shape) in `dtype`."""
        result = kernels.product_dtype(self.dtype)
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        y = kernels.product(x, kernel, len(self.in_shape), result)
        if self.lora is not None:
            down, up = (leaf.astype(self.dtype) for leaf in self.lora)
            y += kernels.product(
                kernels.product(x, down, len(self.in_shape), jnp.float32).astype(self.dtype), up, 1, result
            )
        if self.use_bias:
            y += self.bias.astype(result)
        return keep_batch(self.activation(y.astype(jnp.float32)).astype(self.dtype))

    def whole_kernel(self) -> jax.Array:
        """The kernel with its LoRA update, if it has one."""
        return self.kernel if self.lora is None else lora_kernel(self.kernel, *self.lora)


class LayerNorm(Block):
    """Normalisation over the last axis, then scale and bias. Flax's own would not use `Block.param`.

    Source: PyTorch's `nn.LayerNorm`; arXiv 1607.06450.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., width) -> the same shape in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return _normalised(x, scale, bias, self.eps).astype(self.dtype)


@partial(jax.jit, static_argnums=3)  # otherwise calls outside of a jit trace it each time
@partial(jax.checkpoint, static_argnums=3, prevent_cse=False)  # the compiler may still keep it
def _normalised(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm in float32. Only x is kept for the gradient, since memory bounds a training step on GPUs and TPUs."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    # The mean of squares would cancel at eps 1e-12.
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * (jax.lax.rsqrt(variance + eps) * scale) + bias


@jax.jit
def lora_kernel(kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """`kernel + down @ up`, computed in float32, in the kernel's dtype.

    kernel: (*in_shape, *out_shape), down: (*in_shape, rank), up: (rank, *out_shape); or stacked layers of these.
    """
    if down.ndim + up.ndim - 2 > kernel.ndim:
        return jax.vmap(lora_kernel)(kernel, down, up)
    update = jnp.tensordot(down.astype(jnp.float32), up.astype(jnp.float32), 1, precision="highest")
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
