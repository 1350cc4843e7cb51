"""Sets how the C library treats freed memory, for commands; the library itself leaves that to its caller."""

import ctypes


def return_freed() -> None:
    """Asks the C library to return freed memory to the system; outside glibc, does nothing.

    Loading and compiling allocate and free hundreds of megabytes. Unless returned, these stay in the process: 340 MB of
    5.1 GB at the peak of transcribing with stt-1b in float32 on CPU.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def keep_freed() -> None:
    """Asks the C library to keep freed memory for the next allocation; outside glibc, does nothing. Call before JAX.

    A training step allocates and frees hundreds of megabytes. If they were returned each time, the system would map and
    zero every page again: a third of the time of a step of `digits` on two cores.
    """
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # of malloc.h; a second arena would keep its own
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, ctypes.c_int(2**31 - 1))
