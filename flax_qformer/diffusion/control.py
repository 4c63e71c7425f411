"""Conditioning images of ControlNets, and when each acts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from flax_qformer.errors import InputError
from flax_qformer.processing.processor import ImageProcessor


@dataclass(frozen=True)
class Control:
    """Conditioning of one or several ControlNets.

    Attributes:
      images: for each ControlNet, its conditioning images: one for all prompts, or one for each.
      factors: for each ControlNet, the factor on its residuals.
      starts, ends: for each ControlNet, the part of the steps in which it acts, from 0 to 1.
    """

    images: tuple[tuple[Any, ...], ...]
    factors: tuple[float, ...]
    starts: tuple[float, ...]
    ends: tuple[float, ...]

    @classmethod
    def build(cls, images: Any, controlnets: int, factor: Any, start: Any, end: Any) -> Self:
        """Check the arguments of a call. A number holds for all ControlNets; a list has one for each.

        Raises:
          InputError: a list has not one item for each ControlNet, or a number is out of range.
        """
        own = list(images) if controlnets > 1 and isinstance(images, list | tuple) else [images]
        if len(own) != controlnets:
            raise InputError(
                f"{controlnets} ControlNets and {len(own)} of `conditioning_image`: give a list of one for each"
            )
        factors = _numbers("controlnet_conditioning_scale", factor, controlnets)
        starts = _numbers("control_guidance_start", start, controlnets)
        ends = _numbers("control_guidance_end", end, controlnets)
        for first, last in zip(starts, ends, strict=True):
            if not 0 <= first < last <= 1:
                raise InputError(
                    f"a ControlNet acts from `control_guidance_start` {first} to `control_guidance_end` {last}; "
                    "both must be from 0 to 1, and the start before the end"
                )
        return cls(tuple(map(as_tuple, own)), factors, starts, ends)

    def pictures(self, height: int, width: int, prompts: int, pictures: int) -> tuple[np.ndarray, ...]:
        """For each ControlNet (1 or pictures, height, width, 3) float32 in [0, 1].

        Images of another size are squashed or stretched, as upstream does.

        Raises:
          InputError: an image cannot be read, or there is neither one nor one for each prompt.
        """
        resize = ImageProcessor(height, width, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
        arrays = []
        for images in self.images:
            if len(images) not in (1, prompts):
                raise InputError(
                    f"{prompts} prompts and {len(images)} of `conditioning_image`: give one for all, or one for each"
                )
            array = np.stack([resize(image) for image in images])
            arrays.append(array if len(images) == 1 else array.repeat(pictures // prompts, axis=0))
        return tuple(arrays)

    def scales(self, steps: int, padded: int) -> np.ndarray:
        """Each ControlNet's factor in each step, (padded, ControlNets) float32; 0 outside its part of the steps."""
        i = np.arange(steps)[:, None]
        acts = (i / steps >= np.array(self.starts)) & ((i + 1) / steps <= np.array(self.ends))
        return np.pad((acts * np.array(self.factors)).astype(np.float32), ((0, padded - steps), (0, 0)))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A list or tuple as a tuple, anything else as a tuple of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _numbers(name: str, value: float | Sequence[float], count: int) -> tuple[float, ...]:
    numbers = as_tuple(value)
    if len(numbers) not in (1, count) or not all(isinstance(number, int | float) for number in numbers):
        raise InputError(f"`{name}` is {value!r:.60}; it must be one number, or one for each of {count} ControlNets")
    if not np.isfinite(numbers).all():
        raise InputError(f"`{name}` is {value!r:.60}; it must be finite")
    return numbers * count if len(numbers) == 1 else numbers
