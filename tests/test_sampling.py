"""Choosing tokens. That the reference chooses the same, given the same noise, is in tests/parity/test_modules.py.

Shape letters: B batch rows, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.nn.sampling import sample

LOGITS_V = np.log([0.1, 0.4, 0.05, 0.3, 0.15]).astype(np.float32)


@functools.cache
def draws(temperature: float, top_k: int) -> np.ndarray:
    keys_B = jax.random.split(jax.random.key(0), 20_000)
    logits_BV = jnp.broadcast_to(LOGITS_V, (20_000, 5))
    return np.array(jax.jit(lambda x, keys: sample(x, keys, temperature=temperature, top_k=top_k))(logits_BV, keys_B))


def test_without_temperature_the_best_token_is_taken_and_of_equals_the_first():
    tokens_B = sample(jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 1.0]]))
    assert tokens_B.tolist() == [1, 0]
    assert tokens_B.dtype == jnp.int32


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.0, 5), (1.0, 9), (0.5, 0), (2.0, 3), (1.0, 1)])
def test_tokens_come_as_often_as_they_should(temperature, top_k):
    probability_V = np.exp(LOGITS_V) ** (1 / temperature)
    if 0 < top_k < 5:
        probability_V[np.argsort(-probability_V)[top_k:]] = 0
    probability_V /= probability_V.sum()
    share_V = np.bincount(draws(temperature, top_k), minlength=5) / 20_000
    # Five standard deviations of a share of 20,000 draws; a token outside the k best never comes.
    assert (np.abs(share_V - probability_V) <= 5 * np.sqrt(probability_V * (1 - probability_V) / 20_000)).all()
    assert draws(temperature, top_k).dtype == np.int32


def test_of_equally_probable_tokens_the_first_are_among_the_best():
    keys_B = jax.random.split(jax.random.key(0), 200)
    tokens_B = sample(jnp.zeros((200, 6)), keys_B, temperature=1.0, top_k=2)
    assert set(np.array(tokens_B).tolist()) == {0, 1}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), row=st.integers(0, 2))
def test_a_row_draws_the_same_alone_and_in_a_batch(seed, row):
    logits_BV = jax.random.normal(jax.random.key(1), (3, 7))
    keys_B = jax.random.split(jax.random.key(seed), 3)
    together = sample(logits_BV, keys_B, temperature=0.8, top_k=4)
    alone = sample(logits_BV[row : row + 1], keys_B[row : row + 1], temperature=0.8, top_k=4)
    assert together[row] == alone[0]


def test_chance_needs_keys():
    with pytest.raises(
        ValueError, match=r"a temperature of 0\.7 needs one PRNG key per row; pass keys_B, or temperature 0"
    ):
        sample(jnp.zeros((1, 3)), temperature=0.7)
