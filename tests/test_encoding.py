"""The codec's encoder of training."""

import jax
import numpy as np
from flax import nnx

from dsm_jax.models.mimi import Mimi
from dsm_jax.training.encoding import encoder
from tests.helpers import small


def test_the_parameters_are_converted_once_for_all_batches(monkeypatch):
    mimi = small.build(lambda rngs: Mimi(small.MIMI, rngs=rngs))
    converted, convert = [], nnx.to_pure_dict
    monkeypatch.setattr(nnx, "to_pure_dict", lambda params: converted.append(params) or convert(params))
    encode = encoder(*nnx.split(mimi), 2)
    for seed in range(2):
        pcm_BTC = jax.random.normal(jax.random.key(seed), (2, 3 * small.MIMI.frame_size, 1))
        np.testing.assert_array_equal(encode(pcm_BTC), mimi.encode(pcm_BTC, codebooks=2))
    assert len(converted) == 1
