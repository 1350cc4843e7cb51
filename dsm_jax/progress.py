"""Report how far long work has come: the library calls back, and draws nothing."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of one item of the work.

    Attributes:
      done: seconds of audio that were read or made, bytes that were loaded, steps of a training, or recordings of
        an evaluation.
      total: value of `done` at the end; None where it is not known.
      item: place of the item in a batch.
    """

    done: float
    total: float | None = None
    item: int = 0


ProgressCallback = Callable[[Progress], None]
