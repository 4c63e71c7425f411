"""The data that the default model learns from."""

import sys

import numpy as np
import PIL.Image

from flax_qformer.assets import shapes
from flax_qformer.pretraining.data import DataSettings
from flax_qformer.pretraining.sources import open_source


def test_a_drawn_folder_is_read_and_drawn_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        monkeypatch.setattr(sys, "argv", ["shapes", str(folder), "--images", "12", "--seed", "3"])
        shapes.main()
    assert [file.read_bytes() for file in sorted(folders[0].iterdir())] == [
        file.read_bytes() for file in sorted(folders[1].iterdir())
    ]
    source = open_source(DataSettings(str(folders[0])), "all")
    assert len(source) == 12
    assert all(isinstance(caption, str) for row in map(source.__getitem__, range(12)) for caption in row["caption"])


def test_held_out_combinations_are_not_drawn():
    rng = np.random.default_rng(0)
    scenes = [shapes.draw_scene(rng) for _ in range(300)]
    drawn = {(thing.colour, thing.shape) for scene in scenes for thing in scene.things}
    assert drawn == shapes.SEEN
    captions = " | ".join(caption for scene in scenes for caption in scene.captions(rng))
    assert not [f"{colour} {shape}" for colour, shape in shapes.HELD_OUT if f"{colour} {shape}" in captions]


def test_pixels_boxes_and_captions_agree():
    rng = np.random.default_rng(1)
    for scene in (shapes.draw_scene(rng, shapes.HELD_OUT, num_things=2) for _ in range(50)):
        image = scene.draw()
        assert isinstance(image, PIL.Image.Image)
        assert image.size == (scene.width, scene.height)
        centres = []
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= scene.width
            assert 0 <= top < bottom <= scene.height
            centres.append(((left + right) / 2, (top + bottom) / 2))
            assert image.getpixel((int(centres[-1][0]), int(centres[-1][1]))) == thing.rgb
            assert scene.covers(thing, centres[-1][0] / scene.width, centres[-1][1] / scene.height)
        (x, y), (other_x, other_y) = centres
        holds = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
        a, b = scene.things
        assert scene.caption() == f"{a.describe()} {scene.relation()[0]} {b.describe()}"
        assert holds[scene.relation()[0]]
