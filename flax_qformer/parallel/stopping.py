"""Ends of a program that somebody asks for while it runs."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

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

    Left to Python, a Ctrl-C may be lost: its KeyboardInterrupt vanishes where JAX collects garbage. Only a program's
    main thread gets signals; in others none come.
    """
    came: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()
        logger.warning("stopping, as soon as what is done is kept; once more stops at once")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    try:
        for number in SIGNALS:
            signal.signal(number, note)
        yield came
    finally:
        restore()


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
