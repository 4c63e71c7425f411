"""The activation functions a config can name: those of transformers 4.46.3 (`ACT2FN`) that have no parameters."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


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
