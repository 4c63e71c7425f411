"""How the C library is told to keep memory, for a program that runs the same over and over.

glibc gives a large block back to the system when it is freed, such as the temporaries of a training step, and gets it
again page by page, which takes a tenth of a step and more. Other C libraries do as they do.
"""

import ctypes

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def share_heap() -> None:
    """Give all threads one heap, the only one in which glibc keeps large blocks; call it before there are threads."""
    _tell(M_ARENA_MAX, 1)


def keep_memory() -> None:
    """Keep what is freed from now on, in the heap of `share_heap`; call it when what repeats has run once.

    During that run large blocks are outside the heap, and it grows by the small ones alone. Were they in it, small ones
    would lie behind a large one, whose place could not grow by the bytes with which glibc aligns the next: that would
    need a place of its own, and the program the memory of both.
    """
    _tell(M_MMAP_MAX, 0)
    _tell(M_TRIM_THRESHOLD, -1)


def _tell(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
