"""The text encoder's tensors that are no parameters. Its parameters have the names of `stable_diffusion`."""

import numpy as np

POSITION_IDS = "text_model.embeddings.position_ids"
"""A constant that diffusers and transformers before 4.31 save. A checkpoint may hold it, as int64, or lack it."""


def position_ids(max_position_embeddings: int) -> np.ndarray:
    """The tensor `POSITION_IDS`: (1, positions) int64, counting from 0."""
    return np.arange(max_position_embeddings, dtype=np.int64)[None]
