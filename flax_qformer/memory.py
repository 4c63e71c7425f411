"""How the C library is told to keep memory."""

import ctypes

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Keep what is freed for what comes next, for a program that runs the same over and over.

    glibc gives a large block back to the system when it is freed, such as the temporaries of a training step, and gets
    it again page by page, which takes longer than to use it. It keeps large blocks in the first of its arenas alone, so
    there will be no other: call this before there are threads. Other C libraries do as they do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)
