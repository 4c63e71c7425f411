"""BLIP-Diffusion's Q-Former in JAX/Flax.

Example::

    import flax_qformer as fq

    model, params = fq.from_pretrained()
    processor = fq.Processor.from_pretrained()
    output = model.apply({"params": params}, **processor(images=image, text="dog"))
"""

from .attention_maps import attention_maps, draw_attention
from .checkpoint import convert_checkpoint, export_checkpoint, from_pretrained, save_pretrained
from .config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from .errors import InputError
from .pretraining import Blip2ForPreTraining, PreTrainingOutput
from .processor import ImageProcessor, Processor
from .push import push_to_hub
from .qformer import Blip2QFormerModel, QFormerOutput
from .sharding import make_mesh, shard_batch, shard_params
from .surgery import (
    get_input_embeddings,
    interpolate_positions,
    prune_heads,
    resize_token_embeddings,
    set_input_embeddings,
    stack_layers,
    unstack_layers,
)
from .version import __version__
from .vision import Blip2VisionModel, VisionOutput

__all__ = [
    "Blip2Config",
    "Blip2ForPreTraining",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2VisionConfig",
    "Blip2VisionModel",
    "ImageProcessor",
    "InputError",
    "PreTrainingOutput",
    "Processor",
    "QFormerOutput",
    "VisionOutput",
    "__version__",
    "attention_maps",
    "convert_checkpoint",
    "draw_attention",
    "export_checkpoint",
    "from_pretrained",
    "get_input_embeddings",
    "interpolate_positions",
    "make_mesh",
    "prune_heads",
    "push_to_hub",
    "resize_token_embeddings",
    "save_pretrained",
    "set_input_embeddings",
    "shard_batch",
    "shard_params",
    "stack_layers",
    "unstack_layers",
]
