"""Quantisation against a search in numpy. test_goldens.py compares its codes with the reference's.

Shape letters: B batch rows, T frames, N vectors, D latent width, C codebook width, L entries, Q codebooks.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.configs import QuantizerConfig
from dsm_jax.nn.rvq import Codebook, SplitQuantizer
from tests.helpers import small

CONFIG = small.MIMI.quantizer


@pytest.fixture(scope="module")
def quantizer() -> SplitQuantizer:
    return small.build(lambda rngs: SplitQuantizer(CONFIG, rngs=rngs))


@pytest.fixture(scope="module")
def latents_BTD() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32)


@pytest.mark.slow
def test_nearest_returns_the_entry_at_the_least_distance():
    book = Codebook(32, 4, rngs=nnx.Rngs(0))
    x_NC = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    distance_NL = np.linalg.norm(x_NC[:, None] - np.array(book.embedding_LC[...]), axis=2)
    np.testing.assert_array_equal(book.nearest(jnp.asarray(x_NC)), distance_NL.argmin(1))


def test_of_equally_distant_entries_the_first_is_nearest():
    book = Codebook(4, 2, rngs=nnx.Rngs(0))
    book.embedding_LC[...] = jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert book.nearest(jnp.array([[0.0, 3.0], [0.0, 0.0], [0.5, 0.5]])).tolist() == [1, 1, 1]


@pytest.mark.slow
def test_each_codebook_quantises_the_residual_of_those_before_it(quantizer, latents_BTD):
    codes_BQT = np.array(quantizer.encode(latents_BTD, 4))
    assert codes_BQT.dtype == np.int32
    assert codes_BQT.shape == (2, 4, 7)
    for branch, codes in ((quantizer.semantic, codes_BQT[:, :1]), (quantizer.acoustic, codes_BQT[:, 1:])):
        rest_BTC = latents_BTD @ np.array(branch.input_proj.weight[...]).T
        for q, book in enumerate(branch.codebooks):
            entries_LC = np.array(book.embedding_LC[...])
            distance_BTL = np.linalg.norm(rest_BTC[:, :, None] - entries_LC, axis=3)
            np.testing.assert_array_equal(codes[:, q], distance_BTL.argmin(2))
            rest_BTC = rest_BTC - entries_LC[codes[:, q]]


@pytest.mark.parametrize("codebooks", [1, 2, 3])
def test_fewer_codebooks_give_the_first_codes_of_all(quantizer, latents_BTD, codebooks):
    codes_BQT = quantizer.encode(latents_BTD, 4)
    np.testing.assert_array_equal(quantizer.encode(latents_BTD, codebooks), codes_BQT[:, :codebooks])


@pytest.mark.parametrize("codebooks", [1, 2, 4])
def test_decoding_sums_the_entries_of_each_branch(quantizer, codebooks):
    codes_BQT = np.random.default_rng(0).integers(0, CONFIG.bins, size=(2, codebooks, 5))
    wanted = 0
    for q in range(codebooks):
        branch, book = (quantizer.semantic, q) if q < 1 else (quantizer.acoustic, q - 1)
        entries_BTC = np.array(branch.codebooks[book].embedding_LC[...])[codes_BQT[:, q]]
        wanted = wanted + entries_BTC @ np.array(branch.output_proj.weight[...]).T
    np.testing.assert_allclose(quantizer.decode(jnp.asarray(codes_BQT)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_semantic_codebooks_form_one_residual_chain():
    config = QuantizerConfig(dimension=4, n_q=3, n_q_semantic=2, bins=8, input_dimension=6, output_dimension=6)
    quantizer = small.build(lambda rngs: SplitQuantizer(config, rngs=rngs))
    assert (len(quantizer.semantic.codebooks), len(quantizer.acoustic.codebooks)) == (2, 1)
    x_BTD = np.random.default_rng(0).normal(size=(1, 5, 6)).astype(np.float32)
    codes_BQT = quantizer.encode(x_BTD, 3)
    np.testing.assert_array_equal(codes_BQT[:, :2], quantizer.semantic.encode(x_BTD, 2))
    np.testing.assert_array_equal(codes_BQT[:, 2:], quantizer.acoustic.encode(x_BTD, 1))
