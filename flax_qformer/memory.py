"""How the C library is told to keep memory, for a program that runs the same over and over.

glibc gives a large block back to the system when it is freed, such as the temporaries of a training step, and gets it
again page by page, which takes a tenth of a step and more. Other C libraries do as they do.
"""

import ctypes
import functools

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def share_heap() -> None:
    """Give all threads one heap, the only one in which glibc keeps large blocks; call it before there are threads."""
    _call("mallopt", M_ARENA_MAX, 1)


@functools.cache
def keep_memory() -> None:
    """Keep what is freed from now on, in the heap of `share_heap`; call it when what repeats has run once.

    In that first run blocks above 32 MiB lie outside the heap. Inside it, small ones that stay would come to lie right
    behind a large one. glibc (2.36) asks for a few bytes more to align a block and does not put them back when it is
    freed, so that its place would be too small for the next of that size, which would take a second one.
    """
    _call("mallopt", M_MMAP_MAX, 0)
    _call("mallopt", M_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Give back what is free, such as compiling or an evaluation leaves.

    Call it after what comes between the runs of what repeats: that takes of the places that `keep_memory` keeps, and
    what of it stays makes them too small.
    """
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    """Call a function that glibc has, and others need not."""
    function_of_glibc = getattr(ctypes.CDLL(None), function, None)
    if function_of_glibc is not None:
        function_of_glibc(*arguments)
