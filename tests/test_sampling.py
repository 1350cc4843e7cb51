"""Sampling of tokens. tests/parity/test_modules.py compares it with the reference, given the same noise.

Shape letters: B batch rows, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.nn import sampling
from dsm_jax.nn.sampling import sample, sample_or_greedy, top_k_capacity

LOGITS_V = np.log([0.1, 0.4, 0.05, 0.3, 0.15]).astype(np.float32)


@functools.cache
def compiled(max_top_k: int):
    return jax.jit(functools.partial(sample, max_top_k=max_top_k))


def draw(logits_BV, keys_B, temperature=1.0, top_k=0, max_top_k=None) -> np.ndarray:
    """Sample tokens of rows that share a temperature and a top-k."""
    rows, vocabulary = logits_BV.shape
    temperature_B = jnp.broadcast_to(jnp.float32(temperature), (rows,))
    top_k_B = jnp.broadcast_to(jnp.int32(top_k), (rows,))
    max_top_k = vocabulary if max_top_k is None else max_top_k
    return np.array(compiled(max_top_k)(jnp.asarray(logits_BV), keys_B, temperature_B, top_k_B))


@functools.cache
def draws(temperature: float, top_k: int) -> np.ndarray:
    keys_B = jax.random.split(jax.random.key(0), 20_000)
    return draw(jnp.broadcast_to(LOGITS_V, (20_000, 5)), keys_B, temperature, top_k)


def test_temperature_0_takes_the_first_of_the_most_probable_tokens():
    tokens_B = draw(jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 1.0]]), jax.random.split(jax.random.key(0)), 0.0)
    assert tokens_B.tolist() == [1, 0]
    assert tokens_B.dtype == jnp.int32


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.0, 5), (1.0, 9), (0.5, 0), (2.0, 3), (1.0, 1)])
def test_tokens_are_as_frequent_as_their_probabilities(temperature, top_k):
    probability_V = np.exp(LOGITS_V) ** (1 / temperature)
    if 0 < top_k < 5:
        probability_V[np.argsort(-probability_V)[top_k:]] = 0
    probability_V /= probability_V.sum()
    share_V = np.bincount(draws(temperature, top_k), minlength=5) / 20_000
    # Five standard deviations of a share of 20,000 draws; a token outside the k best never comes.
    assert (np.abs(share_V - probability_V) <= 5 * np.sqrt(probability_V * (1 - probability_V) / 20_000)).all()
    assert draws(temperature, top_k).dtype == np.int32


def test_of_equally_probable_tokens_top_k_keeps_the_first():
    keys_B = jax.random.split(jax.random.key(0), 200)
    tokens_B = draw(jnp.zeros((200, 6)), keys_B, top_k=2)
    assert set(tokens_B.tolist()) == {0, 1}


ROWS = 3
per_row = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.8, 1.5]), st.integers(0, 9)), min_size=ROWS, max_size=ROWS)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), chosen=per_row, row=st.integers(0, ROWS - 1))
def test_a_row_depends_on_its_own_temperature_and_top_k_only(seed, chosen, row):
    logits_BV = jax.random.normal(jax.random.key(1), (ROWS, 7))
    keys_B = jax.random.split(jax.random.key(seed), ROWS)
    temperature_B, top_k_B = map(jnp.array, zip(*chosen, strict=True))
    together = compiled(8)(logits_BV, keys_B, temperature_B.astype(jnp.float32), top_k_B.astype(jnp.int32))
    alone = draw(logits_BV[row : row + 1], keys_B[row : row + 1], *chosen[row])
    assert together[row] == alone[0]


@pytest.mark.slow
def test_a_larger_max_top_k_changes_no_token():
    logits_BV = jax.random.normal(jax.random.key(1), (500, 7))
    keys_B = jax.random.split(jax.random.key(2), 500)
    exact = draw(logits_BV, keys_B, 0.9, 3, max_top_k=3)
    np.testing.assert_array_equal(draw(logits_BV, keys_B, 0.9, 3, max_top_k=4), exact)
    free = draw(logits_BV, keys_B, 0.9, 0, max_top_k=0)
    assert (free != exact).any()
    np.testing.assert_array_equal(draw(logits_BV, keys_B, 0.9, 7, max_top_k=3), free)
    # The noise is a token's own: a token that is among the best anyway is chosen with a top-k too.
    among_best = np.asarray(logits_BV)[np.arange(500), free] >= np.sort(logits_BV, axis=1)[:, -3]
    assert 100 < among_best.sum() < 500
    np.testing.assert_array_equal(exact[among_best], free[among_best])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    # Draw few values, so that tokens are equally probable, some of them not at all.
    logits_BV=st.lists(
        st.lists(st.sampled_from([-np.inf, 0.0, 1.0, 2.0, 9.0]), min_size=7, max_size=7), min_size=3, max_size=3
    ),
    limit_B=st.lists(st.integers(1, 7), min_size=3, max_size=3),
)
def test_the_choice_by_rejection_is_that_by_sorting(seed, logits_BV, limit_B):
    scaled_BV, limit_B = np.array(logits_BV, np.float32), np.array(limit_B, np.int32)
    scaled_BV[:, 3] = np.maximum(scaled_BV[:, 3], 0.5)  # a row without any probable token has no choice to compare
    noise_BV = jax.random.gumbel(jax.random.key(seed), scaled_BV.shape)
    arguments = scaled_BV, noise_BV, limit_B, np.argmax(scaled_BV + noise_BV, axis=-1)
    by_sorting_B = sampling._by_sorting(*arguments, max_top_k=7)
    np.testing.assert_array_equal(jax.jit(sampling._by_rejection)(*arguments), by_sorting_B)


def test_rejection_ends_where_scores_are_not_finite():
    scaled_BV = jnp.array([[np.nan] * 5, [-np.inf] * 5, [1.0, np.nan, 2.0, -np.inf, 0.0]])
    arguments = scaled_BV, jnp.zeros((3, 5)), jnp.ones(3, jnp.int32), jnp.array([0, 0, 4])
    assert sampling._by_rejection(*arguments).tolist() == [0, 0, 2]


@pytest.mark.slow
def test_greedy_rows_do_not_keep_the_others_of_their_batch_from_being_sampled():
    keys_B, row_B = jax.random.split(jax.random.key(0), 200), jnp.arange(200)
    arguments = jnp.broadcast_to(LOGITS_V, (200, 5)), keys_B, (row_B % 2).astype(jnp.float32), jnp.zeros_like(row_B)
    found_B = np.array(sample_or_greedy(*arguments, max_top_k=0))
    np.testing.assert_array_equal(found_B, compiled(0)(*arguments))
    assert set(found_B[::2].tolist()) == {1} < set(found_B[1::2].tolist())


@pytest.mark.parametrize(("top_k", "room"), [((0,), 0), ((1,), 1), ((25,), 32), ((250, 0), 256), ((3, 64), 64)])
def test_top_k_capacity_is_a_power_of_two(top_k, room):
    assert top_k_capacity(*top_k) == room
