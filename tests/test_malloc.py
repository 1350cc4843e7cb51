"""Freed memory: kept in the process or returned to the system, as set."""

import subprocess
import sys

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

from dsm_jax import malloc

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


# Frees every second block of 64 kB, sets pieces aside if asked to, and prints how many of 500 new blocks lie among the
# old ones, and the megabytes that the process then holds.
PIECES = """
import ctypes, sys
from dsm_jax import malloc
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if "keep" in sys.argv: malloc.keep_freed()
blocks = [libc.malloc(1 << 16) for _ in range(1000)]
for block in blocks: ctypes.memset(block, 1, 1 << 16)
for block in blocks[::2]: libc.free(block)
if "aside" in sys.argv: malloc.set_pieces_aside()
low, high = min(blocks), max(blocks)
print(sum(low < libc.malloc((1 << 16) - 64) < high for _ in range(500)))
print(int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20)
"""


def pieces_after(*actions: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PIECES, *actions], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_pieces_set_aside_are_never_allocated_again_and_hold_no_memory():
    (used, held), (used_after, held_after) = pieces_after("keep"), pieces_after("keep", "aside")
    assert used > 490
    assert used_after < 10
    assert held_after < held - 25  # of 31 MB in pieces


def test_setting_pieces_aside_ends_where_large_pieces_are_not_of_the_heap():
    pieces_after("aside")  # would allocate for ever if it took them for the heap's


def test_pieces_are_set_aside_after_programs_that_took_long_to_trace_or_to_compile(monkeypatch):
    happened, listeners = [], []
    monkeypatch.setattr(malloc, "set_pieces_aside", lambda: happened.append("aside"))
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    malloc.set_pieces_aside_after_compiling()
    (listener,) = listeners
    for _ in range(9):  # many short ones do not add up
        listener("/jax/core/compile/jaxpr_trace_duration", 0.1, fun_name="small")
        listener("/jax/core/compile/backend_compile_duration", 0.1, fun_name="small")
        listener("/jax/checkpoint/write/duration", 9.0)
    assert happened == []
    listener("/jax/core/compile/backend_compile_duration", 9.0, fun_name="step")
    assert happened == ["aside"]
    listener("/jax/core/compile/jaxpr_trace_duration", 0.4, fun_name="cached")
    listener("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.2, fun_name="cached")
    assert happened == ["aside"]
    listener("/jax/core/compile/backend_compile_duration", 0.01, fun_name="cached")
    assert happened == ["aside", "aside"]


def test_jax_tells_of_the_stages_by_the_names_that_are_listened_to():
    events = []

    def listener(event: str, seconds: float, **_: str | int) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: 3 * x + len(events))(jnp.ones(3))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert events[-3:] == [malloc._TRACED, malloc._LOWERED, malloc._COMPILED]
