"""What the C library does with memory that was freed: gives it back to the system, or keeps it."""

import ctypes
import re

_PIECES = 16 << 10, 16 << 20  # bytes: those that looking for a buffer goes through, and none that is one
_kept = False  # by `keep_freed`


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
    global _kept
    _kept = True


def set_pieces_aside() -> None:
    """Takes the pieces that compiling has left of kept memory out of use, for good; else, does nothing.

    XLA's compiler frees a gigabyte in a hundred thousand pieces. Whoever wants a buffer then goes through lists of
    them, and the other threads wait: a step of `digits` on two cores takes 0.26 to 0.40 s in a process that compiled
    it and 0.17 to 0.19 s in one that found it in the cache. With the pieces taken, and their pages returned first, it
    is 0.19 to 0.21 s.
    """
    if not _kept:
        return
    return_freed()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for _ in range(2):  # what a larger piece leaves of itself is taken the second time
        for size, count in reversed(free_pieces()):
            for _ in range(count):
                libc.malloc(size - 16)  # and what the C library notes about it


def free_pieces() -> list[tuple[int, int]]:
    """What the first arena of glibc holds in pieces from 16 kB to 16 MB: the least size of each list, and its length.

    Sizes are in bytes, and rise.
    """
    libc, text, size = ctypes.CDLL(None), ctypes.c_char_p(), ctypes.c_size_t()
    libc.open_memstream.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    libc.malloc_info(0, file)
    libc.fclose(file)
    first_arena = (text.value or b"").partition(b"</sizes>")[0]
    libc.free(text)
    lists = re.findall(rb'<size from="(\d+)" to="(\d+)" total="\d+" count="(\d+)"', first_arena)
    least, most = _PIECES
    return [(int(low), int(count)) for low, high, count in lists if least <= int(low) and int(high) <= most]
