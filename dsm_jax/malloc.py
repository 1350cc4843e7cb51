"""Settings of the C library's malloc for freed memory. Commands use them; the library leaves them to its caller."""

import ctypes


def return_freed() -> None:
    """Return freed memory to the system; does nothing outside glibc.

    Loading and compiling allocate and free hundreds of megabytes, which otherwise stay in the process: 340 MB of
    5.1 GB at the peak of transcribing with stt-1b in float32 on CPU.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def keep_freed() -> None:
    """Keep freed memory in the process for later allocations; does nothing outside glibc. Call before importing JAX.

    A training step allocates and frees hundreds of megabytes. If they returned to the system each time, it would map
    and zero every page again: a third of the time of a step of `digits` on two cores.
    """
    # Constants of malloc.h. One arena, as each arena keeps freed memory of its own.
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, ctypes.c_int(2**31 - 1))
