"""Upstream's answers for `ContextCLIPTextModel`, small models. Configs and token ids are saved with the answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
from transformers import CLIPTextConfig, CLIPTextModel

import cases

CONFIGS: dict[str, dict[str, Any]] = {
    # As Stable Diffusion 1.x. The end of text is the highest id.
    "quick_gelu": {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "eos_token_id": 2,
    },
    # As 2.x, with sizes that are no powers of two, another eps, and an end of text that is not in the vocabulary.
    "gelu": {
        "vocab_size": 31,
        "hidden_size": 18,
        "intermediate_size": 30,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 13,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
    },
}
BATCH, TOKENS, VECTORS = 3, 8, 5
BEGIN = (2, 0, 8)
"""Index of the first vector in each example: in the middle, first and last."""
EOS = 20
"""An end of text in the middle of the vocabulary, as after words were added."""


def record_diffusion_text_encoder(folder: Path) -> None:
    """Write `diffusion_text_encoder.npz`."""
    answers: dict[str, np.ndarray] = {}
    for label, values in CONFIGS.items():
        config = CLIPTextConfig(**values)
        model = ContextCLIPTextModel(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(cases.weight(name, tuple(parameter.shape))))
        ids = np.random.RandomState(0).randint(0, config.vocab_size - 1, (BATCH, TOKENS))
        ids[:, -2:] = config.vocab_size - 1
        vectors = torch.from_numpy(cases.draw(f"{label} vectors", (BATCH, VECTORS, config.hidden_size)))
        vectors = vectors.to(torch.get_default_dtype()).requires_grad_()
        inputs = {"input_ids": torch.from_numpy(ids), "output_hidden_states": True}
        answers[f"{label}/config"] = np.array(json.dumps(config.to_dict()))
        answers[f"{label}/input_ids"] = ids

        with torch.no_grad():
            keep(answers, f"{label}/text", model(**inputs))
            same = vectors[:1].expand(BATCH, -1, -1)
            keep(answers, f"{label}/one_subject", model(ctx_embeddings=same, ctx_begin_pos=[2] * BATCH, **inputs))
        output = model(ctx_embeddings=vectors, ctx_begin_pos=list(BEGIN), **inputs)
        keep(answers, f"{label}/subjects", output)
        in_loss = {name: output[name] for name in ("last_hidden_state", "pooler_output")}
        weights = {name: torch.from_numpy(cases.draw(f"loss {name}", tuple(x.shape))) for name, x in in_loss.items()}
        sum((x * weights[name]).sum() for name, x in in_loss.items()).backward()
        for name, parameter in model.named_parameters():
            answers[f"{label}/gradient/{name}"] = parameter.grad.numpy()
        answers[f"{label}/gradient/ctx_embeddings"] = vectors.grad.numpy()

        config.eos_token_id = EOS
        plain = CLIPTextModel(config).eval()
        plain.text_model.final_layer_norm.eps = model.text_model.final_layer_norm.eps  # not the config's
        plain.load_state_dict({name: value for name, value in model.state_dict().items() if "position_ids" not in name})
        ids = np.where(np.arange(TOKENS) == 4, EOS, ids)
        with torch.no_grad():
            answers[f"{label}/added_words/pooler_output"] = plain(torch.from_numpy(ids)).pooler_output.numpy()
    cases.save(folder / "diffusion_text_encoder.npz", answers)


def keep(answers: dict[str, np.ndarray], label: str, output: Any) -> None:
    answers[f"{label}/last_hidden_state"] = output.last_hidden_state.detach().numpy()
    answers[f"{label}/pooler_output"] = output.pooler_output.detach().numpy()
    answers[f"{label}/hidden_states"] = torch.stack(output.hidden_states).detach().numpy()
