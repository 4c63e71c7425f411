"""Run upstream's UNet or autoencoder at full size: `python tests/oracle/full_size_drawing.py FOLDER`.

FOLDER is a part as upstream writes it; `upstream.safetensors` is added to it, with feature maps as upstream has them.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file

import unet_cases


def main() -> None:
    folder = Path(sys.argv[1])
    kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    # Weights are taken as the file has them, because random ones would double the memory.
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(folder)).eval()
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), assign=True)
    inputs = {name: torch.from_numpy(value) for name, value in unet_cases.full_inputs().items()}
    images = {name: value.permute(0, 3, 1, 2) for name, value in inputs.items() if value.dim() == 4}
    with torch.no_grad():
        if kind is diffusers.UNet2DConditionModel:
            sample = model(images["latents"], inputs["timestep"], inputs["text"]).sample
            outputs = {"sample": sample}
        else:
            distribution = model.encode(images["pixels"]).latent_dist
            outputs = {"mean": distribution.mean, "logvar": distribution.logvar}
            outputs["decoded"] = model.decode(images["latents"]).sample
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "upstream.safetensors")


if __name__ == "__main__":
    main()
