"""Images and text become arrays with upstream's arithmetic; what cannot is refused."""

import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

import cases
import flax_qformer as fq
from conftest import same
from flax_qformer.model_files import DEFAULT_MODEL, EXAMPLE_IMAGE

SMALL = fq.ImageProcessor(height=20, width=28)


@pytest.fixture(scope="module")
def processor() -> fq.Processor:
    return fq.Processor.from_pretrained(DEFAULT_MODEL)


@pytest.mark.parametrize("mode", cases.IMAGE_MODES)
def test_any_mode_equals_upstream_to_the_last_bit(mode: str, golden: Any) -> None:
    np.testing.assert_array_equal(SMALL(cases.image(mode)), golden("processor")[f"image/{mode}"][0])


def test_arrays_and_paths(tmp_path: Path, processor: fq.Processor, golden: Any) -> None:
    image = cases.image("RGB")
    expected = golden("processor")["array"][0]
    array = np.asarray(image)
    for form in (array, np.moveaxis(array, -1, 0), array.astype(np.int64), array.astype(np.float32), array / 255):
        np.testing.assert_array_equal(SMALL(form), expected)
    grey = np.asarray(cases.image("L"))
    for form in (grey, grey[..., None], grey[None]):
        np.testing.assert_array_equal(SMALL(form), golden("processor")["image/L"][0])
    rgba = np.asarray(cases.image("RGBA"))
    np.testing.assert_array_equal(SMALL(rgba), golden("processor")["image/RGBA"][0])
    np.testing.assert_array_equal(
        SMALL(cases.image("LA").convert("La")), SMALL(cases.image("LA").convert("La").convert("LA"))
    )
    mask = grey > 127
    for form in (mask, mask.astype(np.float32), mask / 1.0):
        np.testing.assert_array_equal(SMALL(form), SMALL(mask.astype(np.uint8) * 255))
    assert np.ptp(SMALL(mask.astype(np.uint8))[..., 0]) < np.ptp(SMALL(mask)[..., 0]) / 100
    image.save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    for images in (
        content,
        [content],
        io.BytesIO(content),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        [image],
        array[None],
    ):
        pixels = processor(images)["pixel_values"]
        assert (pixels.shape, pixels.dtype) == ((1, 80, 80, 3), np.float32)
        np.testing.assert_array_equal(pixels, processor(image)["pixel_values"])


def test_default_size_equals_upstream(golden: Any) -> None:
    np.testing.assert_array_equal(fq.ImageProcessor()(cases.image("RGB"))[::4], golden("processor")["full"][0])


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    image = cases.image("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(PIL.Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(SMALL(tmp_path / "turned.png"), SMALL(upright))


def test_tokens_equal_upstream(processor: fq.Processor, golden: Any) -> None:
    recorded = golden("processor")
    batch = processor(text=list(cases.TEXTS))
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(batch[name], recorded[name])
    assert processor.tokenizer.bos_token == "[DEC]"
    assert processor.tokenizer.bos_token_id == processor.config.qformer_config.vocab_size - 1


def test_padding_to_a_multiple(processor: fq.Processor) -> None:
    short = processor(text=["dog", "a red circle"])
    padded = processor(text=["dog", "a red circle"], pad_to_multiple_of=16)
    assert padded["input_ids"].shape == (2, 16)
    length = short["input_ids"].shape[1]
    for name, value in short.items():
        np.testing.assert_array_equal(padded[name][:, :length], value)
        assert not padded[name][:, length:].any()
    # The model's positions are the end of it.
    assert processor(text="dog " * 60, pad_to_multiple_of=40)["input_ids"].shape == (1, 64)


def test_long_text_is_refused_or_cut_at_its_end(processor: fq.Processor) -> None:
    with pytest.raises(fq.InputError, match=r"102 tokens.*at most 64.*`truncate=True`.*'dog dog"):
        processor(text=["cat", "dog " * 100])
    ids = processor(text=["dog " * 100 + "cat"], truncate=True)["input_ids"][0]
    dog = processor(text="dog")["input_ids"][0]
    assert ids.tolist() == [dog[0], *[dog[1]] * 62, dog[2]]


def test_pairing(processor: fq.Processor) -> None:
    images = [cases.image("L")] * 3
    assert processor(images, "dog")["input_ids"].shape[0] == 3
    assert processor(images, ["dog", "cat", "car"])["input_ids"].shape[0] == 3
    for texts in (["dog", "cat"], ["dog"] * 4):
        with pytest.raises(fq.InputError, match=f"3 images and {len(texts)} texts"):
            processor(images, texts)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "0 images"),
        (np.zeros((0, 4, 4, 3)), "0 images"),
        (np.zeros((4, 4, 5), np.uint8), "has shape"),
        (np.zeros((4,), np.uint8), "has shape"),
        (np.zeros((0, 3, 3), np.uint8), "has shape"),
        (np.full((4, 4, 3), 256), "outside 0 to 255"),
        (np.full((4, 4, 3), -0.5), "outside 0 to 255"),
        (np.full((4, 4, 3), np.nan), "outside 0 to 255"),
        (np.full((4, 4, 3), 1.5), "fractions above 1"),
        (7, "has shape"),
        ("absent.png", "no image absent.png"),
        (b"no image", "the image is not an image"),
        (PIL.Image.new("RGB", (0, 4)), "at least one pixel"),
    ],
)
def test_images_that_are_none(processor: fq.Processor, images: Any, message: str) -> None:
    with pytest.raises(fq.InputError, match=message):
        processor(images)


def test_image_files_that_are_none(tmp_path: Path, processor: fq.Processor) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(fq.InputError, match=r"text\.png is not an image"):
        processor(tmp_path / "text.png")
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tiff"):
        whole = tmp_path / f"whole.{suffix}"
        cases.image("RGB", 200, 200).save(whole)
        processor(whole)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(fq.InputError, match=rf"cut\.{suffix} is (damaged|not an image)"):
            processor(cut)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, MemoryError, struct.error])
@pytest.mark.parametrize("step", ["PIL.Image.open", "PIL.ImageOps.exif_transpose"])
def test_whatever_pillow_raises_is_damage(
    error: Any, step: str, processor: fq.Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(image: Any) -> None:
        raise error("what\nnot")

    monkeypatch.setattr(step, fails)
    with pytest.raises(fq.InputError, match=r"example\.png is damaged or cut off \(what\)"):
        processor(EXAMPLE_IMAGE)


def test_an_image_that_may_not_be_read_is_not_damaged(processor: fq.Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(fq.InputError, match=r"example\.png cannot be read \(Permission denied\)"):
        processor(EXAMPLE_IMAGE)


def test_arguments_of_transformers(processor: fq.Processor) -> None:
    texts = ["a dog", "dog " * 100]
    for given, own in (
        ({"return_tensors": "np", "padding": True, "truncation": True}, {"truncate": True}),
        ({"padding": "longest", "truncation": True}, {"truncate": True}),
        ({"padding": "max_length", "max_length": 8, "truncation": True}, {"max_length": 8}),
    ):
        one, other = (processor(text=texts, **arguments) for arguments in (given, own))
        assert same(one, other)
    for given, message in (
        ({"return_tensors": "pt"}, "`return_tensors` is 'pt'; give 'np'"),
        ({"padding": False}, "`padding` is False without `max_length`"),
        ({"padding": "max_length"}, "give `max_length`"),
        ({"padding": True, "max_length": 8}, "`padding` is True with `max_length`"),
        ({"truncation": "only_second"}, "`truncation` is 'only_second'"),
        ({"do_resize": False}, "`do_resize` is not supported; .*`return_tensors`"),
    ):
        with pytest.raises(fq.InputError, match=message):
            processor(text="a dog", **given)


@pytest.mark.parametrize("text", [[], [3], [None], 3.5])
def test_text_that_is_none(processor: fq.Processor, text: Any) -> None:
    with pytest.raises(fq.InputError, match="`text` must be"):
        processor(text=text)


def test_lengths_that_are_none(processor: fq.Processor) -> None:
    for name in ("pad_to_multiple_of", "max_length"):
        for length in (-8, 0):
            with pytest.raises(fq.InputError, match=f"`{name}` is {length}"):
                processor(text="dog", **{name: length})
    with pytest.raises(fq.InputError, match="not valid Unicode"):
        processor(text=["dog", "\udcff"])


def copy_of_default(folder: Path) -> Path:
    shutil.copytree(DEFAULT_MODEL, folder / "model")
    return folder / "model"


def test_settings_of_a_checkpoint(tmp_path: Path) -> None:
    folder = copy_of_default(tmp_path)
    settings = folder / "preprocessor_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({**values, "image_mean": [0.5, 0.4, 0.3], "resample": 2}))
    loaded = fq.Processor.from_pretrained(folder).image_processor
    assert (loaded.image_mean, loaded.resample) == ((0.5, 0.4, 0.3), 2)
    # A pipeline's own mean and std win, as upstream passes them on.
    (folder / "model_index.json").write_text('{"mean": [0.1, 0.2, 0.3], "std": null}')
    loaded = fq.Processor.from_pretrained(folder).image_processor
    assert (loaded.image_mean, loaded.image_std) == ((0.1, 0.2, 0.3), SMALL.image_std)
    for changed, message in (
        ({"size": {"height": 20, "width": 20}}, "resizes to 20x20, but the model takes 80x80"),
        ({"size": {"shortest_edge": 224}}, "height is 'missing'"),
        ({"size": 224.5}, "height is 224.5"),
        ({"size": 0}, "height is 0"),
        ({"do_normalize": False}, "switches do_normalize off"),
        ({"image_std": "large"}, "image_std is 'large'"),
        ({"image_std": [1, 1, 0]}, "must not be 0"),
        ({"image_mean": [0.5, 0.5]}, "three finite numbers"),
        ({"image_mean": [0.5, 0.5, 10**400]}, "three finite numbers"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "three finite numbers"),
        ({"image_mean": {"r": 1, "g": 1, "b": 1}}, "three finite numbers"),
        ({"resample": 99}, "resample is 99"),
        ({"resample": [3]}, r"resample is \[3\]"),
        ({"resample": 3.0}, "resample is 3.0"),
        ({"size": float("inf")}, "height is inf"),
        ({"rescale_factor": 0}, "other than 0"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
    ):
        settings.write_text(json.dumps({**values, **changed}))
        with pytest.raises(fq.InputError, match=message):
            fq.Processor.from_pretrained(folder)
    settings.write_text(json.dumps(values))
    (folder / "model_index.json").write_text('{"mean": 5}')
    with pytest.raises(fq.InputError, match=r"model_index\.json: image_mean is 5"):
        fq.Processor.from_pretrained(folder)


def test_tokenizers(tmp_path: Path) -> None:
    folder = copy_of_default(tmp_path)
    processor = fq.Processor.from_pretrained(folder)
    (tmp_path / "saved").mkdir()
    processor(text="a red circle", max_length=3)
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"] is None
    # What upstream's BertTokenizer reads.
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == (DEFAULT_MODEL / "vocab.txt").read_bytes()
    for file in folder.iterdir():
        if file.name.startswith(("vocab", "tokenizer")):
            file.unlink()
    expected = processor(text=list(cases.TEXTS))["input_ids"]
    again = fq.Processor.from_pretrained(folder, tokenizer=tmp_path / "saved")
    np.testing.assert_array_equal(again(text=list(cases.TEXTS))["input_ids"], expected)
    # Neither here nor, offline, on the hub; images do without.
    alone = fq.Processor.from_pretrained(folder)
    assert alone(cases.image("RGB")).keys() == {"pixel_values"}
    with pytest.raises(fq.InputError, match="bert-base-uncased"):
        alone(text="dog")
    with pytest.raises(fq.InputError, match="no folder"):
        fq.Processor.from_pretrained(folder, tokenizer=tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(fq.InputError, match="neither tokenizer.json nor vocab.txt"):
        fq.Processor.from_pretrained(folder, tokenizer=tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(fq.InputError, match="cannot be used"):
        fq.Processor.from_pretrained(folder, tokenizer=tmp_path / "empty")
    # A vocabulary that is larger than the model's.
    config = json.loads((folder / "config.json").read_text())
    config["qformer_config"]["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(fq.InputError, match=r"token 'dog' has the number \d+, but the model's vocabulary has 100"):
        fq.Processor.from_pretrained(folder, tokenizer=tmp_path / "saved")(text="dog")


@pytest.mark.parametrize(
    ("settings", "drop"),
    [({}, "[UNK]"), ({}, ""), ({"pad_token": None}, None), ({"model_max_length": "x"}, None)],
)
def test_damaged_tokenizers(tmp_path: Path, settings: dict[str, Any], drop: str | None) -> None:
    folder = copy_of_default(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    if drop is not None:
        words = (folder / "vocab.txt").read_text().split("\n")
        (folder / "vocab.txt").write_text("\n".join(word for word in words if drop and word != drop))
    with pytest.raises(fq.InputError, match="tokenizer in .* cannot be used") as caught:
        fq.Processor.from_pretrained(folder)(text="dog")
    assert "\n" not in str(caught.value)
