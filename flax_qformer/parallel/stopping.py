"""Stop cleanly on SIGTERM and Ctrl-C."""

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
    """A signal stopped the program, which has saved its work.

    Attributes:
      signal: number of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Record SIGTERM and SIGINT in a list, so that the program saves before it stops; a second signal stops it at once.

    Python's own handler can lose a Ctrl-C: KeyboardInterrupt vanishes if it is raised in a garbage collection callback
    of JAX. Only the main thread receives signals; in other threads the list stays empty.
    """
    received: list[int] = []
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()
        logger.warning("stopping after the work so far is saved; a second signal stops at once")

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    try:
        for number in SIGNALS:
            signal.signal(number, record)
        yield received
    finally:
        restore()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGTERM and SIGINT in processes that start inside the block, until they install their own handlers.

    This process still receives the signals, in another thread or after the block.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
