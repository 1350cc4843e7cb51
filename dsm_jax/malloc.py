"""Settings of the C library's malloc for freed memory.

The library returns what loading and compiling have freed. Keeping freed memory is a choice for a whole process: only
commands make it.
"""

import ctypes

_PIECE_BYTES = 1 << 14, 1 << 24  # the pieces to set aside: smaller ones are not searched, larger ones serve as buffers
_LONG_COMPILATION = 0.5  # seconds; shorter ones leave little behind
# The events of JAX for the stages of a compilation, the last of them the compiler, or the cache in its place.
_TRACED, _LOWERED, _COMPILED = (
    f"/jax/core/compile/{stage}_duration" for stage in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)


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


def set_pieces_aside() -> None:
    """Return freed memory to the system, and take its free pieces of 16 kB to 16 MB out of use for good.

    For a process that keeps freed memory; does nothing outside glibc. XLA's compiler leaves tens of thousands of free
    pieces. Each allocation of a step searches them while other threads wait for the lock: a step of the codec of
    `digits` on two cores takes 250 ms in a process that compiled it, and 155 ms with the pieces set aside. Pieces that
    are set aside hold address space, and no memory.
    """
    return_freed()
    try:
        libc = ctypes.CDLL(None)
        allocate, free, end_of_heap = libc.malloc, libc.free, libc.sbrk
    except (AttributeError, OSError, TypeError):
        return
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.argtypes = [ctypes.c_void_p]
    end_of_heap.restype, end_of_heap.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    least, size = _PIECE_BYTES
    while size >= least:
        end, piece = end_of_heap(0), allocate(size - 16)  # and malloc's 16 bytes of its own
        if piece is None or piece > end or end_of_heap(0) != end:  # not a free piece of the heap: none is left
            free(piece)
            return_freed()
            size //= 2


def set_pieces_aside_after_compiling() -> None:
    """Set pieces aside whenever JAX has traced and compiled a program for over half a second.

    A program of a compilation cache counts too, as tracing it leaves pieces: a step of the language model of `digits`
    took 1.1 times as long with them.
    """
    import jax.monitoring

    spent = 0.0

    def worked(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal spent
        if event not in (_TRACED, _LOWERED, _COMPILED):
            return
        spent += duration_secs
        if event == _COMPILED:
            if spent > _LONG_COMPILATION:
                set_pieces_aside()
            spent = 0.0

    jax.monitoring.register_event_duration_secs_listener(worked)
