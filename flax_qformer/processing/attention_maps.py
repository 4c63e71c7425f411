"""Maps of where each query looks, and pictures of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from flax_qformer.models.config import Blip2Config
from flax_qformer.processing.processor import to_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 480
"""Longer side, in pixels, of the copy of the image in each panel."""


def attention_maps(cross_attentions: Sequence[jax.Array], config: Blip2Config) -> jax.Array:
    """Where the queries look in each layer that cross-attends, averaged over heads.

    Args:
      cross_attentions: of a `QFormerOutput`: for each layer (batch, heads, queries, image tokens).

    Returns:
      (batch, layers, queries, grid, grid): the share of attention on each patch. The class token has the rest.
    """
    grid = config.vision_config.grid_size
    patches = jnp.stack([weights.mean(axis=1)[:, :, 1:] for weights in cross_attentions], axis=1)
    return patches.reshape(*patches.shape[:3], grid, grid)


def draw_attention(image: PIL.Image.Image, rows: dict[str, np.ndarray], title: str = "") -> "Figure":
    """Draw an image, and beside it rows of maps over it: the mean of all queries, then each.

    Args:
      image: the image that the model read.
      rows: label -> (queries, grid, grid); each map is scaled to its own maximum.
      title: a line above the image.

    Returns:
      A matplotlib figure.
    """
    from matplotlib.figure import Figure

    image = to_rgb(image)
    image.thumbnail((SIZE, SIZE))
    grey = image.convert("L")
    rows = {label: np.concatenate([maps.mean(axis=0, keepdims=True), maps]) for label, maps in rows.items()}
    panels = len(next(iter(rows.values())))
    aspect = min(image.height / image.width, 4)  # of a panel; a narrower image is centred
    figure = Figure(
        figsize=(1.3 * (panels + 2.2), (1.3 * aspect + 0.25) * max(len(rows), 2) + 0.4), layout="constrained"
    )
    grid = figure.add_gridspec(max(len(rows), 2), panels + 2)
    original = figure.add_subplot(grid[:, :2])
    original.imshow(image)
    original.set_axis_off()
    if title:
        original.set_title(title, parse_math=False)
    extent = (0, image.width, image.height, 0)
    for i, (label, maps) in enumerate(rows.items()):
        for panel, one in enumerate(maps):
            axes = figure.add_subplot(grid[i, panel + 2])
            strength = one / max(one.max(), 1e-12)
            axes.imshow(grey, cmap="gray", vmin=-255, vmax=255, extent=extent)
            axes.imshow(strength, cmap="hot", alpha=strength, vmin=0, vmax=1, extent=extent, interpolation="bilinear")
            axes.set_xticks([])
            axes.set_yticks([])
            if i == 0:
                axes.set_title(f"query {panel - 1}" if panel else "all queries", fontsize=8)
            if panel == 0:
                axes.set_ylabel(label, fontsize=8)
    return figure
