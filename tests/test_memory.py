"""What becomes of freed memory: how much of it the process still has, and in how many pieces."""

import subprocess
import sys

import pytest

# Takes 64 MB and frees them again, or each second of many pieces; prints the megabytes that the process has after that,
# and the pieces.
SCRIPT = """
import ctypes, sys
from dsm_jax import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for name in sys.argv[1:]:
    if name == "keep": memory.keep_freed()
    if name == "use":
        blocks = [libc.malloc(1 << 20) for _ in range(64)]
        for block in blocks: ctypes.memset(block, 1, 1 << 20)
        for block in blocks: libc.free(block)
    if name == "break":
        blocks = [(libc.malloc(size), size) for size in range(20_000, 100_000, 64)]
        for block, size in blocks: ctypes.memset(block, 1, size)
        for block, _ in blocks[::2]: libc.free(block)
    if name == "return": memory.return_freed()
    if name == "aside": memory.set_pieces_aside()
print(int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20, sum(count for _, count in memory.free_pieces()))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and is about glibc")


def left_after(*actions: str) -> tuple[int, int]:
    """Megabytes and pieces."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *actions], capture_output=True, text=True, check=True)
    megabytes, pieces = map(int, done.stdout.split())
    return megabytes, pieces


def megabytes_after(*actions: str) -> int:
    return left_after(*actions)[0]


def test_freed_memory_is_kept_when_asked_for_and_can_still_be_returned():
    before = megabytes_after()
    assert megabytes_after("keep", "use") > before + 50
    assert megabytes_after("use") < before + 20
    assert megabytes_after("keep", "use", "return") < before + 20


def test_pieces_of_kept_memory_are_taken_out_of_use_and_their_pages_returned():
    megabytes, pieces = left_after("keep", "break")
    assert pieces > 600
    assert left_after("break", "aside")[1] > 600, "nothing is taken where memory is not kept"
    megabytes_aside, pieces_aside = left_after("keep", "break", "aside")
    assert pieces_aside < 20
    assert megabytes_aside < megabytes - 20
