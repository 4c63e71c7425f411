"""The library's messages with the command's options in place of the library's arguments."""

import argparse
import dataclasses
import logging
import re

OPTION = re.compile(r"--[a-z0-9][a-z0-9-]*")


class OptionFormatter(logging.Formatter):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__("%(message)s")
        self._options = options

    def format(self, record: logging.LogRecord) -> str:
        return with_options(super().format(record), self._options)


def with_options(message: str, options: argparse.Namespace) -> str:
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
