"""Draw the data that the default model learns from: `python -m flax_qformer.assets.shapes DIR --images N --seed S`.

Coloured shapes of several sizes at random places, one or two in an image, with captions. The combinations of a colour
and a shape in `HELD_OUT` are never drawn unless asked for, so that they can be asked of a model that never saw them.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

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
    "brown": ((105, 60, 15), (165, 85, 50)),
    "black": ((0, 0, 0), (45, 45, 45)),
    "cyan": ((0, 190, 210), (70, 255, 255)),
}
"""Name -> least and largest RGB."""
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = {"small": (0.22, 0.28), "large": (0.38, 0.46)}
"""Name -> least and largest side of the box, in units of the image's mean side."""
HELD_OUT = frozenset((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))
SEEN = frozenset((colour, shape) for colour in COLOURS for shape in SHAPES) - HELD_OUT

BACKGROUND = ((215, 215, 215), (255, 255, 255))
IMAGE_SIDES = (96, 128)
SUPERSAMPLING = 4
GAP = 4
"""Pixels between two objects at least."""
ONE_OBJECT = 0.15
"""The share of images with a single object."""


@dataclass(frozen=True)
class Thing:
    """A coloured shape: its box is `side` wide and high, from `left` and `top`, in pixels."""

    size: str
    colour: str
    shape: str
    rgb: tuple[int, ...]
    left: float
    top: float
    side: float

    def describe(self, size: bool = True) -> str:
        return f"a {self.size} {self.colour} {self.shape}" if size else f"a {self.colour} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.left + self.side, self.top + self.side

    @property
    def outline(self) -> list[tuple[float, float]]:
        """The corners, in pixels; a circle has 64."""
        x, y, r = self.left + self.side / 2, self.top + self.side / 2, self.side / 2
        third = self.side / 3
        match self.shape:
            case "circle":
                return [(x + r * math.cos(a), y + r * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64)]
            case "square":
                return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
            case "triangle":
                return [(x, y - r), (x + r, y + r), (x - r, y + r)]
            case "diamond":
                return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
            case "star":
                turns = [(i * math.pi / 5, r if i % 2 == 0 else 0.45 * r) for i in range(10)]
                return [(x + d * math.sin(a), y - d * math.cos(a)) for a, d in turns]
        near, far = third / 2, r
        corners = [(-near, -far), (near, -far), (near, -near), (far, -near), (far, near), (near, near)]
        return [(x + dx, y + dy) for dx, dy in corners + [(-dx, -dy) for dx, dy in corners]]


@dataclass(frozen=True)
class Scene:
    """An image of one or two things."""

    width: int
    height: int
    background: tuple[int, ...]
    things: tuple[Thing, ...]

    def draw(self) -> PIL.Image.Image:
        """The image, drawn larger and reduced for smooth edges."""
        n = SUPERSAMPLING
        image = PIL.Image.new("RGB", (n * self.width, n * self.height), self.background)
        draw = PIL.ImageDraw.Draw(image)
        for thing in self.things:
            draw.polygon([(n * x, n * y) for x, y in thing.outline], fill=thing.rgb)
        return image.reduce(n)

    def covers(self, thing: Thing, x: float, y: float) -> bool:
        """Whether a thing of the scene covers a point, both in parts of the width and the height."""
        mask = PIL.Image.new("1", (SUPERSAMPLING * self.width, SUPERSAMPLING * self.height))
        PIL.ImageDraw.Draw(mask).polygon([(SUPERSAMPLING * a, SUPERSAMPLING * b) for a, b in thing.outline], fill=1)
        return bool(mask.getpixel((int(x * mask.width), int(y * mask.height))))

    def relation(self) -> tuple[str, str]:
        """Where the first of two things is, seen from the second, and the reverse."""
        a, b = self.things
        right, down = (a.left + a.side / 2 - b.left - b.side / 2), (a.top + a.side / 2 - b.top - b.side / 2)
        words = ("left of", "right of") if abs(right) > abs(down) else ("above", "below")
        return words if (right if abs(right) > abs(down) else down) < 0 else words[::-1]

    def caption(self) -> str:
        """All that can be said."""
        if len(self.things) == 1:
            return self.things[0].describe()
        a, b = self.things
        return f"{a.describe()} {self.relation()[0]} {b.describe()}"

    def captions(self, rng: np.random.Generator) -> list[str]:
        """What training draws from: first all that can be said; then parts of it, each as often as the other."""
        names = [f"{thing.colour} {thing.shape}" for thing in self.things]
        if len(self.things) == 1:
            return [self.caption(), self.things[0].describe(size=False), *names]
        (a, b), (there, back) = self.things, self.relation()
        sizes = rng.random(2) < 0.5
        whole = [self.caption(), f"{b.describe()} {back} {a.describe()}"]
        less = f"{a.describe(sizes[0])} {there} {b.describe(not sizes[0])}"
        name = (a if sizes[1] else b).describe(size=False).removeprefix("a " if rng.random() < 0.5 else "")
        return [*whole, *whole, less, a.describe(), b.describe(), name]


def draw_scene(
    rng: np.random.Generator,
    combinations: frozenset[tuple[str, str]] = SEEN,
    others: frozenset[tuple[str, str]] | None = None,
    num_things: int | None = None,
) -> Scene:
    """A random scene.

    Args:
      combinations: the colours and shapes of the first thing.
      others: those of the second; the same by default. The two things never share both colour and shape.
      num_things: one or two; by default one in `ONE_OBJECT` of the cases.
    """
    width, height = (int(side) for side in rng.integers(*IMAGE_SIDES, 2, endpoint=True))
    background = _between(rng, BACKGROUND)
    if num_things is None:
        num_things = 1 if rng.random() < ONE_OBJECT else 2
    pools = [sorted(combinations), sorted(others or combinations)]
    while True:
        things = tuple(_thing(rng, pools[i][rng.integers(len(pools[i]))], width, height) for i in range(num_things))
        if num_things == 1 or _apart(*things):
            return Scene(width, height, background, things)


def _thing(rng: np.random.Generator, combination: tuple[str, str], width: int, height: int) -> Thing:
    colour, shape = combination
    size = list(SIZES)[rng.integers(len(SIZES))]
    side = rng.uniform(*SIZES[size]) * math.sqrt(width * height)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return Thing(size, colour, shape, _between(rng, COLOURS[colour]), left, top, side)


def _apart(a: Thing, b: Thing) -> bool:
    """Whether two things differ, do not touch, and lie clearly beside or above one another."""
    if (a.colour, a.shape) == (b.colour, b.shape):
        return False
    ways = sorted(
        (abs(a.left + a.side / 2 - b.left - b.side / 2), abs(a.top + a.side / 2 - b.top - b.side / 2)), reverse=True
    )
    return ways[0] >= (a.side + b.side) / 2 + GAP and ways[0] >= 1.3 * ways[1]


def _between(rng: np.random.Generator, limits: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.integers(*limits, endpoint=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flax_qformer.assets.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--images", type=int, default=20000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    with (options.folder / "metadata.jsonl").open("w") as file:
        for i in range(options.images):
            scene, name = draw_scene(rng), f"{i:06}.png"
            scene.draw().save(options.folder / name)
            file.write(json.dumps({"file_name": name, "captions": scene.captions(rng)}) + "\n")


if __name__ == "__main__":
    main()
