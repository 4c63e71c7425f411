"""BLIP-Diffusion's Q-Former in JAX/Flax.

import flax_qformer as fq

model, params = fq.from_pretrained(path_or_hub_id)
processor = fq.Processor.from_pretrained(path_or_hub_id)
output = model.apply({"params": params}, **processor(images=image, text="dog"))
"""

from .checkpoint import convert_checkpoint, export_checkpoint, from_pretrained, save_pretrained
from .config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from .errors import InputError
from .processor import ImageProcessor, Processor
from .qformer import Blip2QFormerModel, QFormerOutput
from .vision import Blip2VisionModel, VisionOutput

__all__ = [
    "Blip2Config",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2VisionConfig",
    "Blip2VisionModel",
    "ImageProcessor",
    "InputError",
    "Processor",
    "QFormerOutput",
    "VisionOutput",
    "convert_checkpoint",
    "export_checkpoint",
    "from_pretrained",
    "save_pretrained",
]
