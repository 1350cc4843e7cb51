"""Batches: the order of rows, where a resumed run reads on, and what a batch holds."""

import itertools

import numpy as np
import pytest

from dsm_jax.errors import TrainingError
from dsm_jax.training.data import batches
from tests.helpers.small_run import Rows, data


def indices(count: int, batch_size: int = 5, **settings: int) -> list[int]:
    drawn = batches(Rows(), batch_size=batch_size, **({"seed": 0, "first_step": 0} | settings))
    return np.concatenate([batch["row_B"] for batch in itertools.islice(drawn, count)]).tolist()


def test_every_time_through_each_row_comes_once_and_in_a_new_order():
    order = indices(12)
    epochs = [tuple(order[i : i + 12]) for i in range(0, 60, 12)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 5
    assert len(set(epochs)) == 5
    assert indices(12) == order
    assert indices(12, seed=1) != order


@pytest.mark.parametrize("first", [1, 2, 7])
def test_batches_read_on_from_any_step(first):
    assert indices(12 - first, first_step=first) == indices(12)[5 * first :]


def test_a_batch_may_have_one_row():
    order = indices(24, batch_size=1)
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order == indices(6, batch_size=4), "the order of the rows is that of larger batches"
    assert indices(4, batch_size=1, first_step=20) == order[20:]


def test_a_batch_holds_rows_as_they_are():
    batch = next(data())
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "x_BD": ((4, 3), "float32"),
        "y_B": ((4,), "float32"),
        "row_B": ((4,), "int32"),
    }
    for place, index in enumerate(batch["row_B"]):
        np.testing.assert_array_equal(batch["x_BD"][place], Rows()[index]["x_BD"])
    with pytest.raises(TrainingError, match="there are no rows to train on; look at where the data comes from"):
        batches([], batch_size=4, seed=0, first_step=0)
