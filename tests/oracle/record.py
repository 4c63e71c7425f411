"""Record upstream's answers: `python tests/oracle/record.py FOLDER`, in an environment of `requirements.txt`.

Upstream computes in float64 from float32 weights and inputs. The answers are saved in float32, so they do not depend on
a processor's rounding.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import record_diffusion_schedulers
import record_diffusion_unet
import torch
from diffusers.pipelines.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from record_diffusion_autoencoder import record_diffusion_autoencoder
from record_diffusion_pipeline import record_diffusion_pipeline
from record_diffusion_text_encoder import record_diffusion_text_encoder
from transformers import BertTokenizer, Blip2Config
from transformers.activations import ACT2FN
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionEmbeddings

import cases

DEFAULT_MODEL = Path(__file__).parents[2] / "flax_qformer" / "assets" / "default"


def build(config: dict[str, Any]) -> Blip2QFormerModel:
    """Upstream's model with random weights, in the default dtype. It needs a tokenizer: the embedded one."""
    model = Blip2QFormerModel(Blip2Config(**config, tokenizer=str(DEFAULT_MODEL))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(cases.weight(name, tuple(parameter.shape))))
    return model


def run(
    model: Blip2QFormerModel,
    input_ids: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Upstream's `forward` from token ids. It accepts only strings, so its parts are called in the same way."""
    queries = None
    if image_embeds is not None:
        queries = model.query_tokens
        if input_ids is None:
            queries = queries.repeat(len(image_embeds), 1, 1)
    if queries is None:
        embeddings = model.embeddings
        x = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings.weight[: input_ids.shape[1]]
        x = embeddings.dropout(embeddings.LayerNorm(x))
    else:
        x = model.embeddings(input_ids=input_ids, query_embeds=queries)
    num_queries = 0 if queries is None else queries.shape[1]
    if attention_mask is None:
        attention_mask = torch.ones(x.shape[:2], dtype=torch.long)
    elif attention_mask.dim() == 2 and attention_mask.shape[1] < x.shape[1]:
        ones = torch.ones((len(x), num_queries), dtype=torch.long)
        attention_mask = torch.cat([ones, attention_mask], dim=1)
    if image_embeds is not None and image_mask is None:
        image_mask = torch.ones(image_embeds.shape[:2])
    output = model.encoder(
        x,
        attention_mask=model.get_extended_attention_mask(attention_mask, x.shape[:2], x.device),
        head_mask=model.get_head_mask(head_mask, model.config.qformer_config.num_hidden_layers),
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=None if image_mask is None else model.invert_attention_mask(image_mask),
        output_attentions=True,
        output_hidden_states=True,
        return_dict=True,
        query_length=num_queries,
    )
    last = output.last_hidden_state
    return {
        "last_hidden_state": last,
        "pooler_output": last[:, 0],
        "query_embeddings": model.proj_layer(last[:, :num_queries]) if num_queries else None,
        "hidden_states": output.hidden_states,
        "attentions": output.attentions,
        "cross_attentions": output.cross_attentions,
    }


def record_geometry(geometry: str) -> dict[str, np.ndarray]:
    model = build(cases.GEOMETRIES[geometry])
    arrays = {name: tensor(value) for name, value in cases.batch(geometry).items()}
    pixels = arrays["pixel_values"].permute(0, 3, 1, 2)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    answers: dict[str, np.ndarray] = {}

    with torch.no_grad():
        vision = model.visual_encoder(pixels, output_attentions=True, output_hidden_states=True, return_dict=True)
        image = vision.last_hidden_state
        keep(answers, "vision", dict(vision))
        everything = run(model, ids, image, mask)
        keep(answers, "multimodal", everything)
        keep(answers, "queries_only", run(model, None, image))
        text_only = run(model, ids, None, mask)
        keep(answers, "text_only", {name: value for name, value in text_only.items() if name != "cross_attentions"})
        short = ("last_hidden_state", "query_embeddings")
        keep(answers, "mask_3d", run(model, ids, image, arrays["mask_3d"]), short)
        keep(answers, "image_mask", run(model, ids, image, mask, image_mask=arrays["image_mask"]), short)
        keep(answers, "image_mask_3d", run(model, ids, image, mask, image_mask=arrays["image_mask_3d"]), short)
        keep(answers, "head_mask_1d", run(model, ids, image, mask, head_mask=arrays["head_mask_1d"]), short)
        keep(answers, "head_mask_2d", run(model, ids, image, mask, head_mask=arrays["head_mask_2d"]), short)

    output = run(model, ids, model.visual_encoder(pixels).last_hidden_state, mask)
    loss = cases.loss(output, tensor)
    loss.backward()
    answers["loss"] = loss.detach().numpy()
    keep(answers, "gradients", {name: parameter.grad for name, parameter in model.named_parameters()})

    record_dropout(answers, geometry, arrays)
    if geometry in cases.PRUNED:
        model.prune_heads(cases.PRUNED[geometry])
        with torch.no_grad():
            keep(answers, "pruned", run(model, ids, image, mask))
    return answers


def record_dropout(answers: dict[str, np.ndarray], geometry: str, arrays: dict[str, torch.Tensor]) -> None:
    for label, config in cases.dropouts(geometry).items():
        model = build(config).train()
        with torch.no_grad():
            image = model.visual_encoder(arrays["pixel_values"].permute(0, 3, 1, 2)).last_hidden_state
            output = run(model, arrays["input_ids"], image, arrays["attention_mask"])
        keep(answers, f"dropout_{label}", output, ("last_hidden_state",))


def record_default() -> dict[str, np.ndarray]:
    """The embedded model on strings and an image, through upstream's own `forward`."""
    config = Blip2Config.from_pretrained(DEFAULT_MODEL)
    config.tokenizer = str(DEFAULT_MODEL)
    model, info = Blip2QFormerModel.from_pretrained(DEFAULT_MODEL, config=config, output_loading_info=True)
    heads = ("vision_proj.", "text_proj.", "itm_head.", "cls.", "temp")
    assert all(name.startswith(heads) for name in info["unexpected_keys"]), info
    assert not info["missing_keys"] + info["mismatched_keys"], info
    model.to(torch.get_default_dtype()).eval()
    processor = BlipImageProcessor.from_pretrained(DEFAULT_MODEL)
    texts = list(cases.TEXTS)
    images = [cases.image("RGB", 40 + 10 * i, 90) for i in range(len(texts))]
    pixels = tensor(processor.preprocess(images, return_tensors="np")["pixel_values"])
    answers: dict[str, np.ndarray] = {}
    with torch.no_grad():
        keep(answers, "default", dict(model(texts, pixels)))
        keep(answers, "default", {"query_embeddings": model(texts, pixels, return_dict=False)})
    return answers


def record_processor() -> dict[str, np.ndarray]:
    tokenizer = BertTokenizer.from_pretrained(DEFAULT_MODEL, truncation_side="right")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokens = tokenizer(list(cases.TEXTS), padding=True, return_tensors="np")
    answers = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    short = tokenizer(list(cases.TEXTS), padding=True, truncation=True, max_length=8, return_tensors="np")
    answers["truncated"] = short["input_ids"]
    small = BlipImageProcessor(size={"height": 20, "width": 28})
    for mode in cases.IMAGE_MODES:
        pixels = small.preprocess(cases.image(mode), return_tensors="np")["pixel_values"]
        answers[f"image/{mode}"] = pixels.transpose(0, 2, 3, 1)
    array = np.asarray(cases.image("RGB"))
    answers["array"] = small.preprocess(array, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    full = BlipImageProcessor().preprocess(cases.image("RGB"), return_tensors="np")["pixel_values"]
    answers["full"] = full.transpose(0, 2, 3, 1)[:, ::4]
    return answers


def record_files(folder: Path) -> None:
    """Files that PyTorch writes, for our reader, which runs without PyTorch."""
    folder.mkdir(exist_ok=True)
    torch.save(build(cases.GEOMETRIES["frequency_3"]).state_dict(), folder / "state_dict.bin")
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    state = {
        "whole": whole,
        "shares_storage": whole[1:3, 2:],
        "transposed": whole.T,
        "parameter": torch.nn.Parameter(whole * 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        **{str(kind): (whole / 3).to(kind) for kind in kinds},
    }
    training = {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "lr": [1e-4]}, "epoch": 3}
    torch.save(training, folder / "training.pth")
    torch.save(state, folder / "protocol_4.pt", pickle_protocol=4)
    torch.save({"whole": whole}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    torch.save({"sparse": whole.to_sparse()}, folder / "sparse.pt")


def record_activations() -> dict[str, np.ndarray]:
    x = tensor(np.linspace(-12, 12, 241, dtype=np.float32))
    return {"x": x.numpy(), **{name: ACT2FN[name](x).numpy() for name in ACT2FN}}


def record_positions() -> dict[str, np.ndarray]:
    """Positions for other image sizes, which transformers' vision tower has and diffusers' copy lacks."""
    answers: dict[str, np.ndarray] = {}
    for geometry in cases.GEOMETRIES:
        model = build(cases.GEOMETRIES[geometry])
        embeddings = Blip2VisionEmbeddings(model.config.vision_config)
        embeddings.position_embedding = model.visual_encoder.embeddings.position_embedding
        for size in cases.IMAGE_SIZES:
            tokens = torch.empty(1, (size // embeddings.patch_size) ** 2 + 1, embeddings.embed_dim)
            positions = embeddings.interpolate_pos_encoding(tokens, size, size)
            answers[f"{geometry}/{size}"] = positions.detach().numpy()
    return answers


def tensor(value: np.ndarray) -> torch.Tensor:
    """A tensor; floating point is cast to the default dtype."""
    converted = torch.from_numpy(value)
    return converted.to(torch.get_default_dtype()) if converted.is_floating_point() else converted


def keep(
    answers: dict[str, np.ndarray], label: str, values: dict[str, Any], names: tuple[str, ...] | None = None
) -> None:
    for name, value in values.items():
        if value is None or (names and name not in names):
            continue
        for i, part in enumerate(value) if isinstance(value, tuple) else [("", value)]:
            answers[f"{label}/{name}" + (f"/{i}" if i != "" else "")] = part.numpy()


def main() -> None:
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    record_files(folder / "torch")
    torch.set_default_dtype(torch.float64)
    records = {geometry: record_geometry(geometry) for geometry in cases.GEOMETRIES}
    records |= {"default": record_default(), "processor": record_processor(), "activations": record_activations()}
    records |= {"positions": record_positions()}
    records |= {"diffusion_schedulers": record_diffusion_schedulers.record()}
    records |= {"diffusion_unet": record_diffusion_unet.record()}
    for name, answers in records.items():
        cases.save(folder / f"{name}.npz", answers)
    record_diffusion_text_encoder(folder)
    record_diffusion_autoencoder(folder)
    record_diffusion_pipeline(folder)


if __name__ == "__main__":
    main()
