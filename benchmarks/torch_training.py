"""LAVIS's side of `training_step.py`: `torch_training.py CONFIG BATCH`; a question is answered by a training step.

LAVIS trains the LayerNorm behind its frozen tower; here it is frozen as well, so that both sides do the same.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracle"))

import lavis_files


def build(config: dict) -> torch.nn.Module:
    """LAVIS's model as its `__init__` makes it, with weights as PyTorch draws them in place of downloads."""
    blip2, blip2_qformer, clip_vit = lavis_files.load()
    vision, qformer = config["vision_config"], config["qformer_config"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    bert = blip2.BertConfig(vocab_size=qformer["vocab_size"] - 1, **{name: qformer[name] for name in names})
    tower = clip_vit.VisionTransformer(
        input_resolution=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"] + 1,  # 1.0.2 leaves out the last one
        heads=vision["num_attention_heads"],
        use_grad_checkpointing=False,
    )
    words = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *(f"w{i}" for i in range(bert.vocab_size - 5))]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(words))
        tokenizer = blip2.BertTokenizer(str(vocabulary))
    with (
        mock.patch.object(blip2.BertTokenizer, "from_pretrained", return_value=tokenizer),
        mock.patch.object(blip2.BertConfig, "from_pretrained", return_value=bert),
        mock.patch.object(blip2.BertLMHeadModel, "from_pretrained", lambda *_, config: blip2.BertLMHeadModel(config)),
        mock.patch.object(blip2, "create_clip_vit_L", return_value=tower),
    ):
        model = blip2_qformer.Blip2Qformer(
            vit_model="clip_L",
            img_size=vision["image_size"],
            vit_precision="fp32",
            freeze_vit=True,
            num_query_token=config["num_query_tokens"],
            cross_attention_freq=qformer["cross_attention_frequency"],
            embed_dim=config["image_text_hidden_size"],
        )
    model.ln_vision.requires_grad_(False)
    return model.train()


def main() -> None:
    model = build(json.loads(Path(sys.argv[1]).read_text()))
    with np.load(sys.argv[2]) as file:
        pixels, ids = (torch.from_numpy(file[name]) for name in ("pixel_values", "input_ids"))
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    # The tokenizer puts [CLS] and [SEP] around them again.
    texts = [" ".join(model.tokenizer.convert_ids_to_tokens(row[1:-1])) for row in ids]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, betas=(0.9, 0.98)
    )
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
