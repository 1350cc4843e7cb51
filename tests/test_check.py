"""The checks of the streaming contract: sound modules pass, and a planted fault per clause is caught by name.

Shape letters: B batch rows, T time steps, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.nn.conv import CausalConv1d, ConvState
from dsm_jax.streaming import KVCache, select_rows
from tests.helpers.check import check_in_place, check_streaming

X_BTC = np.random.default_rng(0).normal(size=(2, 24, 3)).astype(np.float32)
WINDOW = 5


class Conv(CausalConv1d):
    """A sound module; each faulty module below changes one place of it."""

    def __init__(self):
        super().__init__(3, 3, kernel=3, replicate=True, rngs=nnx.Rngs(0))


class ForgetsItsTail(Conv):
    def step(self, x_BTC, state, lengths_B=None):
        forgotten = dataclasses.replace(state, tail_BTC=jnp.zeros_like(state.tail_BTC))
        return super().step(x_BTC, forgotten, lengths_B)


class LeaksBetweenRows(Conv):
    def step(self, x_BTC, state, lengths_B=None):
        y_BTC, state = super().step(x_BTC, state, lengths_B)
        return y_BTC + 1e-6 * x_BTC.mean(0, keepdims=True), state


class CountsForAllRows(Conv):
    """Pads with the first step only while no row has taken a step, so not after a reset of one row."""

    def step(self, x_BTC, state, lengths_B=None):
        started_B = jnp.broadcast_to(state.started_B.any(), state.started_B.shape)
        return super().step(x_BTC, dataclasses.replace(state, started_B=started_B), lengths_B)


class WritesWhileIdle(Conv):
    def step(self, x_BTC, state, lengths_B=None):
        return super().step(x_BTC, state)


class IsNanWhileIdle(Conv):
    """Divides by the sum of the inputs so far, which is 0 for a row that has been idle from the start."""

    def step(self, x_BTC, state, lengths_B=None):
        y_BTC, state = super().step(x_BTC, state, lengths_B)
        one_B = state.started_B.astype(jnp.float32)
        return y_BTC * (one_B / one_B)[:, None, None], state


class TakesAllStepsOrNone(Conv):
    """Leaves idle rows alone, but takes the whole chunk in every other row."""

    def step(self, x_BTC, state, lengths_B=None):
        return super().step(x_BTC, state, None if lengths_B is None else jnp.where(lengths_B > 0, x_BTC.shape[1], 0))


class IdlesWithTheWholeBatch(Conv):
    def step(self, x_BTC, state, lengths_B=None):
        return super().step(
            x_BTC, state, None if lengths_B is None else jnp.broadcast_to(lengths_B.min(), lengths_B.shape)
        )


class ChangesDtype(Conv):
    def step(self, x_BTC, state, lengths_B=None):
        y_BTC, state = super().step(x_BTC, dataclasses.replace(state, tail_BTC=state.tail_BTC.astype(x_BTC.dtype)))
        return y_BTC, dataclasses.replace(state, tail_BTC=state.tail_BTC.astype(jnp.bfloat16))


class WindowSum:
    """Sums the last WINDOW steps, which it keeps in a ring like a cache of keys."""

    def init_state(self, batch_size):
        return ConvState(jnp.zeros((batch_size, WINDOW, 3)), jnp.zeros((batch_size,), jnp.int32))

    def step(self, x_BTC, state, lengths_B=None):
        ring_BTC, position_B = state.tail_BTC, state.started_B
        rows = jnp.arange(x_BTC.shape[0])
        ys = []
        for t in range(x_BTC.shape[1]):
            taken = ConvState(self.write(ring_BTC, rows, position_B, x_BTC, t), position_B + 1)
            ys.append(taken.tail_BTC.sum(1))
            takes_B = None if lengths_B is None else t < lengths_B
            kept = select_rows(takes_B, taken, ConvState(ring_BTC, position_B))
            ring_BTC, position_B = kept.tail_BTC, kept.started_B
        return jnp.stack(ys, axis=1), ConvState(ring_BTC, position_B)

    def write(self, ring_BTC, rows, position_B, x_BTC, t):
        return ring_BTC.at[rows, position_B % WINDOW].set(x_BTC[:, t])

    def __call__(self, x_BTC):
        return self.step(x_BTC, self.init_state(x_BTC.shape[0]))[0]


class LosesAKeyOnceFull(WindowSum):
    """Clears the slot of the chunk's next step too soon, like a ring that is written before it is read.

    Off by one, and only past the window: before that the slot is empty anyway.
    """

    def write(self, ring_BTC, rows, position_B, x_BTC, t):
        ring_BTC = super().write(ring_BTC, rows, position_B, x_BTC, t)
        last = t + 1 == x_BTC.shape[1]
        return ring_BTC if last else ring_BTC.at[rows, (position_B + 1) % WINDOW].set(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("module", [Conv(), WindowSum()])
def test_a_sound_module_passes(module):
    check_streaming(module, X_BTC, window=WINDOW, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "clause"),
    [
        (ForgetsItsTail(), "cuts: chunks of"),
        (LosesAKeyOnceFull(), "cuts: chunks of"),
        (LeaksBetweenRows(), "rows: row 0 depends on the input of row 1"),
        (CountsForAllRows(), "reset: the row is not as a fresh stream"),
        (WritesWhileIdle(), "idle: the row's state changed"),
        (IsNanWhileIdle(), "idle: an output is not finite"),
        (IdlesWithTheWholeBatch(), "ragged: the row is not as with its own steps alone"),
        (TakesAllStepsOrNone(), "ragged: the row is not as with its own steps alone"),
        (ChangesDtype(), "shapes: a step turned a state of"),
    ],
)
def test_each_fault_is_caught_by_its_clause(module, clause):
    with pytest.raises(AssertionError, match=f"^{clause}"):
        check_streaming(module, X_BTC, window=WINDOW, atol=1e-5)


def test_a_reset_that_reaches_other_rows_is_caught(monkeypatch):
    monkeypatch.setattr(
        "tests.helpers.check.reset_rows", lambda state, reset_B, fresh: jax.tree.map(jnp.zeros_like, state)
    )
    with pytest.raises(AssertionError, match=r"^reset: another row changed"):
        check_streaming(Conv(), X_BTC, window=WINDOW, atol=1e-5)


def test_the_ring_fault_does_not_show_within_the_window():
    # This is why the check needs `window`: on a short clip it would pass the module that loses a key.
    module, short_BTC = LosesAKeyOnceFull(), X_BTC[:, :WINDOW]
    singles, state = [], module.init_state(2)
    for t in range(WINDOW):
        y_BTC, state = module.step(short_BTC[:, t : t + 1], state)
        singles.append(y_BTC)
    np.testing.assert_allclose(jnp.concatenate(singles, axis=1), module(short_BTC), atol=1e-5)


@pytest.mark.parametrize(
    ("x_BTC", "window", "block"), [(X_BTC[:, :15], 5, 1), (X_BTC[:1], 1, 1), (X_BTC, 8, 1), (X_BTC[:, :23], 1, 2)]
)
def test_a_clip_that_cannot_show_a_fault_is_refused(x_BTC, window, block):
    with pytest.raises(ValueError, match=r"needs 2 rows or more.*more than 3 windows"):
        check_streaming(Conv(), x_BTC, window=window, block=block, atol=1e-5)


def write_then_read(x_BKH, cache):
    k_BKSH, v_BKSH = cache.k_BKSH.at[:, :, 0].set(x_BKH), cache.v_BKSH.at[:, :, 0].set(x_BKH)
    return (k_BKSH * v_BKSH).sum(2), KVCache(k_BKSH, v_BKSH)


def read_after_write(x_BKH, cache):
    """Read the old ring after the new one has been computed."""
    y_BKH, written = write_then_read(x_BKH, cache)
    return y_BKH + (cache.k_BKSH * cache.v_BKSH * y_BKH[:, :, None]).sum(2), written


def copied_out(x_BKH, cache):
    y_BKH, written = write_then_read(x_BKH, cache)
    return y_BKH, KVCache(written.k_BKSH.astype(jnp.bfloat16), written.v_BKSH)


def test_a_ring_that_is_copied_is_caught():
    x_BKH, cache = jnp.ones((2, 2, 8)), KVCache(jnp.zeros((2, 2, 4096, 8)), jnp.zeros((2, 2, 4096, 8)))
    check_in_place(write_then_read, x_BKH, cache)
    with pytest.raises(AssertionError, match=r"^copies: the step needs"):
        check_in_place(read_after_write, x_BKH, cache)
    with pytest.raises(AssertionError, match=r"^donation: 524288 bytes are updated in place, the caches have 1048576"):
        check_in_place(copied_out, x_BKH, cache)
