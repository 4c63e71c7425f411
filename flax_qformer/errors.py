"""The one exception for what a caller can put right."""


class InputError(ValueError):
    """Input that cannot be used: one sentence on what is wrong and what to do.

    The command line prints it as it stands and exits with status 2.
    """
