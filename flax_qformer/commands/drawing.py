"""What single and bulk generation share: the options that determine a picture, and drawing with them."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
import tyro
from jax.sharding import Mesh
from PIL.PngImagePlugin import PngInfo

from flax_qformer.checkpoints.atomic import new_file
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.checkpoints.reading import as_dtype
from flax_qformer.commands.options import CommonOptions, File, ModelName, Positive, size_of
from flax_qformer.diffusion.control import Control
from flax_qformer.diffusion.pipeline import BlipDiffusionControlNetPipeline, BlipDiffusionPipeline, to_pil
from flax_qformer.diffusion.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from flax_qformer.diffusion.subjects import load_subjects
from flax_qformer.errors import InputError, listed
from flax_qformer.processing.processor import open_image
from flax_qformer.version import __version__

logger = logging.getLogger(__name__)

OFFERED_SCHEDULERS: dict[str, Any] = {
    "pndm": PNDMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}

Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="")]
Numbers = Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]", help_behavior_hint="(default: 1.0)")]
Starts = Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]", help_behavior_hint="(default: 0.0)")]

SUBJECT_SUFFIXES = (".npz", ".pth", ".pt")
"""Of files that hold a subject's vectors."""


@dataclass(frozen=True, kw_only=True)
class DrawOptions(CommonOptions):
    """Options that determine a picture, besides its prompt, seed and photo.

    Attributes:
      model: folder or hub id of a pipeline: as upstream publishes it, converted, or LAVIS's.
      dtype: dtype of the computation: float32, bfloat16 or float16.
      subject: what the photos show, such as "dog"; or a file, as --subject-file takes it.
      target: what to draw, if it is something else, such as "cat".
      subject_file: instead of photos: an .npz file of `save_subjects`, or the .pth file of LAVIS's fine-tuning, which
        also replaces the UNet.
      preprocess: upstream squashes a photo into a square; lavis cuts its longer side.
      negative: what to avoid.
      guidance: how strongly to follow the prompt; 1 turns guidance off.
      prompt_strength, prompt_reps: their product is how often the prompt is repeated, which strengthens it.
      steps: denoising steps; with --scheduler dpm++, 20 to 25 are enough.
      scheduler: instead of the pipeline's own.
      size: width and height in pixels, as in 512x768.
      control: the picture that a ControlNet follows, such as edges; one for each ControlNet.
      control_scale: how strongly each ControlNet acts.
      control_guidance_start, control_guidance_end: the part of the steps in which each ControlNet acts, from 0 to 1.
      controlnet: folder or hub id of a ControlNet, or several, instead of the pipeline's own.
      lora: LoRA files of diffusers, peft or kohya.
      lora_scale: factor on all LoRA files, or on each.
      batch_size: pictures that run together, rounded up to a multiple of the devices.
      mesh: how the devices share the pictures of a batch.
    """

    model: ModelName = str(DEFAULT_MODEL)
    dtype: Annotated[str, tyro.conf.arg(metavar="DTYPE")] = "float32"
    subject: Annotated[
        str | None, tyro.conf.DisallowNone, tyro.conf.arg(metavar="NAME|FILE", help_behavior_hint="")
    ] = None
    target: Annotated[
        str | None, tyro.conf.DisallowNone, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the subject)")
    ] = None
    subject_file: File = None
    preprocess: Literal["upstream", "lavis"] = "upstream"
    negative: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    guidance: float = 7.5
    prompt_strength: float = 1.0
    prompt_reps: Positive = 20
    steps: Positive = 50
    scheduler: Annotated[
        Literal["pndm", "ddim", "dpm++"] | None,
        tyro.conf.DisallowNone,
        tyro.conf.arg(help_behavior_hint="(default: the pipeline's)"),
    ] = None
    size: Annotated[
        str | None, tyro.conf.arg(metavar="WxH", help_behavior_hint="(default: that of the UNet's config)")
    ] = None
    control: Files = ()
    control_scale: Numbers = ()
    control_guidance_start: Starts = ()
    control_guidance_end: Numbers = ()
    controlnet: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]", help_behavior_hint="(default: the pipeline's)")
    ] = ()
    lora: Files = ()
    lora_scale: Numbers = ()
    batch_size: Positive = 4
    mesh: Annotated[str, tyro.conf.arg(metavar="AXES")] = "data=-1"


UNRELATED = ("quiet", "batch_size", "mesh")
"""Options that do not change a picture, except by rounding."""


def check_options(options: DrawOptions) -> None:
    """Refuse options that do not fit together, before a model is loaded."""
    as_dtype(options.dtype)
    if options.size is not None:
        size_of(options.size)
    if options.controlnet and not options.control:
        raise InputError("`controlnet` needs the picture to follow; name it with `control`")
    for name in ("control_scale", "control_guidance_start", "control_guidance_end"):
        if getattr(options, name) and not options.control:
            raise InputError(f"`{name}` goes with `control`; name the picture to follow, or leave it out")
    if options.control and len(options.control) != max(1, len(options.controlnet)):
        raise InputError(
            f"{max(1, len(options.controlnet))} ControlNets and {len(options.control)} of `control`; give one for each"
        )
    for scales, of, name in (
        (options.control_scale, options.control, "control_scale"),
        (options.lora_scale, options.lora, "lora_scale"),
    ):
        if len(scales) > 1 and len(scales) != len(of):
            raise InputError(f"{len(of)} files and {len(scales)} of `{name}`; give one for all, or one for each")
    if options.control:
        start, end = options.control_guidance_start or 0.0, options.control_guidance_end or 1.0
        Control.build(list(options.control), len(options.control), options.control_scale or 1.0, start, end)
    if options.lora_scale and not options.lora:
        raise InputError("`lora_scale` goes with `lora`; name a LoRA file, or leave it out")
    for file in (*options.lora, *([options.subject_file] if options.subject_file else [])):
        if not file.is_file():
            raise InputError(f"there is no file {file}; check the name")
    if options.subject_file and options.subject_file.suffix not in SUBJECT_SUFFIXES:
        raise InputError(f"{options.subject_file} is no subject; name an .npz of vectors, or the .pth of LAVIS")
    is_named = options.subject or options.target or not options.subject_file or options.subject_file.suffix == ".npz"
    if not is_named:
        raise InputError(f"the subject of {options.subject_file} has no name; name it with `target`, as in dog")


def input_paths(options: DrawOptions) -> list[Path]:
    """The files and folders that the options name."""
    files = [*options.control, *options.lora, *([options.subject_file] if options.subject_file else [])]
    return [Path(options.model), *map(Path, options.controlnet), *files]


def settings_of(options: DrawOptions) -> dict[str, Any]:
    """The options that determine a picture, as JSON holds them."""
    values = {name: getattr(options, name) for name in DrawOptions.__dataclass_fields__ if name not in UNRELATED}
    return json.loads(json.dumps(values, default=str))


class Drawer:
    """A pipeline and the options to draw with.

    Attributes:
      width, height: of the pictures, in pixels.
      settings: what determines a picture, as its PNG records.
    """

    def __init__(self, options: DrawOptions, mesh: Mesh) -> None:
        """Load the pipeline.

        Raises:
          InputError: a file or an option cannot be used.
        """
        self._options = options
        self._control = [open_image(file) for file in options.control]
        is_default = options.model == str(DEFAULT_MODEL)
        if is_default:
            logger.warning(
                "the pipeline inside the package is not trained to draw, so its pictures are noise; name a trained one "
                "with `model`"
            )
        several: Any = options.controlnet[0] if len(options.controlnet) == 1 else options.controlnet or None
        checkpoint = options.subject_file if options.subject_file and options.subject_file.suffix != ".npz" else None
        kind = BlipDiffusionControlNetPipeline if options.control else BlipDiffusionPipeline
        self._pipe = pipe = kind.from_pretrained(
            None if is_default else options.model,
            as_dtype(options.dtype),
            mesh=mesh if mesh.size > 1 else None,
            controlnet=several,
            subject=checkpoint,
        )
        scales = options.lora_scale or (1.0,)
        for file, scale in zip(options.lora, scales * len(options.lora) if len(scales) == 1 else scales, strict=True):
            pipe.load_lora(file, scale)
        if options.scheduler:
            pipe.scheduler = OFFERED_SCHEDULERS[options.scheduler].from_config(
                # Latents exceed 1. Configs of PNDM rarely say so, and DDIM clips by default.
                {"clip_sample": False} | pipe.scheduler.config
            )
        self.width, self.height = _default_size(pipe) if options.size is None else size_of(options.size)
        self._target = options.target or options.subject or ""
        self._vectors: np.ndarray | None = None
        if checkpoint:
            self._vectors = np.asarray(pipe.subject_embeddings)
        elif options.subject_file:
            self._vectors, name = _choose_subject(options.subject_file, options.subject)
            self._target = self._target or name
        self.settings = settings_of(options) | {
            "target": self._target,
            "size": f"{self.width}x{self.height}",
            "scheduler": type(pipe.scheduler).__name__,
            "version": __version__,
        }

    def subject(self, photos: Sequence[Any] = ()) -> np.ndarray:
        """The subject's vectors (Q, D) float32: the average of its photos, or those of the subject's file."""
        if self._vectors is not None:
            return self._vectors
        name = self._options.subject or self._target
        return self._pipe.get_query_embeddings([list(photos)], name, preprocess=self._options.preprocess)[0]

    def draw(
        self, prompts: Sequence[str], subjects: Sequence[np.ndarray], seeds: Sequence[int], size: int
    ) -> np.ndarray:
        """Pictures (n, height, width, 3) float32 in [0, 1], or not finite; each depends on its own seed.

        Args:
          prompts, subjects, seeds: one for each of n <= size pictures.
          size: pictures in the batch that runs, so that all batches share one compiled program.
        """
        options, count = self._options, len(prompts)
        chosen = [min(i, count - 1) for i in range(size)]
        more: dict[str, Any] = {}
        if self._control:
            scales = list(options.control_scale or (1.0,))
            more["conditioning_image"] = self._control if len(self._control) > 1 else self._control[0]
            more["controlnet_conditioning_scale"] = scales if len(scales) > 1 else scales[0]
            more["control_guidance_start"] = options.control_guidance_start or 0.0
            more["control_guidance_end"] = options.control_guidance_end or 1.0
        output = self._pipe(
            [prompts[i] for i in chosen],
            target_subject_category=self._target,
            guidance_scale=options.guidance,
            height=self.height,
            width=self.width,
            num_inference_steps=options.steps,
            neg_prompt=options.negative,
            prompt_strength=options.prompt_strength,
            prompt_reps=options.prompt_reps,
            output_type="np",
            rng=[seeds[i] for i in chosen],
            subject_embeddings=np.stack([subjects[i] for i in chosen]),
            **more,
        )
        return np.asarray(output.images)[:count]


def finite_error(picture: np.ndarray, dtype: str) -> str | None:
    """What is wrong with a picture, or None."""
    return None if np.isfinite(picture).all() else f"its picture has values that are not finite in {dtype}"


def save_picture(path: Path, picture: np.ndarray | PIL.Image.Image, parameters: Mapping[str, Any]) -> None:
    """Write a PNG whose text `parameters` records how it was made, as JSON.

    Raises:
      InputError: it cannot be written.
    """
    image = to_pil(picture[None])[0] if isinstance(picture, np.ndarray) else picture
    text = PngInfo()
    text.add_text("parameters", json.dumps(parameters))
    with new_file(path) as file:
        image.save(file, "PNG", pnginfo=text)


def read_parameters(path: Path) -> Any:
    """What `save_picture` recorded, or None if the file is no such picture, or damaged."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
            return json.loads(image.info["parameters"])
    except Exception:
        # Pillow's decoders raise many kinds of errors on a broken file.
        return None


def _default_size(pipe: BlipDiffusionPipeline) -> tuple[int, int]:
    """Width and height of the pictures that the UNet was trained on, in pixels."""
    latents, factor = pipe.components["unet"].config.sample_size, pipe.components["vae"].config.downscale
    sides = latents if isinstance(latents, tuple) else (latents, latents)
    if latents is None or len(sides) != 2:
        raise InputError(f"the UNet's sample_size is {latents}; name the `size` of the pictures, as in 512x512")
    return sides[1] * factor, sides[0] * factor


def _choose_subject(file: Path, name: str | None) -> tuple[np.ndarray, str]:
    """The vectors and the name of the only subject in a file, or of the one with the name."""
    vectors, names = load_subjects(file)
    if len(names) == 1:
        return vectors[0], names[0]
    if name not in names:
        raise InputError(
            f"{file} holds {len(names)} subjects; choose one with `subject`: {listed(names)}, and name the file with "
            "`subject_file`"
        )
    return vectors[names.index(name)], name
