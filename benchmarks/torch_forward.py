"""Upstream's side of `forward.py` and `gpu.py`: `torch_forward.py MODEL BATCHES ANSWERS TOKENIZER`.

Answers a request {"dtype", "batch", "compiled", "repeats"} with the seconds of a forward pass, the peak GPU memory and
the number of threads.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from transformers import Blip2Config


class Upstream(torch.nn.Module):
    """Upstream's `forward` from token ids. It accepts only strings, so its parts are called in the same way."""

    def __init__(self, model: Blip2QFormerModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        model, queries = self.model, self.model.config.num_query_tokens
        image = model.visual_encoder(pixel_values).last_hidden_state
        x = model.embeddings(input_ids=input_ids, query_embeds=model.query_tokens)
        mask = torch.cat([torch.ones((len(x), queries), dtype=torch.long, device=x.device), attention_mask], dim=1)
        image_mask = torch.ones(image.shape[:2], device=x.device)
        output = model.encoder(
            x,
            attention_mask=model.get_extended_attention_mask(mask, x.shape[:2], x.device),
            head_mask=model.get_head_mask(None, model.config.qformer_config.num_hidden_layers),
            encoder_hidden_states=image,
            encoder_attention_mask=model.invert_attention_mask(image_mask),
            return_dict=True,
            query_length=queries,
        )
        return model.proj_layer(output.last_hidden_state[:, :queries])


def main() -> None:
    folder, batches, answers, tokenizer = map(Path, sys.argv[1:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Blip2Config.from_pretrained(folder)
    config.tokenizer = str(tokenizer)
    eager = Upstream(Blip2QFormerModel.from_pretrained(folder, config=config)).eval().to(device)
    compiled = torch.compile(eager, dynamic=False)  # compiles for each size
    for line in sys.stdin:
        request = json.loads(line)
        dtype, size = getattr(torch, request["dtype"]), request["batch"]
        eager.to(dtype)
        with np.load(batches / f"{size}.npz") as file:
            batch = {name: torch.from_numpy(value).to(device) for name, value in file.items()}
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2).to(dtype).contiguous()
        batch = {name: x if x.is_floating_point() else x.long() for name, x in batch.items()}
        run = compiled if request["compiled"] else eager
        with torch.no_grad():
            start = time.perf_counter()
            for _ in range(request["repeats"]):
                output = run(**batch)
            output = output.float().cpu()
            took = (time.perf_counter() - start) / request["repeats"]
        np.save(answers / "answer.npy", output.numpy())
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        print(json.dumps({"seconds": took, "memory": memory, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
