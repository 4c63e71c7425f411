"""The command `flax-qformer`."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union

import jax
import tyro

from flax_qformer.commands import attend, caption, convert, embed, evaluate, export, generate, plan, push, search, train
from flax_qformer.commands.messages import OptionFormatter, with_options
from flax_qformer.commands.options import CommonOptions, check_train_packages
from flax_qformer.compilation import keep_programs, share_heap
from flax_qformer.errors import InputError
from flax_qformer.parallel.stopping import Stopped
from flax_qformer.version import __version__

COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "generate": (generate.GenerateOptions, generate.run),
    "embed": (embed.EmbedOptions, embed.run),
    "attend": (attend.AttendOptions, attend.run),
    "convert": (convert.ConvertOptions, convert.run),
    "export": (export.ExportOptions, export.run),
    "push": (push.PushOptions, push.run),
    "caption": (caption.CaptionOptions, caption.run),
    "search": (search.SearchOptions, search.run),
    "plan": (plan.PlanOptions, plan.run),
    "train": (train.TrainOptions, train.run),
    "evaluate": (evaluate.EvaluateOptions, evaluate.run),
}
"""The options of each command and the function that runs it, in the order of `flax-qformer --help`."""

DESCRIPTION = "BLIP-Diffusion in JAX/Flax. flax-qformer COMMAND --help shows the options of a command; "
DESCRIPTION += "flax-qformer --version prints the version."


@dataclass(frozen=True)
class _SettingsFile:
    settings: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error that the user can fix prints one line and exits with status 2."""
    # Silence library logs that repeat our error.
    for library in ("DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--version"]:
        print(__version__)
        sys.exit(0)
    command = arguments[0] if arguments else ""
    kind = COMMANDS[command][0] if command in COMMANDS else CommonOptions
    prog = f"flax-qformer {command}"
    try:
        options = parse(arguments)
        logging.getLogger("flax_qformer").setLevel(logging.WARNING if options.quiet else logging.INFO)
        handler = logging.StreamHandler()
        handler.setFormatter(OptionFormatter(kind))
        logging.basicConfig(handlers=[handler])
        if options.quiet or not sys.stderr.isatty():
            os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        share_heap()
        keep_programs()
        COMMANDS[command][1](options)
        sys.stdout.flush()
    except InputError as error:
        print(f"{prog}: {' '.join(with_options(str(error), kind).split())}", file=sys.stderr)
        _leave(2)
    except Stopped as stop:
        print(f"{prog}: {with_options(str(stop), kind)}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except OSError as error:
        # Often standard output: its reader is gone, or its disk is full. Python would write to it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        print(f"{prog}: {error.filename or 'cannot go on'}: {error.strerror or error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        _leave(130)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)


def parse(arguments: Sequence[str]) -> Any:
    """The options of a command; those of the YAML file that `--settings` names are its defaults.

    Raises:
      InputError: a setting is wrong.
      SystemExit: help was printed (status 0), or the arguments are wrong (status 2).
    """
    defaults: dict[str, Any] = {}
    command, *rest = arguments or [""]
    reads_file = [name for name, (kind, _) in COMMANDS.items() if hasattr(kind, "from_yaml")]
    if command in reads_file:
        file, _ = tyro.cli(
            _SettingsFile, args=rest, prog=f"flax-qformer {command}", add_help=False, return_unknown_args=True
        )
        if file.settings:
            check_train_packages()
            defaults[command] = COMMANDS[command][0].from_yaml(file.settings)
    # The list of commands shows the first line of each description.
    kinds = [
        Annotated[
            kind,
            tyro.conf.subcommand(
                name,
                default=defaults.get(name, tyro.MISSING_NONPROP),
                description=None if name == command else kind.__doc__.partition("\n")[0],
            ),
        ]
        for name, (kind, _) in COMMANDS.items()
    ]
    commands: Any = Union[tuple(kinds)]  # noqa: UP007
    try:
        return tyro.cli(commands, args=arguments, prog="flax-qformer", description=DESCRIPTION)
    except InputError as error:  # of `TrainSettings` or `EvaluateSettings`
        raise InputError(f"{error} (see flax-qformer {command} --help)") from None


def _leave(status: int) -> NoReturn:
    """Exit at once: an orderly exit would wait for the job's other processes, which may wait for this one."""
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
