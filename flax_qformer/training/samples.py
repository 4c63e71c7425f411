"""Samples of an evaluation: the model's outputs for a few held-out images.

Each image is shown with its true caption, a caption by beam search, the attention maps of the queries, and the images
that its true caption retrieves.
"""

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_qformer.data.batches import evaluation_batches, open_row
from flax_qformer.data.sources import DataSettings, Source
from flax_qformer.models.captioning import NUM_BEAMS
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.parallel.processes import is_first
from flax_qformer.processing.attention_maps import attention_maps
from flax_qformer.processing.processor import Processor, to_rgb
from flax_qformer.training.evaluation import RetrievalResult
from flax_qformer.training.metrics import Samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 5
"""Images shown for each text."""

SIDE = 112
"""Width and height of an image in a picture, in pixels."""

DARK = 0.15
"""Brightness of an image where the attention is 0."""

BILINEAR = PIL.Image.Resampling.BILINEAR


class Sampler:
    """Draws samples of the same images at each evaluation. The model is compiled once."""

    def __init__(
        self,
        model: Blip2ForPreTraining,
        processor: Processor,
        source: Source,
        count: int,
        max_length: int,
        mesh: Mesh,
    ) -> None:
        """Prepare the compiled functions; `draw` reads the images.

        Args:
          source: the held-out examples.
          count: number of images to show.
          max_length: largest number of tokens of a caption.
          mesh: the mesh of the parameters. All processes of a job must call `draw` together.
        """
        self._processor, self._source, self._count, self._max_length = processor, source, count, max_length
        self._ids, self._rows = np.unique(source.image_ids, return_index=True)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        # Beam search is a loop, and on CPU a collective in a loop can hang a job of several processes, see
        # `rounds_at_once`. So `generate` has no collectives: each device gets all parameters, in the dtype of the
        # computation, and does the same work.
        self._gather = jax.jit(
            lambda params: jax.tree.map(lambda leaf: leaf.astype(model.dtype), params), out_shardings=self._replicated
        )
        apply: Any = model.apply

        @partial(jax.jit, out_shardings=self._replicated)
        def generate(params: Any, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
            states = apply({"params": params}, pixels, method="encode_image").last_hidden_state
            written = apply(
                {"params": params},
                encoder_hidden_states=states,
                eos_token_id=processor.tokenizer.sep_token_id,
                num_beams=NUM_BEAMS,
                max_length=max_length,
                min_length=1,
                method="caption",
            )
            output = apply(
                {"params": params},
                None,
                ids,
                mask,
                encoder_hidden_states=states,
                output_attentions=True,
                method="read",
            )
            maps = attention_maps(output.cross_attentions, model.config)
            return written, maps.astype(jnp.float32).mean(axis=1)

        self._generate = generate

    def draw(self, params: Any, result: RetrievalResult) -> Samples | None:
        """Run the model on the examples and draw its outputs. Only the first process returns samples.

        Args:
          params: the evaluated parameters.
          result: the evaluation of these parameters.

        Raises:
          InputError: no example can be used.
        """
        batch, true = self._examples()
        arrays = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
        placed = [jax.make_array_from_callback(a.shape, self._replicated, a.__getitem__) for a in arrays]
        tokens, maps = map(np.asarray, self._generate(self._gather(params), *placed))
        if not is_first():
            return None
        written = self._processor.tokenizer.batch_decode(tokens[: len(true)], skip_special_tokens=True)
        shown = batch["image_id"][: len(true)].tolist()
        attention = [_attention_row(self._image(image_id), row) for image_id, row in zip(shown, maps, strict=False)]
        retrieved = self._draw_retrieved(dict(zip(shown, true, strict=True)), result)
        pictures = {"attention": np.concatenate(attention), "retrieved": _pixels(retrieved)}
        return Samples(list(zip(true, written, strict=True)), pictures)

    def _examples(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """The first images that can be used, each with its first caption."""
        settings = DataSettings(
            self._source.name, batch_size=self._count, max_text_length=self._max_length, num_workers=0
        )
        source = self._source.select(np.sort(self._rows))
        with contextlib.closing(evaluation_batches(source, self._processor, settings)) as batches:
            return next(batches)

    def _image(self, image_id: int) -> PIL.Image.Image:
        row = self._source[int(self._rows[np.searchsorted(self._ids, image_id)])]
        return open_row(row["image"], row["name"])

    def _draw_retrieved(self, texts: dict[int, str], result: RetrievalResult) -> "Figure":
        """A row for each text: the retrieved images, best first. The text's own image has a green frame."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.5 * TOP, 1.8 * len(texts)))
        axes = figure.subplots(len(texts), TOP, squeeze=False)
        figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.25 / len(texts), wspace=0.05, hspace=0.25)
        for row, (own, text) in zip(axes, texts.items(), strict=True):
            row[0].set_title(text, loc="left", fontsize=9, parse_math=False)
            for axis in row:
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
            for axis, image_id in zip(row, result.best_images(own, TOP), strict=False):
                image = to_rgb(self._image(image_id))
                image.thumbnail((SIDE, SIDE))
                axis.imshow(image)
                axis.spines[:].set(visible=image_id == own, color="green", linewidth=4)
        return figure


def _attention_row(image: PIL.Image.Image, maps: np.ndarray) -> np.ndarray:
    """The image, then the image darkened by the mean attention and by the attention of each query.

    `draw_attention` makes a better picture but takes 100 times as long.

    maps: (queries, grid, grid) -> (SIDE, (2 + queries) * SIDE, 3) uint8; each map is scaled to its own maximum.
    """
    pixels = np.asarray(to_rgb(image).resize((SIDE, SIDE)))
    panels = [pixels]
    for strength in (maps.mean(axis=0), *maps):
        light = PIL.Image.fromarray(strength / max(strength.max(), 1e-12)).resize((SIDE, SIDE), BILINEAR)
        panels.append((pixels * (DARK + (1 - DARK) * np.asarray(light)[..., None])).astype(np.uint8))
    return np.concatenate(panels, axis=1)


def _pixels(figure: "Figure") -> np.ndarray:
    """A figure as (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
