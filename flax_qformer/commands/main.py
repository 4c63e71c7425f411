"""The command `flax-qformer`."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import jax

from flax_qformer.commands import attend, caption, convert, embed, evaluate, export, plan, push, search, train
from flax_qformer.commands.messages import OptionFormatter, with_options
from flax_qformer.commands.settings_parser import Parser, parse_settings
from flax_qformer.compilation import keep_programs, share_heap
from flax_qformer.errors import InputError
from flax_qformer.parallel.stopping import Stopped
from flax_qformer.version import __version__

COMMANDS = (embed, attend, convert, export, push, caption, search, plan, train, evaluate)
"""In the order of `flax-qformer --help`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error that the user can fix prints one line and exits with status 2."""
    # Silence library logs that repeat our error.
    for library in ("DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    options, rest = _parser().parse_known_args(arguments)
    logging.getLogger("flax_qformer").setLevel(logging.WARNING if options.quiet else logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(OptionFormatter(options))
    logging.basicConfig(handlers=[handler])
    if options.quiet or not sys.stderr.isatty():
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    share_heap()
    keep_programs()
    try:
        if options.settings:
            options.run(parse_settings(options.settings, rest, f"flax-qformer {options.command}"))
        elif rest:
            raise InputError(f"unrecognized arguments: {' '.join(rest)} (see flax-qformer {options.command} --help)")
        else:
            options.run(options)
        sys.stdout.flush()
    except InputError as error:
        message = " ".join(with_options(str(error), options).split())
        print(f"flax-qformer {options.command}: {message}", file=sys.stderr)
        _leave(2)
    except Stopped as stop:
        print(f"flax-qformer {options.command}: {with_options(str(stop), options)}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except OSError as error:
        # Often standard output: its reader is gone, or its disk is full. Python would write to it again at exit.
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


def _leave(status: int) -> NoReturn:
    """Exit at once: an orderly exit would wait for the job's other processes, which may wait for this one."""
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="flax-qformer", description="BLIP-Diffusion's Q-Former in JAX/Flax.")
    parser.set_defaults(settings=None, quiet=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    for subparser in commands.choices.values():
        subparser.set_defaults(parser=subparser)
    return parser
