"""Damage files at random and read them: `python tests/fuzz_readers.py SEED COUNT FOLDER`.

Each file must load or raise InputError. Limits on time and memory turn hangs and huge allocations into failures.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import jax
from safetensors.numpy import save_file

import cases
import flax_qformer as fq
from conftest import weights
from torch_files import torch_save

CONFIG = fq.Blip2Config.from_dict(
    {
        "vision_config": {**cases.GEOMETRIES["frequency_3"]["vision_config"], "num_hidden_layers": 1},
        "qformer_config": {**cases.GEOMETRIES["frequency_3"]["qformer_config"], "num_hidden_layers": 1},
        "num_query_tokens": 1,
    }
)
INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x80",
    b"{",
    b"}",
    b"[",
    b'"',
    b"9" * 30,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"(",
    b"t",
    b"R.",
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """A few random changes, mostly near the ends, where headers and directories are."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        near = min(len(result), 3000)
        place = rng.choice(
            (rng.randrange(near), max(0, len(result) - 1 - rng.randrange(near)), rng.randrange(len(result)))
        )
        match rng.randrange(6):
            case 0:
                result[place] ^= 1 << rng.randrange(8)
            case 1:
                result[place] = rng.randrange(256)
            case 2:
                del result[place : place + rng.choice((1, 4, 100))]
            case 3:
                result[place:place] = rng.choice(INTERESTING)
            case 4:
                result[place : place + 8] = rng.choice(INTERESTING)
            case 5:
                del result[place:]
        if not result:
            break
    return bytes(result)


def main() -> None:
    seed, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    rng, tensors, outcomes = random.Random(seed), weights(CONFIG), Counter()
    first, second = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    index = {"weight_map": {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")}}
    save_file(first, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    save_file(tensors, folder / "model.safetensors")
    torch_save({"model": tensors, "epoch": 1, "lr": [1.5, None]}, folder / "model.bin")
    originals = {
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
        "model.bin": (folder / "model.bin").read_bytes(),
        "index.json": json.dumps(index).encode(),
        "config.json": json.dumps(CONFIG.to_dict()).encode(),
    }
    for name, data in originals.items():
        (folder / name).write_bytes(data)
    for number in range(count):
        name = rng.choice(list(originals))
        (folder / name).write_bytes(damage(originals[name], rng))
        read = "model.safetensors" if name == "config.json" else name
        try:
            fq.from_pretrained(folder / read, allow_non_finite=True)
            outcomes[name, "loaded"] += 1
        except fq.InputError as error:
            outcomes[name, "refused" if str(error).strip() else f"without a word: {number}"] += 1
        (folder / name).write_bytes(originals[name])
    # With its original files restored, the folder loads.
    _, params = fq.from_pretrained(folder / "index.json")
    assert len(jax.tree.leaves(params)) == len(tensors)
    print(dict(sorted(outcomes.items())))


if __name__ == "__main__":
    main()
