"""Checks of a model's inputs, before it runs."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_qformer.errors import InputError, first_line

PIXEL_LIMIT = 20.0
"""Normalised pixels stay within about 3 of zero; above this they are raw, such as 0 to 255."""


def as_array(name: str, value: Any) -> jax.Array:
    """An argument as an array.

    Raises:
      InputError: it is text, a mapping, or a list of rows of different lengths.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` is no array of numbers ({first_line(error)}); let `Processor` make it") from None


def check_pixels(pixel_values: jax.Array | np.ndarray) -> None:
    """Refuse integers, and warn once per process of values that are not normalised.

    Under `jax.jit`, only the dtype is checked.

    Raises:
      InputError: the pixels are not floating point.
    """
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise InputError(
            f"`pixel_values` are {pixel_values.dtype}; they must be normalised floats: let `Processor` make them"
        )
    if isinstance(pixel_values, jax.core.Tracer):
        return
    if isinstance(pixel_values, jax.Array) and not pixel_values.is_fully_addressable:
        return
    if np.abs(np.asarray(pixel_values)).max(initial=0) > PIXEL_LIMIT:
        _warn_of_raw_pixels()


@functools.cache
def _warn_of_raw_pixels() -> None:
    warnings.warn(
        f"`pixel_values` lie beyond {PIXEL_LIMIT:g}, but normalised pixels lie within 3 of zero; let `Processor` make "
        "them",
        stacklevel=1,
    )
