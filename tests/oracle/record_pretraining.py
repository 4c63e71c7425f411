"""Record LAVIS's stage-1 answers: `python tests/oracle/record_pretraining.py FOLDER`, with `requirements-lavis.txt`.

Each answer is LAVIS 1.0.2's own, with two exceptions. Negatives are fixed. Images that share an id share their targets
and are not negatives of each other, as in LAVIS's repository but in no release. LAVIS computes in float64, and answers
are saved in float32, so they do not depend on a processor's rounding.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import lavis_files
import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import GenerationConfig

import cases

MODULES = blip2, blip2_qformer, _ = lavis_files.load()

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a an the of and on in left right above below small large tiny red green blue "
    "yellow black white circle square triangle star ring dog cat bird tree house two three with without "
    "very , . ##s ##ish"
).split()

TEXTS = (
    "a small red circle",
    "two black cats on the very large white house",
    "star",
    "a blue square left of a green triangle , and more than fits",
    "the dog without a tree",
    "an",
)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "frequency_1": {
        "vision_config": {
            "hidden_size": 18,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 16,
        },
        "qformer_config": {
            "hidden_size": 28,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "num_query_tokens": 4,
        "image_text_hidden_size": 20,
        "max_text_length": 12,
        "end": 96,
    },
    "frequency_2": {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 26,
        },
        "qformer_config": {
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 32,
        },
        "num_query_tokens": 5,
        "image_text_hidden_size": 14,
        "max_text_length": 9,
        "end": 79,
        "image_id": [3, 7, 3, 0, 7, 3],
    },
    "frequency_3": {
        "vision_config": {
            "hidden_size": 15,
            "num_hidden_layers": 1,
            "num_attention_heads": 5,
            "image_size": 24,
        },
        "qformer_config": {
            "hidden_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 20,
        },
        "num_query_tokens": 2,
        "image_text_hidden_size": 40,
        "max_text_length": 16,
        "end": 21,
    },
}

CAPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "max_length": 12, "min_length": 1},
    "greedy_min": {"num_beams": 1, "max_length": 12, "min_length": 7},
    "greedy_short": {"num_beams": 1, "max_length": 4, "min_length": 1},
    "greedy_penalty": {"num_beams": 1, "max_length": 12, "min_length": 1, "repetition_penalty": 1.5},
    "beams": {"num_beams": 3, "max_length": 12, "min_length": 1},
    "beams_min": {"num_beams": 3, "max_length": 12, "min_length": 7},
    "beams_short": {"num_beams": 3, "max_length": 4, "min_length": 1},
    "beams_penalty": {"num_beams": 3, "max_length": 12, "min_length": 1, "repetition_penalty": 1.5},
    "nucleus": {"num_beams": 1, "max_length": 8, "min_length": 4, "top_p": 0.9},
}


class Watched:
    """`torch.nn.functional` for LAVIS's forward: records values, and lets images share targets."""

    def __init__(self, same: torch.Tensor | None) -> None:
        self.same = same
        self.features: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def normalize(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        self.features.append(F.normalize(x, **options))
        return self.features[-1]

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        self.logits.append(logits.detach().clone())
        if self.same is not None and len(self.logits) <= 2:  # image to text, text to image, then ITM
            labels = self.same / self.same.sum(dim=1, keepdim=True)
        return F.cross_entropy(logits, labels, **options)


def whole(geometry: str) -> dict[str, Any]:
    """The config by the names of `config.json`, with the settings that LAVIS fixes."""
    config = dict(GEOMETRIES[geometry])
    vision, qformer = dict(config["vision_config"]), dict(config["qformer_config"])
    vision |= {"intermediate_size": 4 * vision["hidden_size"], "patch_size": 8}
    vision |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    qformer |= {"vocab_size": len(WORDS) + 1, "max_position_embeddings": 20, "layer_norm_eps": 1e-12}
    qformer |= {"cross_attention_frequency": int(geometry[-1]), "encoder_hidden_size": vision["hidden_size"]}
    return {**config, "vision_config": vision, "qformer_config": qformer}


def build(config: dict[str, Any]) -> torch.nn.Module:
    """LAVIS's model with random weights."""
    model = lavis_files.build(MODULES, config, WORDS, freeze_vit=False, max_txt_len=config["max_text_length"]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
        # So that some captions end early, and none contains padding.
        end = torch.from_numpy(cases.draw(f"end {config['end']}", (config["qformer_config"]["hidden_size"],)))
        model.Qformer.bert.embeddings.word_embeddings.weight[WORDS.index("[SEP]")] = end.bfloat16().float()
        model.Qformer.cls.predictions.bias[WORDS.index("[PAD]")] -= 8
    return model


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A random parameter with few digits, for a small file."""
    if name == "temp":
        return torch.tensor(0.125)
    # The names by which `cases` recognises the kind.
    known = name.replace("ln_", "norm_").replace("in_proj_bias", "in_proj.bias")
    return torch.from_numpy(cases.weight(known, shape)).bfloat16().float()


def negatives(name: str, same: torch.Tensor) -> torch.Tensor:
    """One index per row, of an image or text with another id."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.tensor([rng.choice(np.flatnonzero(~row)) for row in same.numpy()])


def answer(model: torch.nn.Module, samples: dict[str, Any], drawn: list[torch.Tensor]) -> dict[str, Any]:
    """LAVIS's forward with these negatives: an image for each text and a text for each image."""
    same = samples["same"]
    shared = bool(same.sum() > len(same))
    watched = Watched(same.float() if shared else None)
    language: list[Any] = []
    hook = model.Qformer.register_forward_hook(lambda _module, _inputs, output: language.append(output))
    with (
        mock.patch.object(blip2_qformer, "F", watched),
        mock.patch("torch.multinomial", side_effect=torch.cat(drawn)),
    ):
        output = model(samples)
    hook.remove()
    sim_i2t, sim_t2i, itm_logits = watched.logits
    return {
        "loss": output.loss,
        "loss_itc": output.loss_itc,
        "loss_itm": output.loss_itm,
        "loss_itg": output.loss_lm,
        "image_features": watched.features[0],
        "text_features": watched.features[1],
        "sim_i2t": sim_i2t,
        "sim_t2i": sim_t2i,
        "itm_logits": itm_logits,
        "itg_logits": language[0].logits,
        # The distribution of LAVIS's repository; that of 1.0.2 differs and is not used.
        "negative_image_probabilities": sim_t2i.masked_fill(same, -10000).softmax(dim=1),
        "negative_text_probabilities": sim_i2t.masked_fill(same, -10000).softmax(dim=1),
    }


def features(model: torch.nn.Module, samples: dict[str, Any], tokens: dict[str, torch.Tensor]) -> dict[str, Any]:
    image = model.extract_features(samples, mode="image")
    text = model.extract_features(samples, mode="text")
    multimodal = model.extract_features(samples, mode="multimodal")
    with torch.no_grad():
        _, vision = model.forward_image(samples["image"])
        # Row i: image i with each text.
        match = [
            model.compute_itm(one.expand(len(vision), -1, -1), tokens["input_ids"], tokens["attention_mask"])
            for one in vision
        ]
    tokens = model.tokenizer(samples["text_input"], padding=True, return_tensors="pt")  # as `extract_features` does
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "vision": vision,
        "image_queries": image.image_embeds,
        "image_features": image.image_embeds_proj,
        "text_hidden": text.text_embeds,
        "text_features": text.text_embeds_proj,
        "multimodal": multimodal.multimodal_embeds,
        "match": torch.stack(match),
    }


def repeat_tokens(expand_size: int, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
    """Expand only tokens to beams: LAVIS repeats its images itself, and newer transformers would repeat them again."""
    tokens, mask = (x.repeat_interleave(expand_size, dim=0) for x in (input_ids, attention_mask))
    return tokens, {**rest, "attention_mask": mask}


def caption(model: torch.nn.Module, image: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """LAVIS's `generate`, with the token ids instead of strings."""
    extra = {"return_dict_in_generate": True, "output_scores": True}
    if "repetition_penalty" in settings:  # LAVIS accepts it but ignores it
        extra["repetition_penalty"] = settings["repetition_penalty"]
    generate, kept, probabilities = model.Qformer.generate, [], []

    def generate_and_keep(**options: Any) -> torch.Tensor:
        kept.append(generate(**options, **extra))
        return kept[0].sequences

    def second(distribution: torch.Tensor, num_samples: int) -> torch.Tensor:
        """The distribution from which a sampler draws."""
        probabilities.append(distribution.clone())
        two = distribution.topk(2)
        return torch.where(two.values[:, 1:] > 0, two.indices[:, 1:], two.indices[:, :1])

    with (
        mock.patch.object(model.Qformer, "generate", generate_and_keep),
        mock.patch.object(model.Qformer, "_expand_inputs_for_generation", repeat_tokens),
        mock.patch("torch.multinomial", second),
    ):
        model.generate({"image": image}, use_nucleus_sampling="top_p" in settings, **settings)
    answers = {**settings, "ids": kept[0].sequences}
    if settings["num_beams"] > 1:
        answers["scores"] = kept[0].sequences_scores
    if probabilities:
        answers["probabilities"] = torch.stack(probabilities, dim=1)
    return answers


def record(geometry: str) -> dict[str, np.ndarray]:
    config = whole(geometry)
    model = build(config)
    size, count = config["vision_config"]["image_size"], len(TEXTS)
    pixels = torch.from_numpy(cases.draw(f"pretraining {geometry}", (count, 3, size, size))).bfloat16().float()
    image_id = torch.tensor(config.pop("image_id", range(count)))
    same = image_id[:, None] == image_id
    samples = {"image": pixels, "text_input": list(TEXTS), "same": same}
    length = {"padding": "max_length", "truncation": True, "max_length": config["max_text_length"]}
    tokens = dict(model.tokenizer(list(TEXTS), **length, return_tensors="pt"))
    drawn = [negatives(f"{geometry} {kind}", same) for kind in ("image", "text")]

    del config["end"]
    answers = {"config": np.array(json.dumps(config))}
    keep(answers, "state", model.state_dict())
    inputs = {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    drawn_inputs = {"negative_image_index": drawn[0], "negative_text_index": drawn[1]}
    keep(answers, "inputs", {**inputs, "image_id": image_id, **drawn_inputs})

    output = answer(model, samples, drawn)
    output["loss"].backward()
    keep(answers, "outputs", output)
    keep(answers, "gradients", {name: parameter.grad for name, parameter in model.named_parameters()})
    keep(answers, "features", features(model, samples, tokens))
    if geometry == "frequency_1":
        # As in LAVIS's training: the gathered features carry no gradient, not even those of the process itself.
        model.zero_grad()
        lavis_files.gather(own_gradients=False)
        answer(model, samples, drawn)["loss"].backward()
        lavis_files.gather(own_gradients=True)
        ends = ("vision_proj.weight", "text_proj.weight", "query_tokens", "temp", "ln_vision.weight")
        keep(answers, "gradients_gathered", {name: model.get_parameter(name).grad for name in ends})
    for name, settings in CAPTIONS.items():
        keep(answers, f"captions/{name}", caption(model, pixels, settings))
    return answers


def record_nucleus() -> dict[str, np.ndarray]:
    """LAVIS's sampling distribution: LAVIS sets only `top_p`, and transformers adds its default `top_k`."""
    settings = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    defaults = GenerationConfig(do_sample=True, top_p=settings["top_p"])
    assert all(getattr(defaults, name) == value for name, value in settings.items())
    logits = torch.from_numpy(cases.draw("nucleus", (5, 120))) * torch.tensor([[0.1], [0.5], [1], [2], [8]])
    warper = blip2.BertLMHeadModel(blip2.BertConfig(num_hidden_layers=0))._get_logits_warper(defaults)
    probabilities = warper(None, logits).softmax(dim=-1)
    return {"logits": logits.numpy(), "probabilities": probabilities.numpy()} | {
        name: np.array(value) for name, value in settings.items()
    }


def keep(answers: dict[str, np.ndarray], label: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        answers[f"{label}/{name}"] = value.detach().numpy() if isinstance(value, torch.Tensor) else np.array(value)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    lavis_files.compute_in_float64()
    records = {geometry: record(geometry) for geometry in GEOMETRIES} | {"nucleus": record_nucleus()}
    for name, answers in records.items():
        cases.save(folder / f"pretraining_{name}.npz", answers)


if __name__ == "__main__":
    main()
