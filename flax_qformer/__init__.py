"""BLIP-Diffusion in JAX/Flax: the Q-Former, and Stable Diffusion, which draws the subject that it reads.

Example::

    import flax_qformer as fq

    pipe = fq.BlipDiffusionPipeline.from_pretrained("Salesforce/blipdiffusion")
    output = pipe("swimming underwater", "dog.jpg", "dog")
    output.images[0].save("picture.png")

    model, params = fq.from_pretrained()
    processor = fq.Processor.from_pretrained()
    output = model.apply({"params": params}, **processor(images="dog.jpg", text="dog"))
"""

from flax_qformer.checkpoints.converting import convert_checkpoint, export_checkpoint
from flax_qformer.checkpoints.loading import from_pretrained
from flax_qformer.checkpoints.saving import save_pretrained
from flax_qformer.diffusion.autoencoder import AutoencoderConfig, AutoencoderKL
from flax_qformer.diffusion.controlnet import ControlNetConfig, ControlNetModel
from flax_qformer.diffusion.pipeline import (
    BlipDiffusionControlNetPipeline,
    BlipDiffusionPipeline,
    ImagePipelineOutput,
)
from flax_qformer.diffusion.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
)
from flax_qformer.diffusion.subjects import load_subjects, mix_subjects, save_subjects
from flax_qformer.diffusion.text_encoder import CLIPTextConfig, ContextCLIPTextModel
from flax_qformer.diffusion.unet import UNet2DConditionConfig, UNet2DConditionModel
from flax_qformer.errors import InputError
from flax_qformer.models.config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from flax_qformer.models.qformer import Blip2QFormerModel, QFormerOutput
from flax_qformer.models.surgery import (
    get_input_embeddings,
    interpolate_positions,
    prune_heads,
    resize_token_embeddings,
    set_input_embeddings,
    stack_layers,
    unstack_layers,
)
from flax_qformer.models.vision import Blip2VisionModel, VisionOutput
from flax_qformer.parallel.mesh import make_mesh, shard_batch
from flax_qformer.parallel.partition_rules import shard_params
from flax_qformer.processing.attention_maps import attention_maps, draw_attention
from flax_qformer.processing.processor import ImageProcessor, Processor
from flax_qformer.training import Blip2ForPreTraining, PreTrainingOutput
from flax_qformer.training.push import push_to_hub
from flax_qformer.version import __version__

__all__ = [
    "AutoencoderConfig",
    "AutoencoderKL",
    "Blip2Config",
    "Blip2ForPreTraining",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2VisionConfig",
    "Blip2VisionModel",
    "BlipDiffusionControlNetPipeline",
    "BlipDiffusionPipeline",
    "CLIPTextConfig",
    "ContextCLIPTextModel",
    "ControlNetConfig",
    "ControlNetModel",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "ImagePipelineOutput",
    "ImageProcessor",
    "InputError",
    "PNDMScheduler",
    "PreTrainingOutput",
    "Processor",
    "QFormerOutput",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
    "VisionOutput",
    "__version__",
    "attention_maps",
    "convert_checkpoint",
    "draw_attention",
    "export_checkpoint",
    "from_pretrained",
    "get_input_embeddings",
    "interpolate_positions",
    "load_subjects",
    "make_mesh",
    "mix_subjects",
    "prune_heads",
    "push_to_hub",
    "resize_token_embeddings",
    "save_pretrained",
    "save_subjects",
    "set_input_embeddings",
    "shard_batch",
    "shard_params",
    "stack_layers",
    "unstack_layers",
]
