"""Progress of a command on standard error: a bar on a terminal, otherwise plain log lines.

Progress is shown if the package's logger is at INFO: not with `--quiet`, and not in the second process of a job.
"""

import contextlib
import logging
import sys
import time
from typing import Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

LINE_EVERY = 60.0
"""Seconds between plain lines: none for a short command, a few hundred for a night."""


class Progress:
    """Counts finished units; use it in a `with` block. Log lines are printed above the bar."""

    def __init__(
        self, total: int, unit: str, name: str = "", *, initial: int = 0, line_every: float = LINE_EVERY
    ) -> None:
        """Show nothing yet.

        Args:
          total: number of units.
          unit: name of a unit, such as "image".
          name: the name of the task, if the command has several.
          initial: units that an earlier run finished.
          line_every: seconds between plain lines; `math.inf` keeps only lines for a text of `advance`.

        `is_shown` says whether anybody sees the progress.
        """
        self._total, self._unit, self._name, self._done = total, unit, name, initial
        self._line_every, self._rate_from = line_every, initial
        self.is_shown = logger.isEnabledFor(logging.INFO)
        self._is_bar = self.is_shown and sys.stderr.isatty()
        self._open = contextlib.ExitStack()
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._is_bar:
            # leave=None: a bar inside another one disappears when it is full.
            bar = tqdm(
                desc="starting", total=self._total, initial=self._done, unit=self._unit, dynamic_ncols=True, leave=None
            )
            self._open.enter_context(logging_redirect_tqdm())
            self._bar = self._open.enter_context(bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def advance(self, count: int = 1, text: str = "") -> None:
        """Count more units as done; a text, such as the losses so far, is shown at once."""
        self._done += count
        if self._is_bar:
            self._bar.set_description(self._name, refresh=False)
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.is_shown and (text or now - self._last_line >= self._line_every):
            rate = (self._done - self._rate_from) / max(now - self._started, 1e-9)
            logger.info(
                "%s%d/%d %ss: %s",
                self._name and f"{self._name} ",
                self._done,
                self._total,
                self._unit,
                text or f"{rate:.3g} {self._unit}s/s",
            )
            self._last_line = now


def print_line(text: str) -> None:
    """Print a result on standard output while progress is shown.

    It is printed above the bar and flushed at once, so that no other output mixes with it if both streams are one file.
    """
    tqdm.write(text)
    sys.stdout.flush()
