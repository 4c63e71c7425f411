"""A picture of what each query looks at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from flax_qformer.checkpoints.atomic import check_writable, new_file
from flax_qformer.commands.options import TEXT_MULTIPLE, ModelOptions, input_files, load_with_processor
from flax_qformer.errors import InputError
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.processing.attention_maps import attention_maps, draw_attention
from flax_qformer.processing.processor import open_image


@dataclass(frozen=True, kw_only=True)
class AttendOptions(ModelOptions):
    """Draw an image, and beside it where each query looks.

    Cross-attention is averaged over heads, and over layers or layer by layer. Each map is scaled to its own maximum.

    Attributes:
      image: image file.
      text: the subject's name.
      truncate: cut a text that is longer than the model reads, at its right end.
      layers: a row for each of these layers, counted from 0; without numbers, for each layer that looks at the image.
      output: the picture; the suffix selects its format.
    """

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    text: Annotated[
        str | None,
        tyro.conf.DisallowNone,
        tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: none, the queries read the image alone)"),
    ] = None
    truncate: bool = False
    layers: Annotated[
        tuple[int, ...] | None,
        tyro.conf.arg(metavar="[LAYER ...]", help_behavior_hint="(default: one row, their average)"),
    ] = None
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("attention.png")


def run(options: AttendOptions) -> None:
    suffix, known = options.output.suffix.removeprefix(".").lower(), ("png", "pdf", "svg", "jpg", "webp")
    if suffix not in known:
        raise InputError(f"{options.output} names no kind of picture; end it in .{', .'.join(known)}")
    check_writable(options.output, input_files(options, [options.image]))
    model, params, processor = load_with_processor(options, Blip2QFormerModel)
    image = open_image(options.image)
    batch = processor(image, options.text, truncate=options.truncate, pad_to_multiple_of=TEXT_MULTIPLE)
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch, output_attentions=True))
    output = run(params, batch)
    maps = np.asarray(attention_maps(output.cross_attentions, model.config), np.float32)[0]
    figure = draw_attention(image, _rows(maps, model, options.layers), title=options.text or "")
    # No picture format takes more than 16,000 pixels along a side.
    dpi = min(120, 16000 / max(figure.get_size_inches()))
    with new_file(options.output) as file:
        figure.savefig(file, format=suffix, dpi=dpi)
    print(f"wrote {options.output}")


def _rows(maps: np.ndarray, model: Blip2QFormerModel, layers: tuple[int, ...] | None) -> dict[str, np.ndarray]:
    """Rows of a picture: label -> (queries, grid, grid), from maps (layers, queries, grid, grid)."""
    if layers is None:
        return {"all layers": maps.mean(axis=0)}
    qformer = model.config.qformer_config
    attending = [i for i in range(qformer.num_hidden_layers) if qformer.has_cross_attention(i)]
    absent = [layer for layer in layers if layer not in attending]
    if absent:
        raise InputError(f"layer {absent[0]} does not look at the image; these do: {', '.join(map(str, attending))}")
    return {f"layer {layer}": maps[attending.index(layer)] for layer in layers or attending}
