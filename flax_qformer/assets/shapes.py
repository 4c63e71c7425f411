"""Draw the data that the default model learns from: `python -m flax_qformer.assets.shapes DIR`.

Coloured shapes of several sizes at random places, with captions. The combinations of a colour
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
    "black": ((0, 0, 0), (45, 45, 45)),
}
"""Name -> least and largest RGB."""
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (0.25, 0.30), "large": (0.40, 0.47)}
"""Name -> least and largest side of the box, in units of the image's mean side."""
HELD_OUT = frozenset(
    (colour, SHAPES[(i + k) % len(SHAPES)]) for i, colour in enumerate(COLOURS) for k in range(1, 2 + i % 2)
)
"""One or two of the shapes of each colour."""
SEEN = frozenset((colour, shape) for colour in COLOURS for shape in SHAPES) - HELD_OUT

BACKGROUND = ((215, 215, 215), (255, 255, 255))
IMAGE_SIDES = (96, 128)
SUPERSAMPLING = 4
GAP = 4
"""Pixels between two objects at least."""


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
        words = f"{self.size} {self.colour} {self.shape}" if size else f"{self.colour} {self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

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
        near, far = third / 2, r
        corners = [(-near, -far), (near, -far), (near, -near), (far, -near), (far, near), (near, near)]
        return [(x + dx, y + dy) for dx, dy in corners + [(-dx, -dy) for dx, dy in corners]]


@dataclass(frozen=True)
class Scene:
    """An image of things."""

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
        """Where the first thing is, seen from the second, and the reverse."""
        a, b, *_ = self.things
        right, down = (a.left + a.side / 2 - b.left - b.side / 2), (a.top + a.side / 2 - b.top - b.side / 2)
        words = ("left of", "right of") if abs(right) > abs(down) else ("above", "below")
        return words if (right if abs(right) > abs(down) else down) < 0 else words[::-1]

    def place(self, thing: Thing) -> str:
        """Where in the image a thing is: few other things are there too, so that images without it can be told."""
        x, y = (thing.left + thing.side / 2) / self.width, (thing.top + thing.side / 2) / self.height
        words = [("top", "", "bottom")[int(3 * y)], ("left", "", "right")[int(3 * x)]]
        return " ".join(["at the", *filter(None, words)]) if any(words) else "in the middle"

    def caption(self) -> str:
        """All that can be said of one or two things; of more, that of the first two."""
        if len(self.things) == 1:
            return self.things[0].describe()
        a, b, *_ = self.things
        return f"{a.describe()} {self.relation()[0]} {b.describe()}"

    def captions(self, rng: np.random.Generator) -> list[str]:
        """What training draws from, each as often as the other: all that can be said, and parts of it."""
        sizes = [bool(number) for number in rng.integers(2, size=len(self.things))]
        places = [f"{thing.describe(size)} {self.place(thing)}" for thing, size in zip(self.things, sizes, strict=True)]
        if len(self.things) == 1:
            return [self.caption(), self.things[0].describe(size=False), *places]
        (a, b, *more), (there, back) = self.things, self.relation()
        pairs = [
            self.caption(),
            f"{b.describe()} {back} {a.describe()}",
            f"{a.describe(sizes[0])} {there} {b.describe(not sizes[0])}",
        ]
        return [*pairs, *places] if more else [*pairs, *places, a.describe(sizes[1])]


def draw_scene(
    rng: np.random.Generator,
    combinations: frozenset[tuple[str, str]] = SEEN,
    num_things: int = 2,
) -> Scene:
    """A random scene.

    Args:
      combinations: the colours and shapes to choose from. Two things never share both.
      num_things: how many. They do not touch, and the first lies clearly beside, above or below the second.
    """
    width, height = (int(side) for side in rng.integers(*IMAGE_SIDES, 2, endpoint=True))
    background = _between(rng, BACKGROUND)
    pool = sorted(combinations)
    while True:  # what is drawn first may leave no room
        things: list[Thing] = []
        for _ in range(30):
            thing = _thing(rng, pool[rng.integers(len(pool))], width, height)
            if all(_apart(thing, other) for other in things) and (len(things) != 1 or _clear(thing, things[0])):
                things.append(thing)
            if len(things) == num_things:
                return Scene(width, height, background, tuple(things))


def _thing(rng: np.random.Generator, combination: tuple[str, str], width: int, height: int) -> Thing:
    colour, shape = combination
    size = list(SIZES)[rng.integers(len(SIZES))]
    side = rng.uniform(*SIZES[size]) * math.sqrt(width * height)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return Thing(size, colour, shape, _between(rng, COLOURS[colour]), left, top, side)


def _ways(a: Thing, b: Thing) -> tuple[float, float]:
    """How far apart two things' centres are, across and down."""
    return abs(a.left - b.left + (a.side - b.side) / 2), abs(a.top - b.top + (a.side - b.side) / 2)


def _apart(a: Thing, b: Thing) -> bool:
    """Whether two things differ and do not touch."""
    return (a.colour, a.shape) != (b.colour, b.shape) and max(_ways(a, b)) >= (a.side + b.side) / 2 + GAP


def _clear(a: Thing, b: Thing) -> bool:
    """Whether one of "left", "right", "above" and "below" holds more than the others."""
    least, most = sorted(_ways(a, b))
    return most >= 1.3 * least


def _between(rng: np.random.Generator, limits: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.integers(*limits, endpoint=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flax_qformer.assets.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--objects", type=int, nargs="+", default=[2], metavar="K", help="in an image: one of these")
    parser.add_argument("--images", type=int, default=20000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    with (options.folder / "metadata.jsonl").open("w") as file:
        for i in range(options.images):
            scene, name = draw_scene(rng, num_things=int(rng.choice(options.objects))), f"{i:06}.png"
            scene.draw().save(options.folder / name)
            file.write(json.dumps({"file_name": name, "captions": scene.captions(rng)}) + "\n")


if __name__ == "__main__":
    main()
