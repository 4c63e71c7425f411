"""Draw the data that the default model learns from: `python examples/shapes/scenes.py DIR`.

Coloured shapes of two sizes at random places, with captions. The combinations of size, colour and shape in `HELD_OUT`
are drawn only on request, so that a model can be tested on combinations that it never saw.
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageDraw

COLOURS = {
    "red": ((190, 0, 0), (255, 60, 60)),
    "green": ((0, 120, 0), (70, 210, 80)),
    "blue": ((0, 0, 170), (60, 110, 255)),
    "yellow": ((235, 205, 0), (255, 255, 70)),
    "orange": ((235, 120, 0), (255, 165, 50)),
    "purple": ((100, 0, 130), (160, 60, 190)),
    "pink": ((240, 105, 170), (255, 190, 210)),
    "black": ((0, 0, 0), (45, 45, 45)),
    "brown": ((105, 60, 15), (165, 85, 50)),
    "cyan": ((0, 190, 210), (70, 255, 255)),
    "gray": ((110, 110, 110), (150, 150, 150)),
    "magenta": ((200, 0, 160), (255, 50, 220)),
    "maroon": ((95, 0, 0), (135, 25, 35)),
    "olive": ((110, 110, 0), (150, 145, 35)),
    "lime": ((150, 235, 0), (195, 255, 60)),
    "teal": ((0, 105, 105), (40, 145, 145)),
    "navy": ((0, 0, 80), (25, 35, 120)),
    "lavender": ((175, 150, 235), (205, 175, 255)),
    "beige": ((220, 195, 125), (240, 215, 150)),
    "salmon": ((230, 125, 105), (250, 150, 125)),
}
"""Name -> least and largest RGB."""
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 20, "large": 35}
"""Name -> side of the box in pixels."""
Combination: TypeAlias = tuple[str, str, str]
"""Size, colour and shape."""
ALL: frozenset[Combination] = frozenset(itertools.product(SIZES, COLOURS, SHAPES))
HELD_OUT = frozenset(
    (size, colour, shape)
    for i, size in enumerate(SIZES)
    for j, colour in enumerate(COLOURS)
    for k, shape in enumerate(SHAPES)
    if (5 * i + j + 3 * k) % 10 < 3
)
"""Three in ten: two or three of each colour, and no coloured shape in both sizes."""
SEEN = ALL - HELD_OUT
UNNAMED = 0.3
"""Share of things whose colour has no name, so that shapes and sizes are learned independently of colours."""

BACKGROUND = ((215, 215, 215), (255, 255, 255))
SIDE = 80
"""Width and height of an image in pixels."""
STEP = 5
"""Boxes start at multiples of this many pixels, and are at least as far apart. A small model learns a shape faster in
few positions relative to its patches."""
SUPERSAMPLING = 4
PARTS = ((True, True, True), (False, True, True), (True, False, True), (True, True, False))
"""Which of size, colour and shape a description names."""


@dataclass(frozen=True)
class Thing:
    """A coloured shape: its box begins at `left` and `top`, in pixels. A colour may have no name, ""."""

    size: str
    colour: str
    shape: str
    rgb: tuple[int, ...]
    left: int
    top: int

    def describe(self, size: bool = True, colour: bool = True, shape: bool = True) -> str:
        """What it is, or parts of that: "a small red circle", "a small shape"."""
        parts = (self.size if size else "", self.colour if colour else "", self.shape if shape else "shape")
        words = [part for part in parts if part]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"

    @property
    def side(self) -> int:
        return SIZES[self.size]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.left + self.side, self.top + self.side

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.side / 2, self.top + self.side / 2

    @property
    def outline(self) -> list[tuple[float, float]]:
        """The corners, in pixels; a circle has many."""
        (x, y), r = self.centre, self.side / 2
        match self.shape:
            case "circle":
                return [(x + r * math.cos(a), y + r * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64)]
            case "square":
                return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
            case "triangle":
                return [(x, y - r), (x + r, y + r), (x - r, y + r)]
        near, far = r / 3, r
        corners = [(-near, -far), (near, -far), (near, -near), (far, -near), (far, near), (near, near)]
        return [(x + dx, y + dy) for dx, dy in corners + [(-dx, -dy) for dx, dy in corners]]

    def covers(self, x: float, y: float) -> bool:
        """Whether a point, in pixels, is inside the shape."""
        mask = PIL.Image.new("1", (SUPERSAMPLING * SIDE, SUPERSAMPLING * SIDE))
        PIL.ImageDraw.Draw(mask).polygon([(SUPERSAMPLING * a, SUPERSAMPLING * b) for a, b in self.outline], fill=1)
        return bool(mask.getpixel((int(SUPERSAMPLING * x), int(SUPERSAMPLING * y))))


@dataclass(frozen=True)
class Scene:
    """An image of things."""

    background: tuple[int, ...]
    things: tuple[Thing, ...]

    def draw(self, scale: int = 1) -> PIL.Image.Image:
        """The image, `SIDE * scale` pixels wide and high; drawn larger and reduced for smooth edges."""
        n = scale * SUPERSAMPLING
        image = PIL.Image.new("RGB", (n * SIDE, n * SIDE), self.background)
        draw = PIL.ImageDraw.Draw(image)
        for thing in self.things:
            draw.polygon([(n * x, n * y) for x, y in thing.outline], fill=thing.rgb)
        return image.reduce(SUPERSAMPLING)

    def caption(self) -> str:
        """All that is said of one thing or two."""
        first, *others = self.things
        return self._say(first, others[0]) if others else first.describe()

    def captions(self, rng: np.random.Generator, num_pairs: int = 3, bare: bool = False) -> list[str]:
        """The captions for training: names of each thing, its place in the image, and the relation of two things.

        Some descriptions omit the colour; then only shapes, sizes and places distinguish images.

        Args:
          num_pairs: number of captions of two things together.
          bare: also add names without their article.
        """

        def parts() -> tuple[bool, bool, bool]:
            return PARTS[rng.integers(len(PARTS))]

        names = [text for thing in self.things for text in (thing.describe(), thing.describe(size=False))]
        names += [name.partition(" ")[2] for name in names] if bare else []
        places = [f"{thing.describe(*parts())} {_place(thing)}" for thing in (self.things * 2)[:2]]
        if len(self.things) == 1:
            return names + places
        first, second = self.things
        distinguishing = [named for named in PARTS if first.describe(*named) != second.describe(*named)]
        orders = (rng.permutation(2) for _ in range(num_pairs))
        pairs = [
            self._say(self.things[i], self.things[j], distinguishing[rng.integers(len(distinguishing))])
            for i, j in orders
        ]
        return names + places + pairs

    @staticmethod
    def _say(a: Thing, b: Thing, parts: tuple[bool, bool, bool] = PARTS[0]) -> str:
        right, down = _offset(a, b)
        if abs(right) > abs(down):
            relation = "left of" if right < 0 else "right of"
        else:
            relation = "above" if down < 0 else "below"
        return f"{a.describe(*parts)} {relation} {b.describe(*parts)}"


def draw_scene(
    rng: np.random.Generator,
    combinations: frozenset[Combination] = SEEN,
    num_things: int = 2,
    unnamed: float = 0.0,
) -> Scene:
    """A random scene.

    Args:
      combinations: the combinations to choose from.
      num_things: one or two. Two differ in colour or shape and do not touch; one lies clearly beside or above the
        other.
      unnamed: share of things whose colour has no name.
    """
    background = _between(rng, BACKGROUND)
    pool = sorted(combinations)
    while True:
        things = tuple(_thing(rng, pool[rng.integers(len(pool))], unnamed) for _ in range(num_things))
        if num_things == 1 or _are_apart(*things):
            return Scene(background, things)


def _thing(rng: np.random.Generator, combination: Combination, unnamed: float) -> Thing:
    size, colour, shape = combination
    rgb = _between(rng, COLOURS[colour])
    if rng.random() < unnamed:
        colour, rgb = "", _unnamed_colour(rng)
    left, top = (STEP * int(number) for number in rng.integers((SIDE - SIZES[size]) // STEP + 1, size=2))
    return Thing(size, colour, shape, rgb, left, top)


def _unnamed_colour(rng: np.random.Generator) -> tuple[int, ...]:
    """A colour far from all named colours and from the background."""
    while True:
        rgb = _between(rng, ((0, 0, 0), (255, 255, 255)))
        if all(
            any(not low - 15 <= c <= high + 15 for c, low, high in zip(rgb, *limits, strict=True))
            for limits in (*COLOURS.values(), BACKGROUND)
        ):
            return rgb


def _offset(a: Thing, b: Thing) -> tuple[float, float]:
    """How far the centre of a is to the right of and below the centre of b."""
    return a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]


def _are_apart(a: Thing, b: Thing) -> bool:
    least, most = sorted(map(abs, _offset(a, b)))
    differ = (a.colour, a.shape) != (b.colour, b.shape)
    return differ and most >= (a.side + b.side) / 2 + STEP and most >= 1.3 * least


def _place(thing: Thing) -> str:
    """Where in the image a thing is, in words."""
    x, y = thing.centre
    words = [("top", "", "bottom")[int(3 * y / SIDE)], ("left", "", "right")[int(3 * x / SIDE)]]
    return " ".join(["at the", *filter(None, words)]) if any(words) else "in the middle"


def _between(rng: np.random.Generator, limits: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.integers(*limits, endpoint=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--objects", type=int, default=2, choices=(1, 2), help="in an image")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="captions of two objects together")
    parser.add_argument("--bare", action="store_true", help="names also without their article")
    parser.add_argument("--images", type=int, default=20000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    with (options.folder / "metadata.jsonl").open("w") as file:
        for i in range(options.images):
            scene, name = draw_scene(rng, num_things=options.objects, unnamed=UNNAMED), f"{i:06}.png"
            scene.draw().save(options.folder / name)
            captions = scene.captions(rng, options.pairs, options.bare)
            file.write(json.dumps({"file_name": name, "captions": captions}) + "\n")


if __name__ == "__main__":
    main()
