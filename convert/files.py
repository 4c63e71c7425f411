"""Any PyTorch checkpoint as named tensors, without PyTorch.

Checkpoints are untrusted data. The safetensors library checks safetensors files; `zip_pickle` reads the others.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from flax_qformer.convert.tensors import StoredTensor, check_names_size, contiguous, merged
from flax_qformer.convert.zip_pickle import open_zip_pickle
from flax_qformer.errors import InputError, listed
from flax_qformer.json_files import read_json


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint: a single file, or the `*.index.json` of a sharded one.

    Raises:
      InputError: the file is not a checkpoint, is damaged, or its pickle names anything but tensors.
    """
    if path.suffix == ".json":
        return _open_shards(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04"):
            return open_zip_pickle(path)
        if head[8:9] == b"{":
            return _open_safetensors(path)
        if head.startswith(b"\x80"):
            raise InputError(
                "a legacy (non-zip) pickle; write it anew with PyTorch: "
                "torch.save(torch.load(old, weights_only=True), new)"
            )
        if head.startswith(b"version https://git-lfs"):
            raise InputError("a Git LFS pointer, not the weights: run `git lfs pull`")
        raise InputError("not a checkpoint: neither safetensors nor a zip file as torch.save writes it")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            f"{index} has no weight_map from tensor names to files; name the checkpoint's folder, or its *.index.json"
        )
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or name == ".."]
    if outside:
        raise InputError(f"{index} names files outside its folder: {listed(outside)}; put all into one folder")
    if any(name.endswith(".json") for name in names):
        raise InputError(f"{index} names an index among its files; fetch it again")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise InputError(f"{index} names files that are not there: {listed(absent)}; fetch them too")
    return merged([open_tensors(index.parent / name) for name in names])


_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    # The library checks the header, but does not return offsets, which are needed to read tensors in place.
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise InputError(f"damaged, or not safetensors ({error}); fetch the file again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        check_names_size(length)
        pairs: list[tuple[str, Any]] = json.loads(file.read(length), object_pairs_hook=list)
    if len(dict(pairs)) < len(pairs):
        raise InputError("damaged: two tensors of one name; fetch the file again")
    tensors = {}
    for name, fields in pairs:
        if name == "__metadata__":
            continue
        info = dict(fields)
        if info["dtype"] not in _SAFETENSORS_DTYPES:
            raise InputError(
                f"{listed([name])} has the dtype {info['dtype']}, which no parameter has; write it without that tensor"
            )
        shape = tuple(info["shape"])
        offset = 8 + length + info["data_offsets"][0]
        tensors[name] = StoredTensor(path, offset, _SAFETENSORS_DTYPES[info["dtype"]], shape, contiguous(shape))
    return tensors
