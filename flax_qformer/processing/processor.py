"""PIL images and strings to arrays, with upstream's arithmetic."""

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps

from flax_qformer.checkpoints.model_files import BERT, DEFAULT_MODEL, AnyModelName, ModelFiles, find_tokenizer, locate
from flax_qformer.errors import InputError, first_line
from flax_qformer.json_files import read_json
from flax_qformer.models.config import Blip2Config

Image: TypeAlias = PIL.Image.Image | np.ndarray | str | os.PathLike[str] | bytes | BinaryIO

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessor:
    """RGB, resized without keeping the aspect, scaled, normalised. Source: diffusers `BlipImageProcessor`.

    Attributes:
      height: of the result, in pixels.
      width: of the result, in pixels.
      image_mean: per channel, in units of the scaled image.
      image_std: per channel, in units of the scaled image.
      resample: Pillow's number of the resampling filter; 3 is bicubic.
      rescale_factor: scales 0..255 to 0..1.
    """

    height: int = 224
    width: int = 224
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    resample: int = 3
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise InputError(f"{name} is {getattr(self, name)!r:.40}; it must be a whole number above 0")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not (isinstance(values, Sequence | np.ndarray) and len(values) == 3 and all(map(_is_finite, values))):
                raise InputError(f"{name} is {values!r:.40}; it must be three finite numbers")
            object.__setattr__(self, name, tuple(map(float, values)))
        if not all(np.array(self.image_std, np.float32)):
            raise InputError(f"image_std is {self.image_std}; it divides, and must not be 0")
        if self.resample not in list(PIL.Image.Resampling) or not isinstance(self.resample, int):
            raise InputError(f"resample is {self.resample!r:.40}; Pillow's filters have the numbers 0 to 5")
        if not (_is_finite(self.rescale_factor) and self.rescale_factor):
            raise InputError(f"rescale_factor is {self.rescale_factor!r:.40}; it must be a finite number other than 0")

    @classmethod
    def from_source(cls, source: ModelFiles, image_size: int) -> Self:
        """The settings of a checkpoint. Missing ones are upstream's defaults, at the model's image size.

        Raises:
          InputError: a setting is invalid, or makes images that the model cannot take.
        """
        settings = cls(image_size, image_size)
        for path, read in ((source.image_processor, _image_settings), (source.pipeline, _pipeline_settings)):
            if path is None:
                continue
            try:
                settings = replace(settings, **read(read_json(path)))
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        if (settings.height, settings.width) != (image_size, image_size):
            raise InputError(
                f"{source.image_processor} resizes to {settings.height}x{settings.width}, but the model takes "
                f"{image_size}x{image_size}: set its size to that"
            )
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The settings as upstream's `preprocessor_config.json` has them."""
        values = asdict(self)
        size = {"height": values.pop("height"), "width": values.pop("width")}
        steps = dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_center_crop"), True)
        return {"image_processor_type": "BlipImageProcessor", **steps, "size": size, **values}

    def __call__(self, image: Image) -> np.ndarray:
        """One image -> (height, width, 3) float32."""
        resized = to_rgb(image).resize((self.width, self.height), resample=self.resample)
        # Scale in float64, as transformers does; the rest is float32.
        scaled = (np.asarray(resized).astype(np.float64) * self.rescale_factor).astype(np.float32)
        return (scaled - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)


def _image_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings in a `preprocessor_config.json`."""
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if values.get(name, True) is not True]
    if off:
        raise InputError(f"it switches {' and '.join(off)} off; this processor always does that: remove the line")
    size = values.get("size")
    sides = size if isinstance(size, Mapping) else {"height": size, "width": size}
    settings = {name: values.get(name) for name in ("image_mean", "image_std", "resample", "rescale_factor")}
    if size is not None:
        settings |= {name: sides.get(name, "missing") for name in ("height", "width")}
    return {name: value for name, value in settings.items() if value is not None}


def _pipeline_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings in a `model_index.json`: the pipeline's mean and std, if it has any, override others."""
    settings = {"image_mean": values.get("mean"), "image_std": values.get("std")}
    return {name: value for name, value in settings.items() if value is not None}


def _is_finite(value: object) -> bool:
    largest = float(np.finfo(np.float32).max)
    return isinstance(value, int | float | np.floating) and bool(-largest <= value <= largest)


def to_rgb(image: Image) -> PIL.Image.Image:
    """An RGB copy of an image, before it is resized."""
    if isinstance(image, str | os.PathLike):
        image = open_image(Path(image))
    elif isinstance(image, bytes) or hasattr(image, "read"):
        image = open_image(image if isinstance(image, bytes) else image.read())
    if not isinstance(image, PIL.Image.Image):
        image = _from_array(np.asarray(image))
    if not (image.width and image.height):
        raise InputError(f"an image is {image.width}x{image.height}; it must have at least one pixel")
    # Pillow cannot convert premultiplied grey directly to RGB.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    """An image from (H, W), (H, W, channels) or (channels, H, W), with values as `Processor` takes them."""
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise InputError(
            f"an image array has shape {array.shape}; it must be (height, width), with 1, 3 or 4 channels last or "
            "1 or 3 first"
        )
    if array.dtype != np.uint8:
        numbers = array.astype(np.float64)
        if not (np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 255):
            raise InputError("an image array has values outside 0 to 255; scale it to that, or to 0 to 1 in floats")
        if array.dtype.kind in "bf" and numbers.max() <= 1:
            numbers = numbers * 255
        elif (numbers != np.round(numbers)).any():
            raise InputError("an image array has fractions above 1; scale it to 0 to 1, or round it to 0 to 255")
        array = np.round(numbers).astype(np.uint8)
    return PIL.Image.fromarray(array)


class Processor:
    """Turns images and text into inputs of `Blip2QFormerModel`.

    Example::

        processor = Processor.from_pretrained(path)
        batch = processor(images=image, text="dog")
    """

    def __init__(self, tokenizer: Any, image_processor: ImageProcessor, config: Blip2Config) -> None:
        """Build a processor from a transformers `BertTokenizer`, or a partial that loads one, and a config."""
        self._tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use; images alone do not need it."""
        tokenizer = self._tokenizer() if isinstance(self._tokenizer, partial) else self._tokenizer
        # Upstream and LAVIS start captions with it; if the vocabulary lacks it, it becomes one more token.
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        return tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: AnyModelName = DEFAULT_MODEL,
        *,
        config: Blip2Config | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Load the processor of a model.

        Args:
          path_or_hub_id: as for `flax_qformer.from_pretrained`.
          config: the model's config, if the checkpoint has none.
          tokenizer: a folder or hub id; by default the checkpoint's own, else the one its config names, else
            `bert-base-uncased`.

        Raises:
          InputError: there is no such checkpoint or tokenizer, or its settings do not fit the model.
        """
        source = locate(path_or_hub_id)
        if config is None:
            if source.config is None:
                raise InputError(f"{source.name} has no config.json; give `config=model.config`")
            config = Blip2Config.from_json(source.config)
        size = config.vision_config.image_size
        load = partial(_load_tokenizer, source, config, tokenizer)
        return cls(load if tokenizer is None else load(), ImageProcessor.from_source(source, size), config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files and `preprocessor_config.json` into a folder."""
        # Calls leave their truncation in the tokenizer, where it does not belong.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.save_pretrained(folder)
        # transformers before 5, and so upstream, reads a BertTokenizer from its vocab.txt.
        self.tokenizer.backend_tokenizer.model.save(str(folder))
        (Path(folder) / "preprocessor_config.json").write_bytes(image_settings_file(self.image_processor))

    def __call__(
        self,
        images: Image | Sequence[Image] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        truncate: bool = False,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        truncation: bool | None = None,
        return_tensors: str | None = None,
        **others: Any,
    ) -> dict[str, np.ndarray]:
        """Make a batch.

        Args:
          images: one or several PIL images of any mode, arrays, paths or files' bytes; or one array (batch, H, W,
            channels). Arrays hold 0 to 255. Booleans, and floats that do not exceed 1, hold 0 to 1 (upstream would
            scale these down twice).
          text: one string for all images, or one for each.
          truncate: cut a text that is longer than the model's positions at its right end; by default it is an error.
          pad_to_multiple_of: pad further, so that fewer lengths are compiled; it changes no result.
          max_length: pad or cut each text to this many tokens.
          padding, truncation, return_tensors: arguments of transformers' processors. Accepted are values that describe
            this processor: True or "longest", or "max_length" with `max_length`; True to `truncate`; "np".

        Returns:
          pixel_values (batch, height, width, 3) float32 if there are images; input_ids and attention_mask
          (batch, T) int32 if there is text.

        Raises:
          InputError: an image or a text cannot be used, they do not pair up, or an argument is not supported.
        """
        _check_call(max_length, padding, truncation, return_tensors, others)
        if images is None and text is None:
            raise InputError("nothing to process: give `images`, `text`, or both")
        batch: dict[str, np.ndarray] = {}
        if images is not None:
            images = _list_of_images(images)
            batch["pixel_values"] = np.stack([self.image_processor(image) for image in images])
        if text is not None:
            texts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
            texts = pair_up(len(images), texts) if images is not None else texts
            batch |= self._tokenize(texts, truncate or bool(truncation), pad_to_multiple_of, max_length)
        return batch

    def _tokenize(
        self, texts: list[str], truncate: bool, multiple: int | None, max_length: int | None
    ) -> dict[str, np.ndarray]:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("`text` must be a string or a list of strings, at least one")
        for item in texts:
            if not item.isascii() and item != item.encode(errors="ignore").decode():
                raise InputError(f"the text {item[:40]!r} is not valid Unicode; write it in UTF-8")
        for name, value in (("pad_to_multiple_of", multiple), ("max_length", max_length)):
            if value is not None and value < 1:
                raise InputError(f"`{name}` is {value}; it must be a whole number above 0")
        qformer = self.config.qformer_config
        longest = qformer.max_position_embeddings
        if max_length is not None:
            if max_length > longest:
                raise InputError(f"`max_length` is {max_length}; the model reads at most {longest} tokens")
            truncate, longest = True, max_length
        limit = longest if truncate else None
        tokens = self.tokenizer(texts, truncation=truncate, max_length=limit, verbose=False)["input_ids"]
        lengths = [len(ids) for ids in tokens]
        if max(lengths) > longest:
            raise InputError(
                f"a text has {max(lengths)} tokens, but the model reads at most {longest}: shorten it, or cut it with "
                f"`truncate=True`; it begins {texts[int(np.argmax(lengths))][:40]!r}"
            )
        padded = max_length or max(lengths)
        if multiple:
            padded = min(-(-padded // multiple) * multiple, longest)
        input_ids = np.full((len(tokens), padded), self.tokenizer.pad_token_id, np.int32)
        for row, ids in zip(input_ids, tokens, strict=True):
            row[: len(ids)] = ids
        if input_ids.max() >= qformer.vocab_size:
            word = self.tokenizer.convert_ids_to_tokens(int(input_ids.max()))
            raise InputError(
                f"the token {word!r} has the number {input_ids.max()}, but the model's vocabulary has "
                f"{qformer.vocab_size}: give the tokenizer that belongs to the model"
            )
        attention_mask = (np.arange(padded) < np.array(lengths)[:, None]).astype(np.int32)
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def open_image(file: Path | bytes, name: str | None = None) -> PIL.Image.Image:
    """Read an image file and rotate it by its EXIF orientation, as diffusers' `load_image` does.

    Args:
      file: its path or its content.
      name: its name in messages.

    Raises:
      InputError: there is no such file, or it is not an image, damaged or cut off.
    """
    name = name or ("the image" if isinstance(file, bytes) else str(file))
    with io.BytesIO(file) if isinstance(file, bytes) else _open_file(file, name) as content:
        try:
            with PIL.Image.open(content) as image:
                return PIL.ImageOps.exif_transpose(image)
        except PIL.UnidentifiedImageError:
            raise InputError(f"{name} is not an image that Pillow knows; save it as PNG or JPEG") from None
        # Pillow's decoders raise many kinds of errors on a broken file.
        except Exception as error:
            raise InputError(f"{name} is damaged or cut off ({first_line(error)}); fetch the image again") from None


def _open_file(path: Path, name: str) -> BinaryIO:
    try:
        if path.is_file():
            return path.open("rb")
        if path.is_dir():
            raise InputError(f"{name} is a folder, not an image; name files in it, such as {path / '*.png'}")
    except OSError as error:
        raise InputError(f"the image {name} cannot be read ({error.strerror})") from None
    hint = "nothing is downloaded here: fetch it first" if re.match("https?:/", name) else "check the name"
    raise InputError(f"there is no image {name}; {hint}")


def _check_call(
    max_length: int | None, padding: Any, truncation: Any, return_tensors: Any, others: Mapping[str, Any]
) -> None:
    """Refuse arguments of transformers' processors that this one does not support."""
    if others:
        raise InputError(
            f"`{next(iter(others))}` is not supported; a processor takes `images`, `text`, `truncate` or `truncation`, "
            "`max_length`, `padding`, `pad_to_multiple_of` and `return_tensors`"
        )
    fitting = (None, True, "longest") if max_length is None else (None, "max_length")
    if padding not in fitting:
        remedy = "give `max_length`, or leave it out" if padding == "max_length" else "leave it out"
        with_it = "without" if max_length is None else "with"
        raise InputError(f"`padding` is {padding!r:.40} {with_it} `max_length`, which is not supported; {remedy}")
    if truncation not in (None, True, False) or (truncation is False and max_length is not None):
        raise InputError(
            f"`truncation` is {truncation!r:.40}; it must be True or False, and `max_length` always cuts texts"
        )
    if return_tensors not in (None, "np"):
        raise InputError(f"`return_tensors` is {return_tensors!r:.40}; give 'np', arrays that JAX takes as well")


def pair_up(num_images: int, texts: list[str]) -> list[str]:
    """One text per image.

    Raises:
      InputError: there is neither one text nor one for each image.
    """
    if len(texts) not in (1, num_images):
        raise InputError(f"{num_images} images and {len(texts)} texts: give one text for all, or one for each image")
    return texts * num_images if len(texts) == 1 else texts


def _list_of_images(images: Any) -> list[Image]:
    is_one = isinstance(images, str | bytes | os.PathLike | PIL.Image.Image | io.IOBase)
    is_one = is_one or not isinstance(images, Iterable)
    if is_one or (hasattr(images, "ndim") and images.ndim < 4):
        return [images]
    images = list(images)
    if not images:
        raise InputError("0 images: give at least one")
    return images


def tokenizer_of(source: ModelFiles, config: Blip2Config, name: str | os.PathLike[str] | None = None) -> Path:
    """The folder with a model's tokenizer: the named one, else the checkpoint's, its config's, or BERT's."""
    if name is None and source.tokenizer:
        return source.tokenizer
    name = name or config.tokenizer or BERT
    folder = find_tokenizer(name)
    if folder is None:
        raise InputError(f"{name} has no tokenizer: neither tokenizer.json nor vocab.txt")
    return folder


def _load_tokenizer(source: ModelFiles, config: Blip2Config, name: str | os.PathLike[str] | None) -> Any:
    # On import transformers warns that PyTorch is missing; it is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import BertTokenizer

    folder = tokenizer_of(source, config, name)
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, truncation_side="right", local_files_only=True)
        # Some damage shows only in use.
        tokenizer(["a \u2603"], verbose=False)
        for token in ("cls_token", "sep_token", "pad_token"):
            if getattr(tokenizer, f"{token}_id") is None:
                raise ValueError(f"it has no {token}")
    except Exception as error:
        raise InputError(
            f"the tokenizer in {folder} cannot be used ({first_line(error)}); fetch its files again"
        ) from None
    return tokenizer


def image_settings_file(image_processor: ImageProcessor) -> bytes:
    return (json.dumps(image_processor.to_dict(), indent=2) + "\n").encode()
