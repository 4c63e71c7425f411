"""LAVIS's side of `training_step.py`: `torch_training.py CONFIG BATCH` runs a training step for each line of stdin.

LAVIS trains the LayerNorm after its frozen tower; here it is frozen, so that both sides do the same.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracle"))

import lavis_files


def build(config: dict) -> torch.nn.Module:
    """LAVIS's model with PyTorch's initial weights."""
    words = [
        *"[PAD] [UNK] [CLS] [SEP] [MASK]".split(),
        *(f"w{i}" for i in range(config["qformer_config"]["vocab_size"] - 6)),
    ]
    model = lavis_files.build(lavis_files.load(), config, words, freeze_vit=True)
    model.ln_vision.requires_grad_(False)
    return model.train()


def main() -> None:
    model = build(json.loads(Path(sys.argv[1]).read_text()))
    with np.load(sys.argv[2]) as file:
        pixels, ids = (torch.from_numpy(file[name]) for name in ("pixel_values", "input_ids"))
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    # The tokenizer adds [CLS] and [SEP] again.
    texts = [" ".join(model.tokenizer.convert_ids_to_tokens(row[1:-1])) for row in ids]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, betas=(0.9, 0.98)
    )
    ctypes.CDLL(None).malloc_trim(0)
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model({"image": pixels, "text_input": texts})["loss"]
        loss.backward()
        optimizer.step()
        took = time.perf_counter() - start
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        print(json.dumps({"seconds": took, "memory": peak, "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    main()
