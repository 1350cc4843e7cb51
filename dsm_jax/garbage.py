"""Keep Python's collector of garbage out of work whose objects stay."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Run a block, or a function that is decorated with it, without collections of garbage.

    Tracing makes hundreds of thousands of objects that stay, and each collection looks through more of them: a tenth
    of a `dsm-jax transcribe` of six seconds (docs/decisions/0027-collections-of-garbage.md).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
