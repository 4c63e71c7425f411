"""Settings of training and evaluation from the command line and a YAML file."""

import argparse
import contextlib
import inspect
import io
import itertools
import re
from pathlib import Path
from typing import NoReturn

from flax_qformer.commands.options import check_train_packages
from flax_qformer.data.sources import DataSettings
from flax_qformer.errors import InputError
from flax_qformer.training.settings import yaml_arguments


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse_settings(kind: type[DataSettings], arguments: list[str], prog: str) -> DataSettings:
    """Settings from the command line, which override those in the YAML file of `--settings`."""
    check_train_packages()
    import tyro

    parser = Parser(prog=prog, add_help=False, allow_abbrev=False)
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
        # Tyro prints errors in a box: a title, the message, a rule, and a hint. Without UTF-8, rules are dashes, and
        # one stands below the title too.
        lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[\d;]*m", "", told.getvalue()).splitlines()[1:]]
        parts = [
            list(part)
            for is_rule, part in itertools.groupby(lines, lambda line: set(line) <= {"-", "─"})
            if not is_rule
        ]
        message = " ".join(parts[0]) if parts else "wrong settings"
        raise InputError(f"{message.removeprefix(f'Error parsing {kind.__name__}: ')} (see {prog} --help)") from None
