"""Any PyTorch checkpoint as named arrays, read when asked for and without PyTorch.

A checkpoint is data from strangers. safetensors files are checked by the safetensors library. Zip pickles (`.bin`,
`.pt`, `.pth`) are run by an interpreter that knows the opcodes `torch.save` writes and the names that build tensors;
any other name is refused, and nothing is ever imported or called.
"""

import dataclasses
import io
import json
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from flax_qformer.config import read_json
from flax_qformer.errors import InputError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes lie and how they are laid out. `strides` are in elements."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the file: pages come from the disk cache as they are touched."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        extent = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        data = np.memmap(self.path, np.uint8, "r", self.offset, (extent * self.dtype.itemsize,)).view(self.dtype)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(data, self.shape, strides, writeable=False)


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint: a single file, or the `*.index.json` of a sharded one.

    Raises:
      InputError: the file is no checkpoint, is damaged, or its pickle names anything but tensors.
    """
    if path.suffix == ".json":
        return _open_shards(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04"):
            return _open_zip_pickle(path)
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


def merged(shards: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of several files as one; InputError where two have the same name."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise InputError(
                f"{shard[twice[0]].path.parent}: two files hold the same tensors: {listed(twice)}; fetch them again"
            )
        tensors |= shard
    return tensors


def listed(names: Sequence[str]) -> str:
    """The first 20 names, and how many more there are."""
    shown = ", ".join(name if len(name) <= 200 else name[:197] + "..." for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")


_MAX_NAMES_BYTES = 4 << 20
"""Names and shapes take some 250 bytes a tensor: a header or a pickle that is larger is no model's."""


def _check_names_size(size: int) -> None:
    if size > _MAX_NAMES_BYTES:
        raise InputError(f"{size} bytes of names and shapes, far more than those of a model: not a checkpoint")


# --- safetensors


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
    # The library checks the header; it does not tell offsets, without which a tensor cannot be read in place.
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise InputError(f"damaged, or not safetensors ({error}); fetch the file again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        _check_names_size(length)
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
        tensors[name] = StoredTensor(path, offset, _SAFETENSORS_DTYPES[info["dtype"]], shape, _contiguous(shape))
    return tensors


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# --- zip pickles


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


def _open_zip_pickle(path: Path) -> dict[str, StoredTensor]:
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
    """Where an uncompressed member lies: offset and length."""
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
    _check_names_size(length)
    file.seek(offset)
    return file.read(length)


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names and that is known here. It stands for itself; nothing is looked up."""

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

    Dictionary keys are plain values only: to hash a nested tuple can take time exponential in its depth.
    """

    def __init__(self, storage: Callable[[str, np.dtype, int], StoredTensor]) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> object:
        """The value that the pickle builds; _Damaged, or InputError where it names something unknown."""
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
                    raise _Damaged("attributes for what is no dictionary")
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
            raise _Damaged("items for what is no dictionary")
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
    """A tensor in a storage; one that is larger than its storage would be a small file that fills the memory."""
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
        raise InputError(f"the state dict holds what is no tensor: {listed(others)}; save it without")
    return dict(value)
