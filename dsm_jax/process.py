"""Refuse to run in a process that was forked from one that uses JAX."""

import os

from dsm_jax.errors import ForkError

_first: int | None = None  # the process in which JAX was first used


def check_process() -> None:
    """Check that this process was not forked from one that has used JAX: its first call would hang for ever.

    Raises:
      ForkError: it was.
    """
    global _first
    if _first is None:
        _first = os.getpid()
    elif _first != os.getpid():
        raise ForkError(
            "this process was forked from one that had loaded a model, and JAX hangs in it; start processes by "
            'multiprocessing.get_context("spawn"), and load the model in each'
        )
