"""Options: numbers of every kind that they take, and those that they refuse."""

import jax
import numpy as np
import pytest

from dsm_jax.csm import CsmOptions
from dsm_jax.errors import ConfigError
from dsm_jax.nn.sampling import key_of
from dsm_jax.stt import TranscribeOptions
from dsm_jax.tts import SynthesizeOptions

KINDS = (TranscribeOptions, SynthesizeOptions, CsmOptions)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_integers_are_integers(kind):
    options = kind(top_k=np.int64(20), seed=np.uint32(7))
    assert options == kind(top_k=20, seed=7)
    assert (type(options.top_k), type(options.seed)) == (int, int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", 2**31, "top_k is 2147483648; expected a number of less than 32 bits"),
        ("top_k", 2.5, "top_k is 2.5; expected a whole number"),
        ("seed", "x", "seed is 'x'; expected a whole number"),
        ("seed", 2**63, "the seed is 9223372036854775808; expected a number of 64 bits"),
    ],
)
def test_numbers_that_the_programs_cannot_hold_are_refused(kind, name, value, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        kind(**{name: value})


@pytest.mark.parametrize("name", ["max_frames", "max_padding", "initial_padding", "final_padding", "padding_between"])
def test_counts_of_frames_have_a_limit(name):
    with pytest.raises(ConfigError, match=f"^{name} is 3000000000; expected a number of less than 32 bits$"):
        SynthesizeOptions(**{name: 3_000_000_000})


def test_every_bit_of_a_seed_counts():
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, -1, -(2**63))
    assert len({key_of(seed).tobytes() for seed in seeds}) == len(seeds)
    for seed in (0, 1, 77, 2**32 - 1):
        np.testing.assert_array_equal(key_of(seed), jax.random.PRNGKey(seed))
