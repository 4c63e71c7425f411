"""The library's messages with the command's options in place of the library's arguments."""

import dataclasses
import logging
import re
from typing import Any

import tyro


class OptionFormatter(logging.Formatter):
    def __init__(self, options: type) -> None:
        super().__init__("%(message)s")
        self._options = options

    def format(self, record: logging.LogRecord) -> str:
        return with_options(super().format(record), self._options)


def with_options(message: str, options: type) -> str:
    """The library's message with a command's options in place of the arguments that it names in backticks.

    `overwrite=True` becomes --overwrite where the command's dataclass has that option. A call of `convert_checkpoint`
    becomes the command `flax-qformer convert`. Other text in backticks stays.
    """
    known = option_names(options)

    def option(match: re.Match[str]) -> str:
        is_convert, name, value = match["convert"], match["name"], (match["value"] or "").strip("'")
        if not is_convert and name not in known:
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        if value == "False":
            flag = f"--no-{flag[2:]}"
        elif value and value != "True":
            flag = f"{flag} {value}"
        return f"`flax-qformer convert {flag}`" if is_convert else flag

    return re.sub(r"`(?P<convert>convert_checkpoint\(\.\.\., )?(?P<name>\w+)(=(?P<value>[^`)]*))?\)?`", option, message)


def option_names(options: type) -> set[str]:
    """The fields of a command's dataclass that are options, those of a nested dataclass included."""
    names = set()
    for field in dataclasses.fields(options):
        kind: Any = field.type
        if dataclasses.is_dataclass(getattr(kind, "__origin__", None)):
            names |= option_names(kind.__origin__)
        elif tyro.conf.Positional not in getattr(kind, "__metadata__", ()):
            names.add(field.name)
    return names
