"""The training data of the default model."""

import itertools
import sys

import numpy as np
import PIL.Image
import pytest

import scenes as shapes
from flax_qformer.data.batches import DataSettings
from flax_qformer.data.sources import open_source


@pytest.mark.parametrize(
    ("options", "captions"),
    [("--objects 1 --pairs 3", 4), ("--objects 2 --pairs 3", 9), ("--pairs 12", 18), ("--pairs 8 --bare", 18)],
)
def test_a_drawn_folder_is_readable_and_reproducible(options, captions, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        monkeypatch.setattr(sys, "argv", ["shapes", str(folder), "--images", "12", *options.split()])
        shapes.main()
    assert [file.read_bytes() for file in sorted(folders[0].iterdir())] == [
        file.read_bytes() for file in sorted(folders[1].iterdir())
    ]
    source = open_source(DataSettings(str(folders[0])), "all")
    assert len(source) == 12
    assert all(len(set(row["caption"])) > captions / 2 for row in map(source.__getitem__, range(12)))
    assert all(len(row["caption"]) == captions for row in map(source.__getitem__, range(12)))
    assert any(not caption.startswith("a") for caption in source[0]["caption"]) == ("--bare" in options)


def test_held_out_combinations_are_not_drawn():
    rng = np.random.default_rng(0)
    scenes = [shapes.draw_scene(rng) for _ in range(1000)]
    assert {(thing.size, thing.colour, thing.shape) for scene in scenes for thing in scene.things} == shapes.SEEN
    captions = " | ".join(caption for scene in scenes for caption in scene.captions(rng, bare=True))
    assert not [combination for combination in shapes.HELD_OUT if " ".join(combination) in captions]


def test_unnamed_colours_differ_from_named_ones():
    rng = np.random.default_rng(2)
    for scene in (shapes.draw_scene(rng, unnamed=1.0) for _ in range(100)):
        assert not any(word in caption.split() for word in shapes.COLOURS for caption in scene.captions(rng))
        for thing, limits in itertools.product(scene.things, shapes.COLOURS.values()):
            low, high = np.array(limits)
            assert not np.all((low <= thing.rgb) & (thing.rgb <= high))


def test_pixels_boxes_and_captions_agree():
    rng = np.random.default_rng(1)
    for scene in (shapes.draw_scene(rng, shapes.HELD_OUT) for _ in range(50)):
        image = scene.draw()
        assert isinstance(image, PIL.Image.Image)
        assert image.size == (shapes.SIDE, shapes.SIDE)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= shapes.SIDE
            assert 0 <= top < bottom <= shapes.SIDE
            x, y = thing.centre
            assert image.getpixel((int(x), int(y))) == thing.rgb
            assert thing.covers(x, y)
            assert not thing.covers(left - 1, y)
        a, b = scene.things
        (x, y), (other_x, other_y) = a.centre, b.centre
        holds = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
        relation = scene.caption().removeprefix(f"{a.describe()} ").removesuffix(f" {b.describe()}")
        assert holds[relation]
