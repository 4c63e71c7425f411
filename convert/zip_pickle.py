"""Zip pickles as `torch.save` writes them (`.bin`, `.pt`, `.pth`), read without PyTorch.

An interpreter runs the pickle. It knows only the opcodes that `torch.save` writes and the names that build tensors,
refuses any other name, and never imports or calls anything.
"""

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flax_qformer.convert.tensors import StoredTensor, check_names_size
from flax_qformer.errors import InputError, listed

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


def open_zip_pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            names = archive.namelist()
            pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(set(names)) < len(names) or len(pickles) != 1:
                raise InputError("not a checkpoint: a zip file, but not as torch.save writes it")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in names and _stored_bytes(archive, file, f"{folder}byteorder", path) != b"little":
                raise InputError("written on a big-endian machine; write it as safetensors there")
            program = _stored_bytes(archive, file, pickles[0], path)

            def storage(key: str, dtype: np.dtype, size: int) -> StoredTensor:
                offset, length = _stored_range(archive, file, f"{folder}data/{key}", path)
                if size * dtype.itemsize > length:
                    raise _Damaged("a storage shorter than it says")
                return StoredTensor(path, offset, dtype, (size,), (1,))

            state = _TensorPickle(storage).run(program)
    except (_Damaged, zipfile.BadZipFile, struct.error, KeyError, UnicodeError, NotImplementedError, EOFError) as error:
        raise InputError(f"damaged, or not as torch.save writes it ({error}); fetch the file again") from None
    return _state_dict(state)


def _stored_range(archive: zipfile.ZipFile, file: io.BufferedReader, name: str, path: Path) -> tuple[int, int]:
    """Offset and length of an uncompressed member."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise InputError(f"{listed([name])} is compressed or encrypted; torch.save writes it plain")
    file.seek(info.header_offset)
    # A local header: 26 bytes that the directory repeats, then the lengths of the name and the extra field after it.
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    offset = info.header_offset + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or offset + info.file_size > path.stat().st_size:
        raise _Damaged("cut off")
    return offset, info.file_size


def _stored_bytes(archive: zipfile.ZipFile, file: io.BufferedReader, name: str, path: Path) -> bytes:
    offset, length = _stored_range(archive, file, name, path)
    check_names_size(length)
    file.seek(offset)
    return file.read(length)


@dataclass(frozen=True)
class _Name:
    """A known global that the pickle names. It is only a label: nothing is looked up."""

    name: str


_KNOWN_NAMES = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{storage}" for storage in _STORAGE_DTYPES),
}

_MARK = object()


class _Damaged(Exception):
    """A pickle that torch.save does not write."""


class _TensorPickle:
    """Runs a pickle on a stack of plain values, tensors and known names.

    Dictionary keys must be plain values: hashing a nested tuple can take time exponential in its depth.
    """

    def __init__(self, storage: Callable[[str, np.dtype, int], StoredTensor]) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> object:
        """The value that the pickle builds. Raises _Damaged, or InputError if it names something unknown."""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except InputError:
            raise
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise _Damaged(type(error).__name__) from None
        raise _Damaged("no end")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self._above_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = self._above_mark()
                stack[-1].extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._set_items([stack.pop(-2), stack.pop()])
            case "SETITEMS":
                self._set_items(self._above_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL" | "INST":
                stack.append(_known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_known(stack.pop(-2), stack.pop()))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "REDUCE":
                stack.append(_reduce(stack.pop(-2), stack.pop()))
            case "BUILD":
                # Attributes, such as the _metadata of a state dict; they hold no tensors.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise _Damaged("attributes for an object that is not a dictionary")
            case _:
                raise _Damaged(f"the opcode {opcode}")

    def _above_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _Damaged("items for an object that is not a dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise _Damaged("a key that is no plain value")
            if key in target:
                raise _Damaged(f"the key {listed([str(key)])} twice")
            target[key] = value

    def _persistent(self, reference: object) -> StoredTensor:
        match reference:
            case ("storage", _Name(name), str(key), str(), int(size)) if size >= 0:
                return self.storage(key, _STORAGE_DTYPES[name.removeprefix("torch.")], size)
        raise _Damaged("a storage of unknown form")


def _known(module: object, attribute: object) -> _Name:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise _Damaged("a name that is no text")
    name = f"{module}.{attribute}"
    if name not in _KNOWN_NAMES:
        raise InputError(
            f"the pickle names {listed([name])}, which no tensor needs: it is refused and nothing was run; if you "
            "trust the file, save its state dict alone with PyTorch"
        )
    return _Name(name)


def _reduce(function: object, arguments: object) -> object:
    match function, arguments:
        case _Name("collections.OrderedDict"), ():
            return {}
        case _Name("torch.Size"), (tuple(sizes),):
            return sizes
        case _Name("torch._utils._rebuild_parameter"), (StoredTensor() as tensor, *_):
            return tensor
        case _Name("torch._utils._rebuild_tensor_v2"), (
            StoredTensor() as base,
            int(start),
            tuple(shape),
            tuple(strides),
            *_,
        ):
            return _strided(base, start, shape, strides)
    raise _Damaged("a call of unknown form")


def _strided(base: StoredTensor, start: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> StoredTensor:
    """A tensor in a storage. It must not exceed the storage: a small file could then fill the memory."""
    numbers = (start, *shape, *strides)
    if not len(shape) == len(strides) <= 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise _Damaged("a tensor of unknown form")
    end = start + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (end > base.shape[0] or math.prod(shape) > base.shape[0]):
        raise _Damaged("a tensor that reaches beyond its storage")
    offset = base.offset + start * base.dtype.itemsize
    return dataclasses.replace(base, offset=offset, shape=shape, strides=strides)


def _state_dict(value: object) -> dict[str, StoredTensor]:
    """The tensors of a state dict, or of the one under `model` or `state_dict` of a training checkpoint."""
    for key in ("model", "state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not any(isinstance(tensor, StoredTensor) for tensor in value.values()):
        raise InputError("no state dict: no dictionary from names to tensors; save model.state_dict()")
    others = [str(k) for k, v in value.items() if not isinstance(k, str) or not isinstance(v, StoredTensor)]
    if others:
        raise InputError(f"the state dict holds objects that are not tensors: {listed(others)}; save it without them")
    return dict(value)
