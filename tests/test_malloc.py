"""Freed memory: kept in the process or returned to the system, as set."""

import subprocess
import sys

import pytest

# Allocates and frees 64 MB; prints the megabytes that the process then holds.
SCRIPT = """
import ctypes, sys
from dsm_jax import malloc
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for name in sys.argv[1:]:
    if name == "keep": malloc.keep_freed()
    if name == "use":
        blocks = [libc.malloc(1 << 20) for _ in range(64)]
        for block in blocks: ctypes.memset(block, 1, 1 << 20)
        for block in blocks: libc.free(block)
    if name == "return": malloc.return_freed()
print(int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and is about glibc")


def megabytes_after(*actions: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *actions], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_keep_freed_keeps_freed_memory_and_return_freed_still_returns_it():
    before = megabytes_after()
    assert megabytes_after("keep", "use") > before + 50
    assert megabytes_after("use") < before + 20
    assert megabytes_after("keep", "use", "return") < before + 20
