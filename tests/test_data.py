"""Captioned images of every kind of source become the same batches, whoever loads them and however often it stops."""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cases
import flax_qformer as fq
from flax_qformer.data.batches import Batches, DataSettings, Source, evaluation_batches, open_images, open_source
from flax_qformer.model_files import DEFAULT_MODEL

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "grey", "pink")


@pytest.fixture(scope="module")
def processor() -> fq.Processor:
    processor = fq.Processor.from_pretrained(DEFAULT_MODEL)
    return fq.Processor(processor.tokenizer, fq.ImageProcessor(height=20, width=28), processor.config)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def image(number: int) -> PIL.Image.Image:
    """An image that tells its number by its pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def png(number: int) -> bytes:
    file = io.BytesIO()
    image(number).save(file, "png")
    return file.getvalue()


def write_folder(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A folder with metadata.jsonl; images that the rows name are drawn, unless they are there or named absent."""
    for number, row in enumerate(rows):
        path = folder / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and path.stem != "absent":
            path.write_bytes(png(number))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def plain_rows(number: int) -> list[dict[str, Any]]:
    return [{"file_name": f"{i % 2}/{i}.png", "text": f"a {COLOURS[i]} circle"} for i in range(number)]


def settings(data: Path, **changes: Any) -> DataSettings:
    return replace(DataSettings(str(data), held_out=0, batch_size=4, num_workers=0), **changes)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def sources(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The same ten examples in every form that is read, with the settings that it needs."""
    rows = plain_rows(10)
    yield write_folder(folder / "jsonl", rows), {}
    csv = write_folder(folder / "csv", rows)
    (csv / "metadata.jsonl").unlink()
    (csv / "metadata.csv").write_text("\n".join(["file_name,x,y", *(f"{r['file_name']},1,{r['text']}" for r in rows)]))
    yield csv, {"caption_column": "y"}
    # As img2dataset writes them: beside each tar lies what says nothing, and what json says of two examples differs.
    files: dict[str, bytes] = {}
    for i, row in enumerate(rows):
        about = {"caption": row["text"], "error_message": None if i < 7 else "slow", "width": 60}
        suffix = "png" if i % 3 else "webp"
        content = io.BytesIO()
        image(i).save(content, suffix, lossless=True)
        files |= {f"{i:09}.{suffix}": content.getvalue(), f"{i:09}.json": json.dumps(about).encode()}
        files |= {f"{i:09}.txt": row["text"].encode()}
    names = list(files)
    write_tar(folder / "tars" / "00000.tar", {name: files[name] for name in names[:15]})
    write_tar(folder / "tars" / "00001.tar", {name: files[name] for name in names[15:]})
    (folder / "tars" / "00000_stats.json").write_text("{}")
    write_parquet(folder / "tars" / "00000.parquet", {"url": ["here"], "caption": ["a"]})
    yield folder / "tars", {}
    write_tar(folder / "one.tar", files)
    yield folder / "one.tar", {"caption_column": "txt"}
    texts, images = [row["text"] for row in rows], [png(i) for i in range(10)]
    structs = [{"bytes": content, "path": "image.png"} for content in images]
    write_parquet(folder / "structs" / "a.parquet", {"image": structs[:5], "caption": texts[:5]})
    write_parquet(folder / "structs" / "b.parquet", {"image": structs[5:], "caption": texts[5:]})
    yield folder / "structs", {}
    write_parquet(folder / "raw.parquet", {"jpg": images, "thumbnail": images, "caption": texts})
    yield folder / "raw.parquet", {}
    yield folder / "raw.parquet", {"image_column": "thumbnail"}


def test_every_source_gives_what_the_processor_gives(tmp_path: Path, processor: fq.Processor) -> None:
    for data, changes in sources(tmp_path):
        chosen = settings(data, **changes)
        results = list(evaluation_batches(open_source(chosen), processor, chosen))
        captions = [caption for _, some in results for caption in some]
        assert sorted(captions) == sorted(f"a {colour} circle" for colour in COLOURS[:10]), data
        # The last batch is filled up.
        assert [len(some) for _, some in results] == [4, 4, 2]
        numbers = [COLOURS.index(caption.split()[1]) for caption in captions]
        for start, (batch, some) in zip((0, 4, 8), results, strict=True):
            own = numbers[start : start + 4]
            own += own[-1:] * (4 - len(own))
            np.testing.assert_array_equal(batch["pixel_values"], processor([image(i) for i in own])["pixel_values"])
            texts = [*some, *some[-1:] * (4 - len(some))]
            np.testing.assert_array_equal(batch["input_ids"], processor(text=texts, max_length=32)["input_ids"])
        ids = [i for batch, some in results for i in batch["image_id"][: len(some)]]
        assert len(set(ids)) == 10


def test_images_have_names_and_need_no_captions(tmp_path: Path) -> None:
    def named(data: Path) -> dict[str, bytes]:
        images = open_images(settings(data))
        found = {}
        for row in map(images.__getitem__, range(len(images))):
            assert row["id"] not in found
            found[row["id"]] = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        return found

    pngs = [png(i) for i in range(3)]
    split = tmp_path / "split"
    for part, number in (("train", 2), ("test", 1)):
        write_folder(split / part, [{"file_name": f"{i}.png", "size": 3} for i in range(number)])
    assert named(split) == {"train/0.png": pngs[0], "train/1.png": pngs[1], "test/0.png": pngs[0]}
    for path in split.rglob("metadata.jsonl"):
        path.unlink()
    (split / ".hidden").mkdir()
    for name in (".hidden/a.png", "train/.a.png", "notes.txt"):
        (split / name).write_bytes(pngs[2])
    assert list(named(split)) == ["test/0.png", "train/0.png", "train/1.png"]

    write_tar(tmp_path / "a.tar", {"x/1.png": pngs[1], "x/1.json": b'{"title": "dog"}', "2.png": pngs[2]})
    assert named(tmp_path / "a.tar") == {"x/1": pngs[1], "2": pngs[2]}
    structs = [{"bytes": content, "path": "image.png"} for content in pngs]
    write_parquet(tmp_path / "a.parquet", {"image": structs, "size": [1, 2, 3]})
    assert named(tmp_path / "a.parquet") == {str(i): content for i, content in enumerate(pngs)}
    write_parquet(tmp_path / "b.parquet", {"image": structs, "id": [70, None, 90]})
    assert named(tmp_path / "b.parquet") == {"70": pngs[0], "1": pngs[1], "90": pngs[2]}
    # Files that Parquet names, through a link as well.
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "real" / "x", [{"file_name": "0.png"}])
    (tmp_path / "real" / "x" / "metadata.jsonl").unlink()
    for written, opened in (("real", "real"), ("real", "link"), ("link", "link")):
        image = {"bytes": None, "path": str(tmp_path / written / "x" / "0.png")}
        write_parquet(tmp_path / "real" / "a.parquet", {"image": [image]})
        assert named(tmp_path / opened) == {"x/0.png": pngs[0]}, (written, opened)


def test_form_of_a_batch(tmp_path: Path, processor: fq.Processor) -> None:
    rows = plain_rows(5)
    rows[0]["text"] = "dog " * 50
    chosen = settings(write_folder(tmp_path / "data", rows), batch_size=7, max_text_length=9)
    batch = next(Batches(open_source(chosen), processor, chosen))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "pixel_values": ((7, 20, 28, 3), np.float32),
        "input_ids": ((7, 9), np.int32),
        "attention_mask": ((7, 9), np.int32),
        "image_id": ((7,), np.int32),
    }
    tokenizer = processor.tokenizer
    expected = tokenizer(rows[0]["text"], max_length=9, truncation=True, padding="max_length")
    long = batch["attention_mask"].all(axis=1)
    assert long.any()
    np.testing.assert_array_equal(batch["input_ids"][long][0], expected["input_ids"])
    with pytest.raises(fq.InputError, match="is 65; the model reads at most 64"):
        Batches(open_source(chosen), processor, replace(chosen, max_text_length=65))


def epoch_of_ids(batches: Batches, number: int) -> list[int]:
    return [int(i) for _ in range(number) for i in next(batches)["image_id"]]


def test_shuffle_and_processes(tmp_path: Path, processor: fq.Processor) -> None:
    data = write_folder(tmp_path / "data", plain_rows(10))
    chosen = settings(data, batch_size=2)
    source = open_source(chosen)
    batches = Batches(source, processor, chosen)
    epochs = [epoch_of_ids(batches, 5) for _ in range(3)]
    assert batches.epoch == 3
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = Batches(source, processor, chosen)
    assert epoch_of_ids(again, 5) == epochs[0]
    assert epoch_of_ids(Batches(source, processor, replace(chosen, seed=1)), 5) != epochs[0]
    # Two processes share each epoch, and together see what one would.
    two = [Batches(source, processor, chosen, process_index=i, process_count=2) for i in range(2)]
    for epoch in epochs:
        halves = [epoch_of_ids(one, 5) for one in two]
        assert sorted(halves[0] + halves[1]) == list(range(10))
        assert halves[0] == epoch[::2]
    with pytest.raises(fq.InputError, match="batch of 7 does not divide among 2 processes; 8 does"):
        Batches(source, processor, replace(chosen, batch_size=7), process_count=2)


def test_resuming_gives_the_same_batches_with_any_number_of_workers(tmp_path: Path, processor: fq.Processor) -> None:
    rows = plain_rows(11)
    rows[3]["text"] = " "
    chosen = settings(write_folder(tmp_path / "data", rows), batch_size=3, flip=True)
    source = open_source(chosen)
    batches = Batches(source, processor, chosen)
    states, expected, skipped = [], [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(batches.get_state())))
        expected.append(next(batches))
        skipped.append(batches.skipped)
    assert skipped[-1] == 3
    # The third epoch is augmented otherwise than the first.
    firsts = {batch["pixel_values"][batch["image_id"] == 0].tobytes() for batch in expected} - {b""}
    assert len(firsts) >= 2
    resumed = Batches(source, processor, replace(chosen, num_workers=2))
    resumed.set_state(states[4])
    for i in range(4, 9):
        batch = next(resumed)
        for name, value in expected[i].items():
            np.testing.assert_array_equal(batch[name], value)
        assert resumed.skipped == skipped[i]
    assert resumed.get_state() == batches.get_state()
    assert len(active_children()) == 2
    del resumed
    assert not active_children()
    batches.set_state(states[2])
    np.testing.assert_array_equal(next(batches)["pixel_values"], expected[2]["pixel_values"])
    with pytest.raises(fq.InputError, match="`seed` was 0 and is now 1"):
        Batches(source, processor, replace(chosen, seed=1)).set_state(states[0])


def test_a_dead_worker_is_an_error(tmp_path: Path, processor: fq.Processor) -> None:
    chosen = settings(write_folder(tmp_path / "data", plain_rows(10)), num_workers=1)
    batches = Batches(open_source(chosen), processor, chosen)
    next(batches)
    active_children()[0].kill()
    with pytest.raises(fq.InputError, match=r"died \(exit code -9\).*`num_workers`"):
        for _ in range(20):
            state = batches.get_state()
            next(batches)
    # The position is as if the last call had not been.
    assert batches.get_state() == state
    assert not active_children()


def test_broken_examples_are_skipped_and_counted(
    tmp_path: Path, processor: fq.Processor, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*plain_rows(8), {"file_name": "absent.png", "text": "nothing"}, {"file_name": "cut.png", "text": "half"}]
    rows[2]["text"], rows[3]["text"] = "", None
    (tmp_path / "data" / "0").mkdir(parents=True)
    (tmp_path / "data" / "cut.png").write_bytes(png(1)[:2000])
    (tmp_path / "data" / "0" / "4.png").write_text("no image")
    chosen = settings(write_folder(tmp_path / "data", rows), batch_size=5)
    source = open_source(chosen)
    batches = Batches(source, processor, chosen)
    for epoch in range(1, 4):
        assert sorted(epoch_of_ids(batches, 1)) == [0, 1, 5, 6, 7]
        assert batches.skipped <= 5 * epoch
    assert batches.skipped >= 10
    for reason in ("row 2 of", "row 3 of .* has no caption", "no image .*absent", "cut.png is damaged", "4.png is not"):
        assert any(re.search(reason, message) for message in caplog.messages), reason
    results = list(evaluation_batches(source, processor, chosen))
    assert [len(captions) for _, captions in results] == [5]
    for broken in (tmp_path / "data").rglob("*.png"):
        broken.write_text("no image")
    with pytest.raises(fq.InputError, match="no example of .* can be used; the last: .*"):
        next(Batches(source, processor, chosen))
    with pytest.raises(fq.InputError, match="no example of .* can be used"):
        list(evaluation_batches(source, processor, chosen))


def test_images_of_any_mode_and_turned_ones(tmp_path: Path, processor: fq.Processor) -> None:
    files = {}
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        file = io.BytesIO()
        cases.image(mode).save(file, "png", exif=exif)
        files |= {f"{mode[0]}{len(files)}.png": file.getvalue(), f"{mode[0]}{len(files)}.txt": mode.encode()}
    write_tar(tmp_path / "modes.tar", files)
    chosen = settings(tmp_path / "modes.tar", batch_size=6)
    ((batch, captions),) = evaluation_batches(open_source(chosen), processor, chosen)
    upright = [cases.image(mode).transpose(PIL.Image.Transpose.ROTATE_270) for mode in captions]
    np.testing.assert_array_equal(batch["pixel_values"], processor(upright)["pixel_values"])
    assert np.isfinite(next(Batches(open_source(chosen), processor, chosen))["pixel_values"]).all()


def test_lists_of_captions(tmp_path: Path, processor: fq.Processor) -> None:
    texts = [["dog", "", "cat"], ["bird"], ["", " "]]
    write_parquet(tmp_path / "a.parquet", {"image": [png(i) for i in range(3)], "captions": texts})
    chosen = settings(tmp_path / "a.parquet", batch_size=2)
    source = open_source(chosen)
    ((_, captions),) = evaluation_batches(source, processor, chosen)
    assert captions == ["dog", "bird"]
    batches = Batches(source, processor, chosen)
    seen = {tuple(ids) for _ in range(12) for ids in next(batches)["input_ids"].tolist()}
    expected = processor(text=["dog", "cat", "bird"], max_length=32)["input_ids"].tolist()
    assert seen == {tuple(ids) for ids in expected}


def test_images_with_several_captions_stay_together(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i // 3}.png", "text": f"{i}"} for i in range(30)]
    chosen = settings(write_folder(tmp_path / "data", rows), held_out=0.2)
    train, held_out = open_source(chosen), open_source(chosen, "held_out")
    assert (len(train), len(held_out), len(open_source(chosen, "all"))) == (24, 6, 30)
    assert not set(train.image_ids) & set(held_out.image_ids)
    assert sorted([*train.chosen, *held_out.chosen]) == list(range(30))
    np.testing.assert_array_equal(train.image_ids // 3, train.chosen // 3)
    np.testing.assert_array_equal(open_source(chosen).chosen, train.chosen)
    others = open_source(replace(chosen, seed=1, held_out=3), "held_out")
    assert len(others) == 9
    with pytest.raises(fq.InputError, match="leaves no example for train"):
        open_source(replace(chosen, held_out=10))


def image_ids(folder: Path, ids: list[Any]) -> list[int]:
    write_parquet(folder / "a.parquet", {"image": [png(0)] * len(ids), "text": ["a"] * len(ids), "image_id": ids})
    return [int(i) for i in open_source(settings(folder / "a.parquet")).image_ids]


def test_ids_of_any_type(tmp_path: Path) -> None:
    for i, ids in enumerate((["x", "y", "x", None, None], [2**60, 1, 2**60, None, None], [0.5, 1.5, 0.5, None, None])):
        assert image_ids(tmp_path / str(i), ids) == [0, 1, 0, 3, 4]


def test_splits_of_the_source(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_folder(data / "train", plain_rows(6))
    write_folder(data / "validation", plain_rows(3))
    for i, split in enumerate(("train", "val")):
        write_tar(tmp_path / "tars" / split / "0.tar", {f"{i}.png": png(i), f"{i}.txt": split.encode()})
    for folder, sizes in ((data, (6, 3, 9)), (tmp_path / "tars", (1, 1, 2))):
        chosen = settings(folder, held_out=0.5)
        assert tuple(len(open_source(chosen, split)) for split in ("train", "held_out", "all")) == sizes
    # Nor is a table left out where another's name is that of a split.
    for name, number in (("cats", 4), ("test", 2), ("validation-00000-of-00001", 1)):
        columns = {"image": [png(i) for i in range(number)], "text": ["dog"] * number}
        write_parquet(tmp_path / "tables" / f"{name}.parquet", columns)
    tables = settings(tmp_path / "tables")
    assert [len(open_source(tables, split)) for split in ("train", "held_out", "all")] == [4, 1, 7]
    # The name of an image makes no split.
    rows = [{"file_name": name, "text": name} for name in ("a.png", "a test.png", "train.png", "b/validation/1.png")]
    assert len(open_source(settings(write_folder(tmp_path / "names", rows)))) == 4
    write_folder(data, [{"file_name": "test/1.png", "text": "dog"}])
    with pytest.raises(fq.InputError, match="has metadata for the folders test together"):
        open_source(settings(data))


def test_images_without_a_row_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_folder(tmp_path / "data", [row | {"image_id": 7} for row in plain_rows(4)])
    assert len(open_source(settings(data))) == 4
    assert not caplog.text
    for name in ("x.png", "0/y.png"):
        (data / name).write_bytes(png(9))
    open_source(settings(data))
    assert f"2 images in {data} have no row in the metadata and are not used" in caplog.text


def test_data_that_is_none(tmp_path: Path) -> None:
    def refused(data: Path | str, message: str, **changes: Any) -> None:
        with pytest.raises(fq.InputError, match=message) as error:
            open_source(settings(Path(data), **changes))
        assert "\n" not in str(error.value)

    write_parquet(tmp_path / "empty.parquet", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    refused(tmp_path / "empty.parquet", "has no rows; add images")
    data = write_folder(tmp_path / "data", [{"file_name": "a.png", "label": "dog", "size": 3}])
    refused(data, "no column that is known to hold captions, only image, label, size; name one as `caption_column`")
    refused(data, "no column title, only image, label, size", caption_column="title")
    refused(data, "column size of .* holds no text", caption_column="size")
    refused(data, "no images in label; these hold some: image", caption_column="label", image_column="label")
    write_tar(tmp_path / "a.tar", {"a.png": png(0), "a.json": b'{"title": "dog"}'})
    refused(tmp_path / "a.tar", "captions, only title, image")
    write_parquet(tmp_path / "none.parquet", {"url": ["a"], "text": ["dog"]})
    refused(tmp_path / "none.parquet", "no column of images among url, text")
    write_parquet(tmp_path / "two.parquet", {"a": [png(0)], "b": [png(0)], "text": ["dog"]})
    refused(tmp_path / "two.parquet", r"several columns of images \(a, b\)")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither metadata.jsonl or metadata.csv")
    (data / "metadata.jsonl").write_text("{garbage")
    refused(data, "metadata.jsonl cannot be read .*JSON")
    (data / "metadata.jsonl").write_text("")
    refused(data, "metadata.jsonl is empty")
    for name in ("bad.tar", "bad.parquet"):
        (tmp_path / name).write_text("garbage")
        refused(tmp_path / name, f"{name} cannot be read")
    rows: Any = {"a.png": png(0), "a.txt": b"dog"}, {"image": [png(0)], "text": ["dog"]}
    for write, suffix, content in zip((write_tar, write_parquet), ("tar", "parquet"), rows, strict=True):
        folder = tmp_path / f"cut_{suffix}"
        for i in range(3):
            write(folder / f"{i}.{suffix}", content)
        (folder / f"1.{suffix}").write_bytes((folder / f"1.{suffix}").read_bytes()[:2000])
        refused(folder, f"{folder}/1.{suffix} cannot be read")
    lists = {"image": [png(0)], "text": ["dog"], "image_id": [[1, 2]]}
    write_parquet(tmp_path / "lists.parquet", lists)
    refused(tmp_path / "lists.parquet", "column image_id holds list")
    refused(tmp_path / "none.txt", "no file or folder here")
    (tmp_path / "none.txt").touch()
    refused(tmp_path / "none.txt", "no .tar and no .parquet")
    refused("nobody/nothing", "no file or folder here, and the hub does not give it .*check the name")
    with pytest.raises(fq.InputError, match="`crop_scale` is 0.9 0.5"):
        settings(data, crop_scale=(0.9, 0.5))
    for held_out in (-0.1, 1.5, float("inf"), float("nan")):
        with pytest.raises(fq.InputError, match="`held_out` is"):
            settings(data, held_out=held_out)


def test_a_source_reads_rows_on_demand(tmp_path: Path) -> None:
    source: Source = open_source(settings(write_folder(tmp_path / "data", plain_rows(3))))
    row = source[1]
    assert row["caption"] == "a green circle"
    assert row["image"]["path"].endswith("1.png")
