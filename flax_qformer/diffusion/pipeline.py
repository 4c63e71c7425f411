"""Draw pictures of a subject: a photo, its name and a prompt in, pictures out."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike, DTypeLike

from flax_qformer.checkpoints.model_files import AnyModelName
from flax_qformer.checkpoints.pipeline_lora import load_pipeline_lora
from flax_qformer.checkpoints.pipelines import load_pipeline_parts
from flax_qformer.diffusion.control import Control, as_tuple
from flax_qformer.diffusion.denoising import (
    Conditions,
    decoder,
    denoising_loop,
    draw_noise,
    encode_prompts,
    state_specs,
)
from flax_qformer.diffusion.prompt import build_prompts, tokenize
from flax_qformer.diffusion.subjects import centre_crop, mix_subjects, photo_groups
from flax_qformer.errors import InputError
from flax_qformer.parallel.mesh import BATCH, check_divides, mesh_context
from flax_qformer.parallel.partition_rules import shard_params
from flax_qformer.processing.processor import Image, Processor
from flax_qformer.progress import Progress

OUTPUT_TYPES = ("pil", "np", "latent")
PREPROCESS = ("upstream", "lavis")

EXTRA_STEPS = 16
"""Upper bound on a scheduler's UNet calls beyond the number of steps; PNDM's Runge-Kutta steps take nine."""

NAME_TOKENS = 8
"""Subjects' names are padded to a multiple of this, so that few lengths are compiled."""


@dataclass(frozen=True)
class ImagePipelineOutput:
    """The pictures of a call.

    Attributes:
      images: a list of PIL images; or an array (batch, height, width, 3) float32 in [0, 1]; or latents
        (batch, h, w, channels) float32. The pictures of one prompt follow each other.
    """

    images: Any


class BlipDiffusionPipeline:
    """BLIP-Diffusion's zero-shot drawing. Source: diffusers `BlipDiffusionPipeline`; arXiv 2305.14720.

    Example::

        pipe = BlipDiffusionPipeline.from_pretrained("Salesforce/blipdiffusion", dtype=jnp.bfloat16)
        output = pipe("swimming underwater", "dog.jpg", "dog", "dog", num_inference_steps=25)
        output.images[0].save("picture.png")

    Attributes:
      components: the Flax modules `unet`, `vae`, `text_encoder` and `qformer`.
      params: the tree of parameters of each.
      scheduler: any of `flax_qformer`'s; assign another to swap it.
      tokenizer: transformers' `CLIPTokenizer`.
      processor: the Q-Former's `Processor`.
      ctx_begin_pos: the position of the subject vectors among the prompt's tokens.
      mesh: over which a batch of pictures is sharded, or None.
      subject_embeddings: (Q, D), for calls without photos and vectors; None unless LAVIS's fine-tuning has them.
    """

    part_names: tuple[str, ...] = ("unet", "vae", "text_encoder", "qformer")

    def __init__(
        self,
        components: Mapping[str, Any],
        params: Mapping[str, Any],
        scheduler: Any,
        tokenizer: Any,
        processor: Processor,
        ctx_begin_pos: int = 2,
        mesh: Mesh | None = None,
        subject_embeddings: ArrayLike | None = None,
    ) -> None:
        """Build a pipeline from its parts; see `from_pretrained`.

        Raises:
          InputError: a part is missing.
        """
        for kind, trees in (("components", components), ("params", params)):
            missing = [name for name in self.part_names if name not in trees]
            if missing:
                raise InputError(f"`{kind}` has no {' and no '.join(missing)}, which {type(self).__name__} needs")
        self.components = dict(components)
        self.params = dict(params) if mesh is None else shard_params(dict(params), mesh)
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.processor = processor
        self.ctx_begin_pos = ctx_begin_pos
        self.mesh = mesh
        self.subject_embeddings = subject_embeddings

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: AnyModelName | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        *,
        mesh: Mesh | None = None,
        controlnet: AnyModelName | Sequence[AnyModelName] | None = None,
        subject: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Load a pipeline.

        Args:
          path_or_hub_id: the folder that upstream publishes, a converted one, or LAVIS's; or a hub id. By default the
            tiny pipeline inside the package, which is not trained to draw.
          dtype: the dtype of the computation: float32, bfloat16 or float16.
          param_dtype: the dtype of the parameters; by default each keeps its stored dtype.
          mesh: shard the parameters and each batch of pictures over it, see `make_mesh`.
          controlnet: a ControlNet, or several, instead of the pipeline's own.
          subject: a file of LAVIS's fine-tuning, which replaces the UNet and brings the subject's vectors.
          tokenizer: folder or hub id of CLIP's tokenizer, if the pipeline has none.

        Raises:
          InputError: there is no such pipeline, a part is missing, or one does not fit its config.
        """
        parts = load_pipeline_parts(
            path_or_hub_id,
            dtype,
            param_dtype,
            mesh=mesh,
            with_controlnet="controlnet" in cls.part_names,
            controlnet=controlnet,
            subject=subject,
            tokenizer=tokenizer,
        )
        return cls(
            parts.components,
            parts.params,
            parts.scheduler,
            parts.tokenizer,
            parts.processor,
            parts.ctx_begin_pos,
            mesh,
            parts.subject_embeddings,
        )

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> None:
        """Merge a LoRA file of diffusers, peft or kohya into the UNet and the text encoder.

        Raises:
          InputError: a tensor of the file matches no parameter.
        """
        self.params = dict(load_pipeline_lora(path, self.components, self.params, scale))

    def get_query_embeddings(
        self, images: Any, names: str | Sequence[str], *, preprocess: str = "upstream"
    ) -> np.ndarray:
        """The vectors of subjects, (N, Q, D) float32, to keep, mix or draw with `subject_embeddings=`.

        Args:
          images: a photo, a list with one photo per subject, or a list of lists with several photos of each subject,
            whose vectors are averaged. A photo is a PIL image, an array, a path or a file's bytes.
          names: what the subjects are, such as "dog": one name for all, or one for each.
          preprocess: "upstream" squashes a photo into a square; "lavis" cuts the longer side.

        Raises:
          InputError: a photo cannot be read, or photos and names do not pair up.
        """
        if preprocess not in PREPROCESS:
            raise InputError(f"`preprocess` is {preprocess!r:.40}; it must be {' or '.join(PREPROCESS)}")
        groups = photo_groups(images)
        names = _for_each(names, len(groups), "`names`", "subjects")
        photos: list[Image] = [photo for group in groups for photo in group]
        if preprocess == "lavis":
            photos = [centre_crop(photo, self.processor.image_processor.height) for photo in photos]
        words = [name for name, group in zip(names, groups, strict=True) for _ in group]
        batch = self.processor(photos, words, pad_to_multiple_of=NAME_TOKENS)
        vectors = _to_host(_read_subjects(self.components["qformer"], self.params["qformer"], batch))
        ends = np.cumsum([len(group) for group in groups])
        return np.stack([mix_subjects(part) for part in np.split(vectors, ends[:-1])])

    def __call__(
        self,
        prompt: str | Sequence[str],
        reference_image: Any = None,
        source_subject_category: str | Sequence[str] | None = None,
        target_subject_category: str | Sequence[str] | None = None,
        latents: ArrayLike | None = None,
        guidance_scale: float = 7.5,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 50,
        neg_prompt: str | Sequence[str] | None = "",
        prompt_strength: float = 1.0,
        prompt_reps: int = 20,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        rng: Any = None,
        callback: Callable[[int, jax.Array], None] | None = None,
        *,
        subject_embeddings: ArrayLike | None = None,
        preprocess: str = "upstream",
        control: Control | None = None,
    ) -> ImagePipelineOutput:
        """Draw pictures.

        With N prompts, a list has N items, or one item for all prompts.

        Args:
          prompt: what the subject does or where it is, such as "swimming underwater".
          reference_image: a photo of the subject, a list with one photo per prompt, or a list of lists with several
            photos of each subject; as in `get_query_embeddings`.
          source_subject_category: what the photo shows, such as "dog".
          target_subject_category: what to draw; by default the same.
          latents: (pictures, height / 8, width / 8, channels), standard normal noise to start from.
          guidance_scale: how strongly to follow the prompt; 1 and below turn guidance off, which compiles another
            program.
          height, width: of the pictures, in pixels.
          num_inference_steps: from 1 to the number of steps that the model was trained with.
          neg_prompt: what to avoid; None is "".
          prompt_strength, prompt_reps: the prompt is repeated `prompt_strength * prompt_reps` times, at least once.
          num_images_per_prompt: pictures of each prompt.
          output_type: "pil", "np" or "latent".
          rng: a random key or an integer seed, or one for each picture; by default `jax.random.key(0)`. A picture
            depends on its own key only; the first picture of `rng=5` is that of `rng=[5]`.
          callback: called after each step with its number, from 0, and the latents.
          subject_embeddings: (Q, D) or (N, Q, D) instead of photos, from `get_query_embeddings` or `load_subjects`.
          preprocess: how photos become square, as in `get_query_embeddings`.
          control: made by `BlipDiffusionControlNetPipeline` from its arguments.

        Raises:
          InputError: an argument cannot be used; the message names it.
        """
        prompts = _items(prompt)
        if not prompts or not all(isinstance(item, str) for item in prompts):
            raise InputError("`prompt` must be a string or a list of strings, at least one")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"`output_type` is {output_type!r:.40}; it must be one of {', '.join(OUTPUT_TYPES)}")
        _check_whole("num_images_per_prompt", num_images_per_prompt, None)
        _check_whole("num_inference_steps", num_inference_steps, self.scheduler.config.num_train_timesteps)
        _check_finite(guidance_scale=guidance_scale, prompt_strength=prompt_strength, prompt_reps=prompt_reps)
        targets = target_subject_category if target_subject_category is not None else source_subject_category
        if targets is None:
            raise InputError("`target_subject_category` is missing: name what to draw, such as 'dog'")
        targets = _for_each(targets, len(prompts), "`target_subject_category`")
        negatives = (
            _for_each("" if neg_prompt is None else neg_prompt, len(prompts), "`neg_prompt`")
            if guidance_scale > 1
            else None
        )
        count = len(prompts) * num_images_per_prompt
        if self.mesh is not None:
            check_divides(count, self.mesh, "pictures (prompts x `num_images_per_prompt`)")
        shape = (count, *self._latent_size(height, width), self.components["unet"].config.in_channels)
        subjects = self._subjects(
            len(prompts), reference_image, source_subject_category, subject_embeddings, preprocess
        )
        keys = _picture_keys(rng, count)
        noise = np.asarray(draw_noise(keys, shape[1:])) if latents is None else _checked_latents(latents, shape)
        state = self.scheduler.set_timesteps(self.scheduler.create_state(), num_inference_steps, shape)
        padded = self.scheduler.config.num_train_timesteps + EXTRA_STEPS
        state = jax.tree.map(np.asarray, self.scheduler.padded(state, padded))
        with mesh_context(self.mesh):
            named = build_prompts(prompts, targets, prompt_strength, prompt_reps)
            text, negative = self._encode(named, subjects, negatives, num_images_per_prompt)
            conditions = Conditions(
                text=text,
                negative=negative,
                guidance_scale=np.float32(guidance_scale),
                control_images=() if control is None else control.pictures(height, width, len(prompts), count),
                control_scales=np.zeros((padded, 0))
                if control is None
                else control.scales(int(state.num_timesteps), padded),
                seed=np.asarray(jax.random.bits(keys[0])),
            )
            drawn = self._denoise(conditions, noise * state.init_noise_sigma, state, callback)
            if output_type == "latent":
                return ImagePipelineOutput(drawn)
            pictures = _to_host(decoder(self.components["vae"])(self.params["vae"], drawn))
        return ImagePipelineOutput(pictures if output_type == "np" else to_pil(pictures))

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents."""
        factor = self.components["vae"].config.downscale
        sides = {"height": height, "width": width}
        for name, side in sides.items():
            _check_whole(name, side, None)
        if any(side % factor for side in sides.values()):
            nearest = "x".join(str(max(1, round(side / factor)) * factor) for side in sides.values())
            raise InputError(
                f"pictures of {height}x{width} (height x width) do not divide into the autoencoder's blocks of "
                f"{factor} pixels; the nearest size is {nearest}"
            )
        return height // factor, width // factor

    def _subjects(
        self, count: int, photos: Any, names: str | Sequence[str] | None, vectors: ArrayLike | None, preprocess: str
    ) -> np.ndarray:
        """Subject vectors (prompts, Q, D), computed once for a subject that all prompts share."""
        if photos is None and vectors is None:
            vectors = self.subject_embeddings
        if (photos is None) == (vectors is None):
            raise InputError("give either `reference_image` or `subject_embeddings`")
        config = self.components["text_encoder"].config
        if vectors is None:
            groups = photo_groups(photos)
            if len(groups) not in (1, count):
                raise InputError(
                    f"{count} prompts and {len(groups)} photos in `reference_image`: give one for all, or one for each "
                    "prompt; give several photos of one subject as a list of lists"
                )
            if names is None:
                raise InputError("`source_subject_category` is missing: name what the photo shows, such as 'dog'")
            words = _for_each(names, count, "`source_subject_category`")
            if len(set(words)) > 1:
                groups = groups if len(groups) == count else groups * count
            array = self.get_query_embeddings(groups, words[: len(groups)], preprocess=preprocess)
        else:
            array = np.asarray(vectors, np.float32)
            array = array[None] if array.ndim == 2 else array
        # A prompt needs a start token, a word and an end token besides.
        longest = config.max_position_embeddings - 3
        if array.ndim != 3 or array.shape[2] != config.hidden_size or not 1 <= array.shape[1] <= longest:
            raise InputError(
                f"subject vectors have shape {array.shape}; the text encoder reads (queries, {config.hidden_size}) or "
                f"(prompts, queries, {config.hidden_size}), with at most {longest} queries"
            )
        if len(array) not in (1, count):
            raise InputError(
                f"{count} prompts and {len(array)} subjects in `subject_embeddings`: give one for all, or one for each"
            )
        return np.broadcast_to(array, (count, *array.shape[1:]))

    def _encode(
        self, prompts: Sequence[str], subjects: np.ndarray, negatives: Sequence[str] | None, repeats: int
    ) -> tuple[jax.Array, jax.Array | None]:
        """The text encoder's states of the prompts and of the negative prompts, (pictures, T, D) each."""
        encoder = self.components["text_encoder"]
        length = encoder.config.max_position_embeddings
        return encode_prompts(
            encoder,
            self.params["text_encoder"],
            tokenize(self.tokenizer, prompts, length - subjects.shape[1]),
            subjects,
            None if negatives is None else tokenize(self.tokenizer, negatives, length),
            begin=self.ctx_begin_pos,
            repeats=repeats,
        )

    def _denoise(
        self,
        conditions: Conditions,
        noise: np.ndarray,
        state: Any,
        callback: Callable[[int, jax.Array], None] | None,
    ) -> jax.Array:
        """Run all steps in one call, or in a call each to report progress; returns the latents."""
        params = {"unet": self.params["unet"]}
        controlnets: tuple[Any, ...] = ()
        if conditions.control_images:
            controlnets = as_tuple(self.components["controlnet"])
            params["controlnet"] = as_tuple(self.params["controlnet"])
        run = denoising_loop(self.components["unet"], controlnets, self.scheduler)
        steps = int(state.num_timesteps)
        latents = self._placed(noise, BATCH)
        state = self._placed(state, state_specs(state, noise.shape))
        with Progress(steps, "step", "drawing") as progress:
            if callback is None and not progress.is_shown:
                return run(params, conditions, latents, state, np.int32(0), np.int32(steps))[0]
            for i in range(steps):
                before = latents
                latents, state = run(params, conditions, latents, state, np.int32(i), np.int32(i + 1))
                # One step stays queued, so that the device does not wait for the host.
                jax.block_until_ready(before)
                progress.advance()
                if callback is not None:
                    callback(i, latents)
            return latents

    def _placed(self, arrays: Any, specs: Any) -> Any:
        """Arrays on the devices, sharded over the mesh if there is one."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, arrays)
        return jax.device_put(arrays, jax.tree.map(partial(NamedSharding, self.mesh), specs))


class BlipDiffusionControlNetPipeline(BlipDiffusionPipeline):
    """Drawing that follows a conditioning image, such as edges. Source: diffusers `BlipDiffusionControlNetPipeline`.

    `components["controlnet"]` is a `ControlNetModel`, or a tuple of several with their trees in `params["controlnet"]`.
    """

    part_names = (*BlipDiffusionPipeline.part_names, "controlnet")

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        reference_image: Any = None,
        conditioning_image: Any = None,
        source_subject_category: str | Sequence[str] | None = None,
        target_subject_category: str | Sequence[str] | None = None,
        *arguments: Any,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        condtioning_image: Any = None,
        **options: Any,
    ) -> ImagePipelineOutput:
        """Draw pictures. The other arguments are those of `BlipDiffusionPipeline`, in the same order.

        Args:
          conditioning_image: an image for all prompts, or a list with one for each. It is resized to the pictures'
            size. With several ControlNets, a list of these, one for each ControlNet.
          controlnet_conditioning_scale: factor on the ControlNet's residuals; one number, or one for each ControlNet.
          control_guidance_start, control_guidance_end: the part of the steps in which the ControlNet acts, from 0 to 1;
            numbers as above.
          condtioning_image: upstream's spelling of `conditioning_image`.

        Raises:
          InputError: an argument cannot be used; the message names it.
        """
        if (conditioning_image is None) == (condtioning_image is None):
            raise InputError("give `conditioning_image`, once; `condtioning_image` is another spelling of it")
        control = Control.build(
            conditioning_image if condtioning_image is None else condtioning_image,
            len(as_tuple(self.components["controlnet"])),
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
        )
        return super().__call__(
            prompt,
            reference_image,
            source_subject_category,
            target_subject_category,
            *arguments,
            control=control,
            **options,
        )


@partial(jax.jit, static_argnames=("qformer",))
def _read_subjects(qformer: Any, params: Any, batch: dict[str, Any]) -> jax.Array:
    """Subject vectors (photos, Q, D) float32."""
    return qformer.apply({"params": params}, **batch).query_embeddings.astype(jnp.float32)


def to_pil(pictures: np.ndarray) -> list[PIL.Image.Image]:
    """PIL images from pictures (batch, height, width, 3) in [0, 1]."""
    return [PIL.Image.fromarray(picture) for picture in np.round(pictures * 255).astype(np.uint8)]


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole array, also if other processes hold parts of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _items(value: Any) -> list[Any]:
    """The items of a list, or a single value."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _for_each(value: str | Sequence[str], count: int, name: str, of: str = "prompts") -> list[str]:
    """A string for each prompt, from one for all or from a list."""
    items = _items(value)
    if not all(isinstance(item, str) for item in items):
        raise InputError(f"{name} must be a string or a list of strings")
    if len(items) not in (1, count):
        raise InputError(f"{count} {of} and {len(items)} of {name}: give one for all, or one for each")
    return items * count if len(items) == 1 else items


def _check_whole(name: str, value: Any, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1 or (most and value > most):
        limit = f"from 1 to {most}" if most else "above 0"
        raise InputError(f"`{name}` is {value!r:.40}; it must be a whole number {limit}")


def _check_finite(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, str) or not math.isfinite(value):
            raise InputError(f"`{name}` is {value!r:.40}; it must be a finite number")


def _checked_latents(latents: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(latents, np.float32)
    if array.shape != shape:
        raise InputError(
            f"`latents` have shape {array.shape}; they must be (pictures, height, width, channels), here {shape}"
        )
    return array


def _picture_keys(rng: Any, count: int) -> jax.Array:
    """A random key for each picture, from a key or seed for all, or from one for each."""
    if rng is None:
        rng = 0
    if isinstance(rng, int | np.integer):
        rng = jax.random.key(rng)
    elif isinstance(rng, list | tuple) and all(isinstance(seed, int | np.integer) for seed in rng):
        rng = jnp.stack([jax.random.key(seed) for seed in rng])
    elif isinstance(rng, list | tuple):
        rng = jnp.stack(rng)
    else:
        rng = jnp.asarray(rng)
    if rng.dtype == jnp.uint32 and rng.shape[-1:] == (2,):
        rng = jax.random.wrap_key_data(rng)
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (count,)):
        raise InputError(
            f"`rng` is {rng.dtype} of shape {rng.shape}; it must be a random key or a seed, or one for each of "
            f"{count} pictures"
        )
    return _split_key(rng, count) if not rng.shape else rng


@partial(jax.jit, static_argnames=("count",))
def _split_key(key: jax.Array, count: int) -> jax.Array:
    """Keys (count,): the key itself, and others derived from it. The first ones are the same for every count."""
    return jnp.concatenate([key[None], jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(1, count))])
