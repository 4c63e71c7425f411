"""Run upstream on a full-size folder: `python tests/oracle/full_size.py FOLDER` adds `upstream.safetensors` to it."""

import sys
from pathlib import Path

import torch
from diffusers.pipelines.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from record import DEFAULT_MODEL, run
from safetensors.torch import save_file
from transformers import Blip2Config

import cases


def main() -> None:
    folder = Path(sys.argv[1])
    config = Blip2Config.from_pretrained(folder)
    config.tokenizer = str(DEFAULT_MODEL)
    model = Blip2QFormerModel.from_pretrained(folder, config=config).eval()
    batch = {name: torch.from_numpy(value) for name, value in cases.full_batch().items()}
    image = model.visual_encoder(batch["pixel_values"].permute(0, 3, 1, 2)).last_hidden_state
    output = run(model, batch["input_ids"].long(), image, batch["attention_mask"].long())
    cases.loss(output, torch.from_numpy).backward()
    tensors = {name: output[name].detach() for name in (*cases.IN_LOSS, "pooler_output")}
    for name, parameter in model.named_parameters():
        tensors[f"gradient {name}"] = torch.from_numpy(cases.sample(name, parameter.grad.numpy()))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "upstream.safetensors")


if __name__ == "__main__":
    main()
