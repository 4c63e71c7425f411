"""Checkpoints are untrusted: any damage ends in a clear error, and no code in them runs."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import flax_qformer as fq
from conftest import GOLDEN
from flax_qformer.convert.files import open_tensors
from flax_qformer.json_files import read_json
from torch_files import torch_save, write_zip

HERE = Path(__file__).parent


def fuzz(seed: int, count: int, folder: Path, seconds: int) -> str:
    """Run the fuzzer in a process limited to 3 GiB."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE / "oracle"))),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    command = [sys.executable, HERE / "fuzz_readers.py", str(seed), str(count), folder]
    limited = ["sh", "-c", 'ulimit -d 3145728; exec "$@"', "sh", *command]
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_damaged_files(tmp_path: Path) -> None:
    outcome = fuzz(0, 300, tmp_path, seconds=200)
    for name in ("model.safetensors", "model.bin", "index.json", "config.json"):
        assert f"('{name}', 'refused')" in outcome


@pytest.mark.slow
def test_many_damaged_files(tmp_path: Path) -> None:
    fuzz(1, 10_000, tmp_path, seconds=900)


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), r"(builtins|__builtin__).eval"),
        (lambda marker: Call(Path.touch, marker), "pathlib|getattr"),
        (lambda marker: Call(subprocess.Popen, ["touch", str(marker)]), "(subprocess|commands).Popen"),
        (lambda marker: {"model": {"a": Call(open, str(marker), "w")}}, "(_?io|__builtin__|builtins).open"),
    ],
)
def test_a_pickle_that_would_run_code(tmp_path: Path, protocol: int, call: Any, name: str) -> None:
    marker = tmp_path / "ran"
    program = pickle.dumps(call(marker), protocol)
    write_zip(tmp_path / "model.bin", program, {})
    with pytest.raises(fq.InputError, match=f"names .*{name}|damaged"):
        open_tensors(tmp_path / "model.bin")
    assert not marker.exists()
    if protocol >= 2:
        with pytest.raises(fq.InputError, match=f"names .*({name}).*refused"):
            open_tensors(tmp_path / "model.bin")


def unicode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def tensor(start: int, shape: bytes, strides: bytes, numel: int = 4) -> bytes:
    """The pickle program of one tensor in storage `0`; shape and strides are pickle programs too."""
    reference = b"(" + unicode("storage") + b"ctorch\nFloatStorage\n" + unicode("0") + unicode("cpu") + b"J"
    reference += struct.pack("<i", numel) + b"tQ"
    arguments = (
        b"("
        + reference
        + b"J"
        + struct.pack("<i", start)
        + shape
        + strides
        + b"\x89c"
        + b"collections\nOrderedDict\n)Rt"
    )
    return b"\x80\x02}" + unicode("a") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


NESTED = b")" + b"\x85" * 100_000
DOUBLING = b")" + b"q\x00h\x00\x86" * 60
ONE = b"K\x01\x85"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}.", "no state dict"),
        (b"\x80\x02K\x01.", "no state dict"),
        (b"\x80\x02" + NESTED + b".", "no state dict"),
        (b"\x80\x02}" + DOUBLING + b"K\x01s.", "a key that is no plain value"),
        (b"\x80\x02" + DOUBLING + unicode("x") + b"\x93.", "a name that is no text"),
        (b"\x80\x02Nr\xff\xff\xff\xff}.", "no state dict"),
        (b"\x80\x02j\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x02X\xff\xff\xff\xffab.", "damaged"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b"ab.", "damaged"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "no state dict|damaged"),
        (b"\x80\x02(lp0\n", "damaged"),
        (b"\x80\x02" + b"]" * 5_000_000, "bytes of names"),
        (b"\x80\x02}" + unicode("a") + b"Ns" + unicode("a") + b"Ns.", "twice"),
        (b"\x80\x02}" + unicode("a") + b"Ns.", "no state dict"),
        (tensor(0, ONE, ONE), None),
        (tensor(0, b"K\x05\x85", ONE), "beyond its storage"),
        (tensor(3, b"K\x02\x85", ONE), "beyond its storage"),
        (tensor(-1, ONE, ONE), "unknown form"),
        (tensor(0, b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"), "beyond its storage"),
        (tensor(0, b"J\xff\xff\xff\xff\x85", ONE), "unknown form"),
        (tensor(0, b"(" + b"K\x01" * 65 + b"t", b"(" + b"K\x01" * 65 + b"t"), "unknown form"),
        (tensor(0, b"(" + (b"\x8a\xfe" + b"\x7f" * 254) * 9000 + b"t", b"(" + b"K\x01" * 9000 + b"t"), "unknown form"),
        (tensor(0, ONE, ONE, numel=5), "storage shorter"),
        (tensor(0, ONE, ONE, numel=-1), "unknown form"),
        (tensor(0, ONE, ONE).replace(unicode("0"), unicode("../../etc/passwd")), "damaged"),
    ],
)
def test_hostile_pickles(tmp_path: Path, program: bytes, message: str | None) -> None:
    write_zip(tmp_path / "model.bin", program, {"0": bytes(16)})
    started = time.monotonic()
    if message is None:
        assert open_tensors(tmp_path / "model.bin")["a"].view().tolist() == [0]
    else:
        with pytest.raises(fq.InputError, match=message):
            open_tensors(tmp_path / "model.bin")
    assert time.monotonic() - started < 5


def test_hostile_zips(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_zip(path, tensor(0, ONE, ONE), {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(fq.InputError, match="compressed"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(fq.InputError, match="not as torch.save writes it"):
        open_tensors(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, tensor(0, ONE, ONE), {"0": bytes(16)})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(fq.InputError, match="not as torch.save writes it"):
        open_tensors(path)


def test_files_other_than_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    contents = {
        b"": "not a checkpoint",
        b"<!DOCTYPE html>": "not a checkpoint",
        b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
        (GOLDEN / "torch" / "legacy.pt").read_bytes(): r"legacy.*torch.save\(torch.load",
        (GOLDEN / "torch" / "module.pt").read_bytes(): r"names torch.nn.modules.linear.Linear",
        (GOLDEN / "torch" / "sparse.pt").read_bytes(): r"names torch._utils._rebuild_sparse_tensor",
        b"\x10" + bytes(7) + b'{"a":' + b"[" * 11: "damaged",
        struct.pack("<Q", 2**62) + b"{}": "damaged",
        struct.pack("<Q", 5 << 20) + b"{" + b" " * ((5 << 20) - 2) + b"}": "names and shapes|damaged",
    }
    for content, message in contents.items():
        path.write_bytes(content)
        with pytest.raises(fq.InputError, match=message) as caught:
            open_tensors(path)
        assert str(path) in str(caught.value)
    save_file({"a": np.zeros(4, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(fq.InputError, match="damaged"):
        open_tensors(path)
    with pytest.raises(fq.InputError, match="cannot be read"):
        open_tensors(tmp_path / "absent.safetensors")


def test_shards_that_do_not_fit_together(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"

    def expect(weight_map: Any, message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(fq.InputError, match=message):
            open_tensors(index)

    for name in ("a", "b"):
        save_file({"one": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    expect({"one": "a.safetensors", "two": "b.safetensors"}, "two files hold the same tensors: one")
    expect({"one": "a.safetensors", "two": "c.safetensors"}, "not there: c.safetensors")
    for outside in ("../a.safetensors", "/etc/passwd", "x/a.safetensors", "..", "."):
        expect({"one": outside}, "outside its folder")
    expect({"one": index.name}, "names an index among its files")
    expect([1], "no weight_map")
    expect({"one": 3}, "no weight_map")
    torch_save({"two": np.zeros(2, np.float32)}, tmp_path / "b.bin")
    index.write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.bin"}}))
    assert open_tensors(index).keys() == {"one", "two"}


@pytest.mark.parametrize(
    "text", ["", "[1]", "nope", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff", " " * (17 << 20)]
)
def test_invalid_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(fq.InputError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("vision_config", "num_attention_heads", 5, "5 attention heads do not divide hidden_size 32"),
        ("qformer_config", "num_attention_heads", 5, "5 attention heads do not divide hidden_size 24"),
        ("qformer_config", "num_hidden_layers", 10**9, "from 0 to 1000"),
        ("qformer_config", "hidden_size", "24", "whole number"),
        ("qformer_config", "hidden_size", True, "whole number"),
        ("qformer_config", "cross_attention_frequency", 0, "from 1"),
        ("qformer_config", "layer_norm_eps", -1, "number from"),
        ("qformer_config", "layer_norm_eps", float("nan"), "number from"),
        ("qformer_config", "hidden_act", "prelu", "known are gelu"),
        ("qformer_config", "hidden_act", ["gelu"], "known are gelu"),
        ("qformer_config", "position_embedding_type", "relative_key", "only 'absolute'"),
        ("qformer_config", "pad_token_id", 50, "not below vocab_size"),
        ("vision_config", "qkv_bias", "yes", "true or false"),
        ("vision_config", "patch_size", 29, "larger than image_size"),
        (None, "vision_config", None, "no vision_config"),
        (None, "num_query_tokens", None, "no num_query_tokens"),
        (None, "qformer_config", 7, "must be an object"),
        (None, "pruned_heads", {"7": [0]}, "layers 0 to 2"),
        (None, "pruned_heads", {"0": [9]}, "heads are 0 to 2"),
        (None, "pruned_heads", {"0": 3}, "must map"),
        (None, "pruned_heads", 3, "must map"),
        (None, "tokenizer", 3, "tokenizer"),
    ],
)
def test_invalid_configs(part: str | None, field: str, value: Any, message: str) -> None:
    import cases

    config = json.loads(json.dumps(cases.GEOMETRIES["frequency_1"]))
    target = config[part] if part else config
    if value is None:
        del target[field]
    else:
        target[field] = value
    with pytest.raises(fq.InputError, match=message):
        fq.Blip2Config.from_dict(config)
