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
    _tell(M_ARENA_MAX, 1)


@functools.cache
def keep_memory() -> None:
    """Keep what is freed from now on, in the heap of `share_heap`; call it when what repeats has run once.

    In that first run blocks above 32 MiB lie outside the heap. Inside it, small ones that stay would come to lie right
    behind a large one. glibc (2.36) asks for a few bytes more to align a block and does not put them back when it is
    freed, so that its place would be too small for the next of that size, which would take a second one.
    """
    _tell(M_MMAP_MAX, 0)
    _tell(M_TRIM_THRESHOLD, -1)


def _tell(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
