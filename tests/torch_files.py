"""Write files as `torch.save` does, without PyTorch; `golden/torch` holds real ones."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class _Storage:
    def __init__(self, key: str, array: np.ndarray) -> None:
        self.key, self.array = key, array


def torch_save(value: Any, path: Path) -> None:
    """Write nested dictionaries of numpy arrays as PyTorch writes those of tensors."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in _STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    exec("def _rebuild_tensor_v2(*arguments): ...", utils.__dict__)
    storages: list[_Storage] = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return NotImplemented
            storages.append(_Storage(str(len(storages)), value))
            strides = tuple(stride // value.itemsize for stride in value.strides)
            return utils._rebuild_tensor_v2, (storages[-1], 0, value.shape, strides, False, OrderedDict())

        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, _Storage):
                return None
            kind = getattr(torch, _STORAGES[value.array.dtype.name])
            return ("storage", kind, value.key, "cpu", value.array.size)

    program = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        Pickler(program, protocol=2).dump(value)
    write_zip(path, program.getvalue(), {storage.key: storage.array.tobytes() for storage in storages})


def write_zip(path: Path, program: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """The zip file around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
