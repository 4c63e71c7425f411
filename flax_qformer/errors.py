"""The one exception for what a caller can put right."""


class InputError(ValueError):
    """Input that cannot be used: one sentence on what is wrong and what to do.

    The command line prints it as it stands and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, in no more than 120 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
