"""The exception for errors that a caller can fix."""

from collections.abc import Sequence


class InputError(ValueError):
    """Input that cannot be used: one sentence on what is wrong and what to do.

    It names the library's own arguments, in backticks: `overwrite=True`. The command line prints it with its options
    in their place and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's error, in at most 120 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def listed(names: Sequence[str]) -> str:
    """The first 20 names, and how many more there are."""
    shown = ", ".join(name if len(name) <= 200 else name[:197] + "..." for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")
