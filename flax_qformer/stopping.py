"""Ends of a program that somebody asks for while it runs."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A signal asked the program to end; what it had done is kept.

    Attributes:
      signal: its number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """The signals that asked to stop, instead of their stopping the program at once; a second one does."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {number: signal.signal(number, note) for number in numbers}
    try:
        yield came
    finally:
        for number in numbers:
            signal.signal(number, before[number])
