"""Ends of a program that somebody asks for while it runs."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
    """The signals that asked to stop, instead of their stopping the program at once; a second one does.

    By themselves they would not always: what Python raises for Ctrl-C is lost where JAX collects garbage.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping, as soon as what is done is kept; once more stops at once\n")

    before: dict[int, Any] = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield came
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keep them from processes that start in the block, until they say themselves what shall come of it.

    This process still gets them, by another of its threads, or else after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
