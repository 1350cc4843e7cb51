"""What the C library does with memory that was freed: gives it back to the system, or keeps it."""

import ctypes


def return_freed() -> None:
    """Asks the C library to return what it holds on to; where it cannot (outside glibc), does nothing.

    Loading and compiling allocate and free by the hundred megabytes. Kept, that is on top of everything that comes
    after: 340 MB of 5.1 GB at the peak of transcribing with stt-1b in float32 on CPU.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def keep_freed() -> None:
    """Asks the C library to keep what is freed for what comes next; outside glibc, does nothing. Call it before JAX.

    A step of training takes hundreds of megabytes and frees them again. Given back each time, the system has to hand
    them out anew, page by page and zeroed: a third of the time of a step of `digits` on two cores.
    """
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # of malloc.h; a second arena would keep its own
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, ctypes.c_int(2**31 - 1))
