"""Upstream's side of `diffusion.py` and `gpu.py`: `torch_diffusion.py FOLDER`.

FOLDER has a folder for each part and `inputs.npz`. Answers a request {"task", "dtype", "compiled", "steps", "guidance"}
with the seconds that the task takes, and writes `answer.npy`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel


class Upstream:
    """The parts of upstream's pipeline, in the order in which its `__call__` runs them."""

    def __init__(self, folder: Path, compiled: bool, dtype: torch.dtype) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = {"text_encoder": ContextCLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
        parts = {
            name: kind.from_pretrained(folder / name, torch_dtype=dtype, low_cpu_mem_usage=False).eval().to(self.device)
            for name, kind in kinds.items()
        }
        self.vae = parts["vae"]
        functions = [parts["text_encoder"], parts["unet"], self.vae.decode]
        self.text_encoder, self.unet, self.decode = (
            [torch.compile(function, dynamic=False) for function in functions] if compiled else functions
        )
        self.dtype = dtype
        with np.load(folder / "inputs.npz") as file:
            self.inputs = {name: torch.from_numpy(value).to(self.device) for name, value in file.items()}
        latents = self.inputs["latents"].permute(0, 3, 1, 2)
        self.latents = latents.to(dtype).contiguous()
        self.text = self.inputs["text"].to(dtype).flatten(0, 1)

    def encode(self) -> torch.Tensor:
        """States of the negative prompts and the prompts, (2 * batch, 77, width)."""
        ids, subjects = self.inputs["input_ids"], self.inputs["subjects"].to(self.dtype)
        positive = self.text_encoder(input_ids=ids, ctx_embeddings=subjects, ctx_begin_pos=[2] * len(ids))[0]
        negative = self.text_encoder(input_ids=self.inputs["negative_ids"], ctx_embeddings=None)[0]
        return torch.cat([negative, positive])

    def denoise(self, text: torch.Tensor, steps: int, calls: int | None, guidance: float) -> torch.Tensor:
        """Latents after `calls` calls of the UNet, by default all."""
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
        )
        scheduler.set_timesteps(steps)
        latents = self.latents
        for timestep in scheduler.timesteps[:calls]:
            negative, positive = self.unet(torch.cat([latents] * 2), timestep, text, return_dict=False)[0].chunk(2)
            predicted = negative + guidance * (positive - negative)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
        return latents

    def draw(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = self.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)

    def tasks(self, steps: int, guidance: float) -> dict[str, Callable[[], torch.Tensor]]:
        def channels_last(x: torch.Tensor) -> torch.Tensor:
            return x.permute(0, 2, 3, 1)

        return {
            "text encoder": lambda: self.encode().chunk(2)[1],
            "guided step": lambda: channels_last(self.denoise(self.text, steps, 1, guidance)),
            "VAE decode": lambda: channels_last(self.draw(self.latents)),
            "picture": lambda: channels_last(self.draw(self.denoise(self.encode(), steps, None, guidance))),
        }


def main() -> None:
    folder = Path(sys.argv[1])
    transformers.logging.set_verbosity_error()  # position_ids are a constant
    sides: dict[Any, Upstream] = {}
    for line in sys.stdin:
        request = json.loads(line)
        # A file of inputs is written before the first request for it.
        key = request["dtype"], request["compiled"], (folder / "inputs.npz").stat().st_mtime_ns
        if key not in sides:
            # One dtype and batch at a time, so that memory suffices.
            sides = {other: side for other, side in sides.items() if other[::2] == key[::2]}
            sides[key] = Upstream(folder, request["compiled"], getattr(torch, request["dtype"]))
        task = sides[key].tasks(request["steps"], request["guidance"])[request["task"]]
        with torch.no_grad():
            start = time.perf_counter()
            output = task().float().cpu()
            took = time.perf_counter() - start
        np.save(folder / "answer.npy", output.numpy())
        print(json.dumps({"seconds": took}), flush=True)


if __name__ == "__main__":
    main()
