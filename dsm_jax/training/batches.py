"""Batches of rows: in a new order each time through, and the same however often a run is stopped."""

from collections.abc import Iterator
from typing import Any

from dsm_jax.errors import TrainingError


def batches(rows: Any, *, batch_size: int, seed: int, first_step: int) -> Iterator[Any]:
    """Endless batches of a random-access source, in a new order every time through, prepared ahead on a thread.

    Batch n is always the same, so a run that is resumed reads on where it stopped.

    Args:
      rows: has a length and gives, for each index, a dict of arrays without a batch axis.
      batch_size: rows in a batch.
      seed: of the order.
      first_step: the number of the first batch wanted, from 0: the steps already taken.

    Raises:
      TrainingError: there are no rows.
    """
    import grain

    if not len(rows):
        raise TrainingError("there are no rows to train on; look at where the data comes from")
    endless = grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(endless[first_step:].to_iter_dataset(options))
