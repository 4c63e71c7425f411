"""Read JSON files, which are untrusted data, and write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_qformer.errors import InputError

_MAX_JSON_BYTES = 16 << 20


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """The contents of a JSON file with sorted keys."""
    return (json.dumps(dict(values), indent=2, sort_keys=True) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: the file is not JSON, or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if len(text) > _MAX_JSON_BYTES:
        raise InputError(f"{path} is far larger than a config or an index: name another file")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); fetch the file again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__} where a JSON object is expected")
    return values
