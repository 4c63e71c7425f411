"""Pictures of a subject."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import tyro

from flax_qformer.checkpoints.atomic import check_writable
from flax_qformer.commands.drawing import (
    SUBJECT_SUFFIXES,
    Drawer,
    DrawOptions,
    Files,
    check_options,
    finite_error,
    input_paths,
    save_picture,
)
from flax_qformer.commands.options import (
    File,
    ImageColumn,
    Positive,
    ProcessShare,
    Texts,
    check_train_packages,
    texts_of,
    whole_number,
)
from flax_qformer.data.sources import DataSettings
from flax_qformer.diffusion.pipeline import to_pil
from flax_qformer.errors import InputError
from flax_qformer.parallel.mesh import named_mesh
from flax_qformer.parallel.processes import join_processes
from flax_qformer.processing.processor import open_image
from flax_qformer.progress import Progress
from flax_qformer.training.settings import read_settings

FOR_BULK = ("shard_size", "image_column", "process", "distributed")
"""Options that need `--prompts` or `--references`."""

Seed = Annotated[int, whole_number(0, 2**32 - 1)]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DrawOptions):
    """Draw a subject: a photo and its name, and a prompt, become a picture.

    There is a picture for each prompt and seed. A single one is the file --output out.png; several are out-0.png,
    out-1.png and so on, each prompt's seeds together. The text "parameters" in a PNG records its prompt, seed and
    settings. With --prompts or --references, all pictures of lists go into a folder, with a table of them; the same
    command resumes after a stop.

    Attributes:
      prompt: what the subject does or where it is, such as "swimming underwater"; one prompt or several.
      reference: a photo of the subject, or several, whose vectors are averaged.
      output: .png file; with --prompts or --references, folder.
      num_images: pictures of each prompt, of as many seeds from --seed on.
      seed: seed of the first picture; or the seeds of several.
      grid: also draw all pictures in one, the file --output: prompts by seeds, labelled.
      prompts: text file with a prompt in each line.
      references: photos, each of a subject of its own: a folder, or all else that embed --data reads.
      image_column: with --references: the column with the photos.
      shard_size: in bulk: rows in a Parquet file of the table.
      distributed: in bulk: share the work with the other processes of a job, as in training.
      process: in bulk: take the share of process I, from 0, of N that run this command.
      settings: YAML file with options, as in `steps: 25`; options of the command line override it.
    """

    prompt: Texts = ()
    reference: Files = ()
    output: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: out.png; in bulk, pictures)")
    ] = None
    num_images: Positive = 1
    seed: Annotated[tuple[Seed, ...], tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="(default: 0)")] = (0,)
    grid: bool = False
    prompts: File = None
    references: Annotated[str | None, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")] = None
    image_column: ImageColumn = DataSettings.image_column
    shard_size: Positive = 64
    distributed: bool = False
    process: ProcessShare = None
    settings: File = None

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        return read_settings(path, cls)


def run(options: GenerateOptions) -> None:
    if options.subject and not options.subject_file and Path(options.subject).suffix in SUBJECT_SUFFIXES:
        options = replace(options, subject=None, subject_file=Path(options.subject))
    is_bulk = options.prompts is not None or options.references is not None
    prompts, seeds = texts_of(options.prompt, "prompt"), _seeds(options)
    if options.prompts:
        prompts += _read_prompts(options.prompts)
    if not prompts:
        raise InputError("no prompt is named; put what the subject does or where it is after `prompt`")
    sources = [name for name in ("reference", "references", "subject_file") if getattr(options, name)]
    if not sources:
        raise InputError("no photo is named; name one or more of the subject with `reference`")
    if len(sources) > 1:
        raise InputError(f"`{sources[0]}` and `{sources[1]}` both give the subject; leave one out")
    if not options.subject and not options.subject_file:
        raise InputError("the subject has no name; name what the photos show with `subject`, as in dog")
    check_options(options)
    if is_bulk:
        if options.grid:
            raise InputError("`grid` draws one picture; leave it out, or leave out `prompts` and `references`")
        _generate_all(options, prompts, seeds)
        return
    unfit = [name for name in FOR_BULK if getattr(options, name) != getattr(GenerateOptions, name)]
    if unfit:
        raise InputError(f"`{unfit[0]}` goes with `prompts` or `references`; name one, or leave it out")
    _generate(options, prompts, seeds)


def _generate(options: GenerateOptions, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    output = options.output or Path("out.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"{output} becomes a PNG picture; end the name in .png")
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    files = [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(len(wanted))]
    if len(wanted) == 1 and not options.grid:
        files = [output]
    for file in (*files, *([output] if options.grid else [])):
        check_writable(file, [*options.reference, *input_paths(options)])
    photos = [open_image(file) for file in options.reference]
    mesh = named_mesh(options.mesh, jax.local_devices())
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    size = math.ceil(min(options.batch_size, len(wanted)) / split) * split
    drawer = Drawer(options, mesh)
    vectors = drawer.subject(photos)
    settings = drawer.settings | {"reference": [str(file) for file in options.reference]}
    pictures: list[np.ndarray] = []
    with Progress(len(wanted), "picture") as progress:
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            texts, numbers = zip(*batch, strict=True)
            for picture, (prompt, seed) in zip(
                drawer.draw(texts, [vectors] * len(batch), numbers, size), batch, strict=True
            ):
                if error := finite_error(picture, options.dtype):
                    raise InputError(f"{prompt!r} with seed {seed} failed: {error}; choose another `dtype`")
                save_picture(files[len(pictures)], picture, {"prompt": prompt, "seed": seed} | settings)
                pictures.append(picture)
            progress.advance(len(batch))
    if options.grid:
        grid = draw_grid(np.stack(pictures), prompts, [f"seed {seed}" for seed in seeds])
        save_picture(output, grid, {"prompt": list(prompts), "seed": list(seeds)} | settings)
    names = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"
    grid_name = f" and the grid {output}" if options.grid else ""
    print(f"wrote {names}{grid_name}: {len(files)} of {drawer.width}x{drawer.height} pixels")


def _generate_all(options: GenerateOptions, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    check_train_packages()
    from flax_qformer.commands.bulk_generation import BulkSettings, generate_all

    if options.distributed:
        join_processes()
    settings = BulkSettings(
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        reference=options.reference,
        references=options.references,
        image_column=options.image_column,
        output=options.output or Path("pictures"),
        shard_size=options.shard_size,
        process=options.process,
    )
    print(generate_all(options, settings))


def draw_grid(pictures: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> PIL.Image.Image:
    """Pictures with a label above each column and each row.

    Args:
      pictures: (rows x columns, height, width, 3) float in [0, 1], row by row.
      rows, columns: the labels.
    """
    height, width = pictures.shape[1:3]
    size, gap = max(10, min(width // 20, 28)), max(2, width // 64)
    font, line = PIL.ImageFont.load_default(size), int(size * 1.4)
    wrapped = ["\n".join(_lines(label, font, len(columns) * (width + gap) - gap)) for label in rows]
    heights = [line * (label.count("\n") + 1) for label in wrapped]
    whole = (len(columns) * (width + gap) + gap, line + sum(heights) + len(rows) * (height + gap) + gap)
    grid = PIL.Image.new("RGB", whole, "white")
    draw = PIL.ImageDraw.Draw(grid)
    for column, label in enumerate(columns):
        draw.text((gap + column * (width + gap) + width / 2, line / 2), label, "black", font, anchor="mm")
    images, top = iter(to_pil(pictures)), line
    for label, label_height in zip(wrapped, heights, strict=True):
        draw.multiline_text((gap, top), label, "black", font, spacing=line - size)
        top += label_height
        for column in range(len(columns)):
            grid.paste(next(images), (gap + column * (width + gap), top))
        top += height + gap
    return grid


def _lines(text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width: int) -> Iterator[str]:
    """Lines no wider than `width` pixels, broken between words."""
    current = ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if current and font.getlength(longer) > width:
            yield current
            longer = word
        current = longer
    yield current


def _seeds(options: GenerateOptions) -> list[int]:
    if not options.seed:
        raise InputError("`seed` is empty; put a whole number after it")
    if options.num_images == 1:
        return list(options.seed)
    if len(options.seed) > 1:
        raise InputError(f"`num_images` counts on from one `seed`, and {len(options.seed)} are named; leave one out")
    if options.seed[0] + options.num_images > 2**32:
        raise InputError(f"`seed` is {options.seed[0]}; the last seed must not be above {2**32 - 1}")
    return list(range(options.seed[0], options.seed[0] + options.num_images))


def _read_prompts(file: Path) -> list[str]:
    """The lines of a text file, without empty ones."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"the prompts {file} cannot be read ({error.strerror}); check the name") from None
    except UnicodeDecodeError:
        raise InputError(f"the prompts {file} are not UTF-8 text; save the file as UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"the prompts {file} are empty; write one in each line")
    return prompts
