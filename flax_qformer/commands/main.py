"""The command `flax-qformer`."""

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from flax_qformer.checkpoints.atomic import check_writable, new_file
from flax_qformer.checkpoints.loading import DTYPES, Model, as_dtype, check_heads, from_pretrained
from flax_qformer.checkpoints.model_files import DEFAULT_MODEL
from flax_qformer.checkpoints.saving import convert_checkpoint, export_checkpoint
from flax_qformer.compilation import compiler_options, share_heap
from flax_qformer.data.sources import DataSettings
from flax_qformer.errors import InputError, first_line
from flax_qformer.models.losses import similarities
from flax_qformer.models.pretraining import Blip2ForPreTraining
from flax_qformer.models.qformer import Blip2QFormerModel
from flax_qformer.parallel.processes import is_first, join_processes, tells_of_lost_process
from flax_qformer.parallel.stopping import Stopped
from flax_qformer.processing.attention_maps import attention_maps, draw_attention
from flax_qformer.processing.processor import Processor, open_image, pair_up
from flax_qformer.progress import Progress, print_line
from flax_qformer.training.push import push_to_hub
from flax_qformer.training.settings import EvaluateSettings, TrainSettings, yaml_arguments
from flax_qformer.version import __version__

TEXT_MULTIPLE = 16
"""Texts are padded to a multiple of this many tokens, so that most lengths share one compiled program."""


TRAIN_PACKAGES = ("datasets", "grain", "pyarrow", "tensorboardX", "tyro", "yaml")
"""What pip installs with `flax-qformer[train]`."""


OPTION = re.compile(r"--[a-z0-9][a-z0-9-]*")


DATA_OPTIONS = ("image_column", "embedding_dtype", "shard_size", "num_workers", "mesh", "process", "distributed")
"""Those of `embed` that go with --data alone."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what the user can put right ends it with one line and exit status 2."""
    # These tell in lines of their own what an error then says.
    for library in ("DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    options, rest = _parser().parse_known_args(arguments)
    logging.getLogger("flax_qformer").setLevel(logging.WARNING if options.quiet else logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(options))
    logging.basicConfig(handlers=[handler])
    if options.quiet or not sys.stderr.isatty():
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    share_heap()
    _keep_compiled()
    try:
        if options.settings:
            options.run(_settings(options.settings, rest, f"flax-qformer {options.command}"))
        elif rest:
            raise InputError(f"unrecognized arguments: {' '.join(rest)} (see flax-qformer {options.command} --help)")
        else:
            options.run(options)
        sys.stdout.flush()
    except InputError as error:
        message = " ".join(_with_options(str(error), options).split())
        print(f"flax-qformer {options.command}: {message}", file=sys.stderr)
        _leave(2)
    except Stopped as stop:
        print(f"flax-qformer {options.command}: {_with_options(str(stop), options)}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except OSError as error:
        # Often standard output: who read it has gone, or its disk is full. Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        about = error.filename or "cannot go on"
        print(f"flax-qformer {options.command}: {about}: {error.strerror or error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        _leave(130)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)


class _Formatter(logging.Formatter):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__("%(message)s")
        self._options = options

    def format(self, record: logging.LogRecord) -> str:
        return _with_options(super().format(record), self._options)


def _with_options(message: str, options: argparse.Namespace) -> str:
    """The library's message with options in place of the arguments that it names in backticks.

    `overwrite=True` becomes --overwrite where the running command has that option. A call of `convert_checkpoint`
    becomes the command `flax-qformer convert`. Other text in backticks stays.
    """
    kind = options.settings
    fields = {field.name: field.type for field in dataclasses.fields(kind)} if kind else {}
    known = {f"--{name.replace('_', '-')}" for name in fields} or set(OPTION.findall(options.parser.format_usage()))

    def option(match: re.Match[str]) -> str:
        is_convert, name, value = match["convert"], match["name"], (match["value"] or "").strip("'")
        flag = f"--{name.replace('_', '-')}"
        if not is_convert and flag not in known:
            return match[0]
        if value == "False" and fields.get(name) is bool:
            flag = f"--no-{flag[2:]}"
        elif value and value != "True":
            flag = f"{flag} {value}"
        return f"`flax-qformer convert {flag}`" if is_convert else flag

    return re.sub(r"`(?P<convert>convert_checkpoint\(\.\.\., )?(?P<name>\w+)(=(?P<value>[^`)]*))?\)?`", option, message)


def _leave(status: int) -> NoReturn:
    """Exit at once: the job's other processes may wait for this one, and an orderly end would wait for them."""
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def embed(options: argparse.Namespace) -> None:
    if options.data:
        _embed_data(options)
        return
    unfit = [name for name in DATA_OPTIONS if getattr(options, name) is not None]
    if unfit:
        raise InputError(f"--{unfit[0].replace('_', '-')} goes with --data; name the source, or leave it out")
    if not options.images:
        raise InputError("the following arguments are required: IMAGE, or --data SOURCE; see flax-qformer embed --help")
    options.output = options.output or Path("embeddings.npz")
    images, texts = options.images, options.text and pair_up(len(options.images), options.text)
    folder = next((image for image in images if os.path.isdir(image)), None)
    if folder:
        raise InputError(
            f"{folder} is a folder, not an image; embed all its images with --data {folder}, or name files, such as "
            f"{folder / '*.png'}"
        )
    check_writable(options.output, _inputs(options, images))
    if options.output.suffix.lower() != ".npz":
        raise InputError(f"{options.output} becomes a NumPy archive; end the name in .npz")
    model, params, processor = _load(options, Blip2QFormerModel)
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch), compiler_options=compiler_options())
    results = []
    for rows in _batches(len(images), options.batch_size or 8):
        batch = processor(
            [images[row] for row in rows],
            texts and [texts[row] for row in rows],
            truncate=options.truncate,
            pad_to_multiple_of=TEXT_MULTIPLE,
        )
        results.append(np.asarray(run(params, batch).query_embeddings, np.float32))
    embeddings = np.concatenate(results)[: len(images)]
    arrays: dict[str, Any] = {"query_embeddings": embeddings, "images": [str(image) for image in images]}
    if texts:
        arrays["texts"] = texts
    with new_file(options.output) as file:
        np.savez(file, **arrays)
    print(f"wrote {options.output}: query_embeddings {embeddings.shape}, {', '.join(list(arrays)[1:])}")


def _embed_data(options: argparse.Namespace) -> None:
    if options.images or len(options.text or ()) > 1:
        what = f"the image {options.images[0]}" if options.images else "all but one --text"
        raise InputError(f"--data names the images, and one --text goes for all; leave out {what}")
    _check_train_packages()
    from flax_qformer.commands.embed_data import EmbedSettings, embed_data

    if options.distributed:
        join_processes()
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(EmbedSettings)}
    given |= {"text": options.text and options.text[0], "model": str(options.model)}
    given |= {"output": options.output or Path("embeddings"), "process": options.process and tuple(options.process)}
    settings = EmbedSettings(**{name: value for name, value in given.items() if value is not None})
    print(embed_data(settings))


def attend(options: argparse.Namespace) -> None:
    suffix, known = options.output.suffix.removeprefix(".").lower(), ("png", "pdf", "svg", "jpg", "webp")
    if suffix not in known:
        raise InputError(f"{options.output} names no kind of picture; end it in .{', .'.join(known)}")
    check_writable(options.output, _inputs(options, [options.image]))
    model, params, processor = _load(options, Blip2QFormerModel)
    image = open_image(options.image)
    batch = processor(image, options.text, truncate=options.truncate, pad_to_multiple_of=TEXT_MULTIPLE)
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch, output_attentions=True))
    output = run(params, batch)
    maps = np.asarray(attention_maps(output.cross_attentions, model.config), np.float32)[0]
    figure = draw_attention(image, _rows(maps, model, options.layers), title=options.text or "")
    # No kind of picture takes more pixels than this along a side.
    dpi = min(120, 16000 / max(figure.get_size_inches()))
    with new_file(options.output) as file:
        figure.savefig(file, format=suffix, dpi=dpi)
    print(f"wrote {options.output}")


def convert(options: argparse.Namespace) -> None:
    done = convert_checkpoint(
        options.source,
        options.destination,
        dtype=options.dtype,
        config=options.config,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
        allow_non_finite=options.allow_non_finite,
    )
    print(_with_options(done, options))


def export(options: argparse.Namespace) -> None:
    done = export_checkpoint(options.source, options.destination, layout=options.layout, overwrite=options.overwrite)
    print(_with_options(done, options))


def push(options: argparse.Namespace) -> None:
    print(push_to_hub(options.model, options.repository, private=options.private, license=options.license))


def caption(options: argparse.Namespace) -> None:
    if not options.nucleus and (options.top_p is not None or options.seed is not None):
        raise InputError("--top-p and --seed are for --nucleus, which draws words; add it, or leave them out")
    model, params, processor = _load(options, Blip2ForPreTraining, "lm_head")
    end = processor.tokenizer.sep_token_id
    max_length = options.max_length or min(30, model.config.qformer_config.max_position_embeddings)
    if options.min_length > max_length:
        raise InputError(f"--min-length {options.min_length} is above --max-length, {max_length}; make it less")

    apply: Any = model.apply

    @jax.jit
    def write(params: Any, pixels: jax.Array, key: jax.Array) -> jax.Array:
        return apply(
            {"params": params},
            pixels,
            eos_token_id=end,
            use_nucleus_sampling=options.nucleus,
            num_beams=options.num_beams,
            max_length=max_length,
            min_length=options.min_length,
            top_p=0.9 if options.top_p is None else options.top_p,
            method="caption",
            rngs={"sampling": key},
        )

    for rows in _batches(len(options.images), options.batch_size):
        pixels = processor([options.images[row] for row in rows])["pixel_values"]
        key = jax.random.fold_in(jax.random.key(options.seed or 0), rows[0])
        texts = processor.tokenizer.batch_decode(np.asarray(write(params, pixels, key)), skip_special_tokens=True)
        for row, text in dict(zip(rows, texts, strict=True)).items():
            print_line(f"{options.images[row]}: {text}")


def search(options: argparse.Namespace) -> None:
    model, params, processor = _load(options, Blip2ForPreTraining, "vision_proj", "text_proj")
    tokens = processor(text=options.text, truncate=options.truncate, pad_to_multiple_of=TEXT_MULTIPLE)
    apply: Any = model.apply
    variables = {"params": params}
    texts = jax.jit(partial(apply, method="text_features"))(variables, **tokens)

    @jax.jit
    def score(variables: Any, pixels: jax.Array, texts: jax.Array) -> jax.Array:
        return similarities(apply(variables, pixels, method="image_features"), texts)

    found = []
    for rows in _batches(len(options.images), options.batch_size):
        pixels = processor([options.images[row] for row in rows])["pixel_values"]
        found.append(np.asarray(score(variables, pixels, texts)))
    scores = np.concatenate(found)[: len(options.images)]
    for text, column in zip(options.text, scores.T, strict=True):
        print(text)
        for row in np.argsort(-column)[: options.top]:
            print(f"  {column[row]:.3f}  {options.images[row]}")


def train(settings: TrainSettings) -> None:
    from flax_qformer.training.loop import train

    if settings.distributed:
        join_processes()
    try:
        summary = train(settings)
        if is_first():
            print(summary)
    except jax.errors.JaxRuntimeError as error:
        if not tells_of_lost_process(error):
            raise
        raise InputError(
            f"another process of the job has ended ({first_line(error)}); start all of them again: the run goes on "
            "from its newest checkpoint"
        ) from None


def evaluate(settings: EvaluateSettings) -> None:
    from flax_qformer.training.evaluation import evaluate

    for name, value in evaluate(settings).items():
        print(f"{name}: {value:g}")


def _keep_compiled() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX's own variables say where, or not at all."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    # Without a home or a place to write, programs are compiled each time.
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_qformer"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            settings.update("jax_compilation_cache_dir", str(folder))


def plan(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("this needs the TPU's compiler as well; run pip install 'flax-qformer[tpu]'")
    from flax_qformer.planning.planner import plan

    # Chips that are here are not needed, and may be another program's.
    jax.config.update("jax_platforms", "cpu")
    # Programs of that compiler cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    told = plan(
        options.model,
        options.topology,
        options.batch,
        mesh=options.mesh,
        remat=options.remat,
        train=tuple(options.train),
        text_length=options.text_length,
        dtype=options.dtype,
    )
    text = json.dumps(dataclasses.asdict(told) | {"bound": told.bound}) if options.json else str(told)
    print(_with_options(text, options))


def _load(
    options: argparse.Namespace, model_class: type[Model], *heads: str
) -> tuple[Model, dict[str, Any], Processor]:
    """The model, whose heads of these names must be trained, its parameters and its processor."""
    dtype = as_dtype(options.dtype)
    model, params = from_pretrained(options.model, dtype, model_class=model_class, config=options.config)
    check_heads(model.config, options.model, *heads)
    return model, params, Processor.from_pretrained(options.model, config=model.config, tokenizer=options.tokenizer)


def _inputs(options: argparse.Namespace, images: list[Path]) -> list[Path]:
    return [*images, *(Path(name) for name in (options.model, options.config) if name)]


def _batches(total: int, size: int) -> Iterator[list[int]]:
    """The numbers of the images of each batch, with progress.

    The last one is filled up with the last image, so that all have one size and one compiled program.
    """
    size = min(size, total)
    with Progress(total, "image") as progress:
        for start in range(0, total, size):
            yield [min(row, total - 1) for row in range(start, start + size)]
            progress.advance(min(size, total - start))


def _rows(maps: np.ndarray, model: Blip2QFormerModel, layers: list[int] | None) -> dict[str, np.ndarray]:
    """The maps (layers, queries, grid, grid) that a picture shows, by label."""
    if layers is None:
        return {"all layers": maps.mean(axis=0)}
    qformer = model.config.qformer_config
    attending = [i for i in range(qformer.num_hidden_layers) if qformer.has_cross_attention(i)]
    absent = [layer for layer in layers if layer not in attending]
    if absent:
        raise InputError(f"layer {absent[0]} does not look at the image; these do: {', '.join(map(str, attending))}")
    return {f"layer {layer}": maps[attending.index(layer)] for layer in layers or attending}


def _settings(kind: type[DataSettings], arguments: list[str], prog: str) -> DataSettings:
    """Settings from the command line, which come before those in the YAML file that `--settings` names."""
    _check_train_packages()
    import tyro

    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--settings", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if options.settings:
        rest = yaml_arguments(options.settings, kind) + rest
    description = (inspect.getdoc(kind) or "").partition("\n")[0]
    description += " --settings FILE reads settings from YAML, as in `batch_size: 64`; the command line comes first."
    description += " --quiet shows no progress and no information, only warnings and errors."
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, prog=prog, description=description, args=rest)
    except SystemExit as stop:
        if not stop.code:
            raise
        # Tyro tells in a box, perhaps coloured: a title, what is wrong, a rule, and where help is to be found. Without
        # UTF-8 dashes are the rules, and there is one below the title too.
        lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[\d;]*m", "", told.getvalue()).splitlines()[1:]]
        parts = [
            list(part)
            for is_rule, part in itertools.groupby(lines, lambda line: set(line) <= {"-", "─"})
            if not is_rule
        ]
        message = " ".join(parts[0]) if parts else "wrong settings"
        raise InputError(f"{message.removeprefix(f'Error parsing {kind.__name__}: ')} (see {prog} --help)") from None


def _check_train_packages() -> None:
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"this needs {', '.join(missing)} as well; run pip install 'flax-qformer[train]'")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flax-qformer", description="BLIP-Diffusion's Q-Former in JAX/Flax.")
    parser.set_defaults(settings=None, quiet=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "embed",
        help="subject embeddings of images",
        description="Turn images, each with the word for its subject, into subject embeddings: query_embeddings "
        "(images, queries, width) in an .npz file, which also holds the names of the images and the texts; or, with "
        "--data, all images of a source into a folder of Parquet files. After a stop the same command goes on.",
    )
    command.set_defaults(run=embed)
    command.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files")
    command.add_argument(
        "--data",
        metavar="SOURCE",
        help="instead of files: whatever train reads (a folder, WebDataset tars, Parquet, a hub id), or any folder of "
        "images; a row of id, row, embeddings and error for each",
    )
    _add_text(command, nargs="+", action="extend", help="the subject's name: one for all images, or one for each")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="default: embeddings.npz; with --data, the folder embeddings"
    )
    command.add_argument(
        "--batch-size", type=_positive, metavar="N", help="images that run together (default: 8, with --data 64)"
    )
    _add_model(command)
    _add_quiet(command)
    data = command.add_argument_group("with --data")
    data.add_argument("--image-column", metavar="NAME", help="default: found by its type and name")
    data.add_argument("--embedding-dtype", choices=("float16", "float32"), help="what is written (default: float32)")
    data.add_argument("--shard-size", type=_positive, metavar="N", help="rows in a Parquet file (default: 1024)")
    data.add_argument("--num-workers", type=int, metavar="N", help="processes that decode (default: 4)")
    data.add_argument("--mesh", metavar="AXES", help="layout of each process's devices (default: data=-1)")
    data.add_argument(
        "--distributed",
        action="store_true",
        default=None,
        help="one of several processes, which share the work: find the others, as in training",
    )
    data.add_argument(
        "--process",
        type=int,
        nargs=2,
        metavar=("I", "N"),
        help="take the share of process I, from 0, of N that run this command (default: as JAX counts them)",
    )

    command = commands.add_parser(
        "attend",
        help="a picture of what each query looks at",
        description="Draw an image and beside it, for each query, where it looks: cross-attention averaged over heads, "
        "and over layers or layer by layer. Each map is scaled to its own maximum.",
    )
    command.set_defaults(run=attend)
    command.add_argument("image", type=Path, metavar="IMAGE", help="image file")
    _add_text(command, help="the subject's name")
    command.add_argument(
        "--layers",
        type=int,
        nargs="*",
        metavar="LAYER",
        help="a row for each of these layers, counted from 0; for each that looks at the image if none is named "
        "(default: one row, their average)",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("attention.png"),
        metavar="FILE",
        help="the suffix says the kind of picture (default: %(default)s)",
    )
    _add_model(command)

    command = commands.add_parser(
        "convert",
        help="a PyTorch checkpoint to a Flax folder",
        description="Convert a checkpoint to a folder with config.json, tokenizer, image settings and an orbax "
        "checkpoint. PyTorch is not needed. Every tensor is accounted for, or nothing is written.",
    )
    command.set_defaults(run=convert)
    command.add_argument(
        "source",
        metavar="SRC",
        help="diffusers pipeline or its qformer folder, LAVIS folder, checkpoint file (.safetensors, .bin, .pt, .pth), "
        "*.index.json of a sharded one, or hub id",
    )
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument("--dtype", help=f"cast the parameters: {', '.join(DTYPES)} (default: as stored)")
    _add_missing_parts(command)
    _add_overwrite(command)
    command.add_argument("--allow-non-finite", action="store_true", help="accept infinities and NaN")

    command = commands.add_parser(
        "export",
        help="a Flax folder to what upstream loads",
        description="Write a folder with model.safetensors, which PyTorch loads: the inverse of convert, bit for bit.",
    )
    command.set_defaults(run=export)
    command.add_argument("source", metavar="SRC", help="a Flax folder, or anything that convert takes")
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument(
        "--layout",
        choices=("diffusers", "lavis"),
        help="what loads it: diffusers' Blip2QFormerModel.from_pretrained, or load_state_dict of LAVIS's stage-1 model "
        "(default: lavis for a stage-1 model, else diffusers)",
    )
    _add_overwrite(command)

    command = commands.add_parser(
        "push",
        help="upload a model to the hub",
        description="Upload a model to the hub in one commit, with a model card of the training run's settings and "
        "metrics. A README.md in the model's folder is uploaded instead of that card. Log in with `hf auth login`, or "
        "set HF_TOKEN.",
    )
    command.set_defaults(run=push)
    command.add_argument("model", metavar="MODEL", help="folder of a model or of a training run")
    command.add_argument("repository", metavar="ORG/NAME", help="created if it does not exist")
    command.add_argument("--private", action="store_true", help="create the repository as a private one")
    command.add_argument("--license", metavar="NAME", help="the license that the card names, such as apache-2.0")

    command = commands.add_parser(
        "caption",
        help="captions of images",
        description="Write a caption for each image, with a stage-1 model: by beam search, or drawn with --nucleus.",
    )
    command.set_defaults(run=caption)
    _add_images(command)
    way = command.add_mutually_exclusive_group()
    way.add_argument(
        "--num-beams", type=_positive, default=3, metavar="N", help="captions kept in mind (default: %(default)s)"
    )
    way.add_argument("--nucleus", action="store_true", help="draw words instead of searching for the likeliest")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="with --nucleus: draw from words this likely together (default: 0.9)"
    )
    command.add_argument("--seed", type=_seed, metavar="N", help="with --nucleus: of what is drawn (default: 0)")
    command.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="most tokens of a caption (default: 30, or as many as the model has positions)",
    )
    command.add_argument(
        "--min-length", type=_positive, default=1, metavar="N", help="fewest tokens (default: %(default)s)"
    )
    _add_model(command)
    _add_quiet(command)

    command = commands.add_parser(
        "search",
        help="images that fit a text",
        description="Order images by how well they fit each text: the similarity of a stage-1 model's features.",
    )
    command.set_defaults(run=search)
    _add_images(command)
    command.add_argument("--text", nargs="+", action="extend", required=True, metavar="TEXT", help="what to look for")
    command.add_argument(
        "--truncate", action="store_true", help="cut a text that is longer than the model reads, at its right end"
    )
    command.add_argument(
        "--top", type=_positive, default=5, metavar="N", help="images to name for each text (default: %(default)s)"
    )
    _add_model(command)
    _add_quiet(command)

    command = commands.add_parser(
        "plan",
        help="what a training step needs of a TPU pod",
        description="Compile the training step for a TPU pod, without one: memory, FLOPs and traffic of a chip, and "
        "the time that they allow. Nothing is run, and no weights are needed.",
    )
    command.set_defaults(run=plan)
    command.add_argument("--topology", required=True, metavar="POD", help="such as v5e:16x16")
    command.add_argument("--batch", type=_positive, required=True, metavar="N", help="images in a step, over all chips")
    command.add_argument("--model", default=DEFAULT_MODEL, help="folder, hub id or config.json (default: a small one)")
    command.add_argument(
        "--mesh", default="data=-1", metavar="SIZES", help="how to split over the chips (default: %(default)s)"
    )
    command.add_argument("--remat", action="store_true", help="recompute each layer in the backward pass")
    command.add_argument(
        "--train",
        nargs="+",
        metavar="PART",
        default=("qformer", "heads"),
        help="what is trained: vision, qformer, heads, all, or regular expressions of paths (default: qformer heads)",
    )
    command.add_argument(
        "--text-length", type=_positive, default=32, metavar="N", help="tokens of a caption (default: %(default)s)"
    )
    command.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)} (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="for programs")

    command = commands.add_parser("train", add_help=False, help="train on captioned images, or go on with a run")
    command.set_defaults(run=train, settings=TrainSettings)
    _add_quiet(command)
    command = commands.add_parser("evaluate", add_help=False, help="how well images and captions find each other")
    command.set_defaults(run=evaluate, settings=EvaluateSettings)
    _add_quiet(command)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quiet", action="store_true", help="show no progress and no information, only warnings and errors"
    )


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    command.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="images that run together (default: %(default)s)"
    )


def _add_text(command: argparse.ArgumentParser, **details: Any) -> None:
    details["help"] += " (default: none, the queries read the image alone)"
    command.add_argument("--text", metavar="TEXT", **details)
    command.add_argument(
        "--truncate", action="store_true", help="cut a text that is longer than the model reads, at its right end"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="folder, checkpoint file or hub id, Flax or PyTorch (default: a small one inside the package)",
    )
    command.add_argument(
        "--dtype", default="float32", help=f"what to compute in: {', '.join(DTYPES)} (default: %(default)s)"
    )
    _add_missing_parts(command)


def _add_missing_parts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="config.json, where the checkpoint brings none")
    command.add_argument("--tokenizer", metavar="DIR", help="folder or hub id, where the checkpoint brings none")


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**32 - 1}")
    return int(text)
