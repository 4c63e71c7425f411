"""Read the parameters of a Flax folder, with any dtype and onto any devices."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from jax.typing import DTypeLike

from flax_qformer.convert import check_finite
from flax_qformer.errors import InputError, first_line

DTYPES = ("float32", "bfloat16", "float16")

Place: TypeAlias = Callable[[str, tuple[int, ...]], Sharding]
"""From a parameter's path and shape to its sharding."""


def as_dtype(name: DTypeLike) -> jnp.dtype:
    """The dtype of that name; InputError if models do not run in it."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise InputError(f"the dtype {name} is none that models run in; take {', '.join(DTYPES)}")
    return dtype


def stored_params(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of an orbax checkpoint, by path.

    Raises:
      InputError: it is damaged.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    with _reading(folder):
        leaves = flatten_dict(ocp.metadata(folder.absolute()).metadata, sep="/")
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def read_params(
    folder: Path,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    dtype: jnp.dtype | None = None,
    allow_non_finite: bool = False,
    place: Place | None = None,
) -> dict[str, Any]:
    """Read an orbax checkpoint.

    Args:
      folder: of the checkpoint.
      stored: its `stored_params`.
      dtype: cast the parameters; by default each keeps its dtype.
      allow_non_finite: accept infinities and NaN that the cast creates.
      place: from path and shape to a sharding, by default the first device here.

    Raises:
      InputError: it is damaged, or the cast is not finite.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # orbax needs one
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, dtype or leaf.dtype, sharding=here if place is None else place(name, leaf.shape)
        )
        for name, leaf in stored.items()
    }
    with _reading(folder):
        params = ocp.load(folder.absolute(), unflatten_dict(wanted, sep="/"))  # orbax takes no relative path
    if dtype is not None and not allow_non_finite:
        finite = jax.device_get({path: _all_finite(leaf) for path, leaf in flatten_dict(params, sep="/").items()})
        check_finite([path for path, is_finite in finite.items() if not is_finite], dtype)
    return params


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Report damage in one line: orbax logs its errors as well, and quotes TensorStore at length."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{folder} is damaged or no orbax checkpoint ({first_line(error)}); convert or save it again"
        ) from None
    finally:
        absl.setLevel(level)
