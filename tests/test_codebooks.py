"""Training of codebooks by moving averages against numpy: chosen entries, gradients, and updates of entries.

Shape letters: B batch rows, T frames, N vectors, D latent width, C codebook width, L entries, Q codebooks of a branch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.nn.rvq import ResidualQuantizer, SplitQuantizer
from dsm_jax.training.codebooks import Averages, CodebookRule, Quantized, init_averages, quantize, set_entries
from tests.helpers import small

CONFIG = small.MIMI.quantizer
Q, B, T = 3, 4, 6
STAY = CodebookRule(decay=0.9, dead=0.0)  # no entry is ever dead
ALL_B = np.full(B, Q, np.int32)


@pytest.fixture
def branch() -> ResidualQuantizer:
    return small.build(lambda rngs: ResidualQuantizer(Q, CONFIG, rngs=rngs))


def latents(seed: int, rows: int = B) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, T, CONFIG.input_dimension)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _quantize(graph, params, x_BTD, averages, rule, used_B, key) -> Quantized:
    return quantize(nnx.merge(graph, params), x_BTD, averages, rule, used_B, key)


def run(branch, x_BTD, averages=None, rule=STAY, used_B=ALL_B, seed=0) -> Quantized:
    averages = init_averages(branch, fresh=False) if averages is None else averages
    return _quantize(*nnx.split(branch), x_BTD, averages, rule, used_B, jax.random.PRNGKey(seed))


def rounded(branch: ResidualQuantizer, x_BTD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute each codebook's input [Q, N, C], codes [Q, N] and entries [Q, N, C] with `encode`."""
    codes_QN = np.asarray(branch.encode(x_BTD, Q)).swapaxes(0, 1).reshape(Q, -1)
    entries_QNC = np.stack(
        [np.asarray(b.embedding_LC[...])[c] for b, c in zip(branch.codebooks, codes_QN, strict=True)]
    )
    x_NC = (x_BTD @ np.asarray(branch.input_proj.weight[...]).T).reshape(codes_QN.shape[1], -1)
    return x_NC - np.cumsum(entries_QNC, axis=0) + entries_QNC, codes_QN, entries_QNC


@pytest.mark.slow
def test_vectors_are_the_entries_that_encoding_chooses(branch):
    x_BTD = latents(0)
    _, _, entries_QNC = rounded(branch, x_BTD)
    np.testing.assert_allclose(run(branch, x_BTD).vectors_BTC.reshape(B * T, -1), entries_QNC.sum(0), atol=1e-5)


@pytest.mark.slow
def test_rows_that_are_limited_to_some_codebooks_decode_as_those_codes_do(branch):
    used_B, x_BTD = np.arange(B, dtype=np.int32), latents(0)
    found_BTD = np.asarray(run(branch, x_BTD, used_B=used_B).vectors_BTC) @ np.asarray(branch.output_proj.weight[...]).T
    codes_BQT = branch.encode(x_BTD, Q)
    assert not found_BTD[0].any(), "no codebook at all is silence"
    for row in range(1, B):
        wanted_1TD = branch.decode(codes_BQT[row : row + 1, : used_B[row]])
        np.testing.assert_allclose(found_BTD[row : row + 1], wanted_1TD, atol=1e-5)


def test_gradients_are_straight_through(branch):
    graph, params = nnx.split(branch)
    x_BTD, weight_BTC = latents(0), np.random.default_rng(1).normal(size=(B, T, CONFIG.dimension)).astype(np.float32)
    averages, used_B, key = init_averages(branch, fresh=False), np.arange(B), jax.random.PRNGKey(0)

    def through(params, x_BTD):
        return jnp.sum(quantize(nnx.merge(graph, params), x_BTD, averages, STAY, used_B, key).vectors_BTC * weight_BTC)

    def plain(params, x_BTD):
        return jnp.sum((x_BTD @ nnx.merge(graph, params).input_proj.weight[...].T) * weight_BTC)

    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, x_BTD) for f in (through, plain))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_commitment_is_the_mean_squared_distance_to_the_entries_in_use(branch):
    x_BTD, used_B = latents(0), np.array([1, 3, 2, 3], np.int32)
    given_QNC, _, entries_QNC = rounded(branch, x_BTD)
    in_use_QN = np.arange(Q)[:, None] < np.repeat(used_B, T)
    wanted = ((given_QNC - entries_QNC) ** 2).mean(2)[in_use_QN].mean()
    assert float(run(branch, x_BTD, used_B=used_B).commitment) == pytest.approx(wanted, rel=1e-5)


def test_the_commitment_of_a_batch_without_codebooks_is_zero(branch):
    found = run(branch, latents(0), used_B=np.zeros(B, np.int32))
    assert float(found.commitment) == 0
    np.testing.assert_allclose(found.entries_QLC, [book.embedding_LC[...] for book in branch.codebooks], rtol=1e-6)


def test_commitment_draws_latents_to_their_entries(branch):
    graph, params = nnx.split(branch)
    averages, key = init_averages(branch, fresh=False), jax.random.PRNGKey(0)
    x_BTD = latents(0)
    one_B = np.ones(B, np.int32)

    def commitment(x_BTD):
        return quantize(nnx.merge(graph, params), x_BTD, averages, STAY, one_B, key).commitment

    given_QNC, _, entries_QNC = rounded(branch, x_BTD)
    pull_NC = 2 * (given_QNC[0] - entries_QNC[0]) / given_QNC[0].size
    wanted_BTD = (pull_NC @ np.asarray(branch.input_proj.weight[...])).reshape(x_BTD.shape)
    np.testing.assert_allclose(jax.jit(jax.grad(commitment))(x_BTD), wanted_BTD, atol=1e-6)


@pytest.mark.slow
def test_entries_are_moving_averages_of_the_vectors_that_were_rounded_to_them(branch):
    used_B = np.array([3, 1, 2, 3], np.int32)
    averages = init_averages(branch, fresh=False)
    usage_QL, sum_QLC = (np.asarray(a, np.float64) for a in (averages.usage_QL, averages.sum_QLC))
    for step in range(4):
        x_BTD = latents(step)
        given_QNC, codes_QN, _ = rounded(branch, x_BTD)
        for q in range(Q):
            in_use_N = np.repeat(used_B, T) > q
            for v in range(CONFIG.bins):
                mine_NC = given_QNC[q][in_use_N & (codes_QN[q] == v)]
                usage_QL[q, v] = 0.9 * usage_QL[q, v] + 0.1 * len(mine_NC)
                sum_QLC[q, v] = 0.9 * sum_QLC[q, v] + 0.1 * mine_NC.sum(0)
        found = run(branch, x_BTD, averages, used_B=used_B, seed=step)
        averages = found.averages
        np.testing.assert_allclose(averages.usage_QL, usage_QL, rtol=1e-5)
        np.testing.assert_allclose(averages.sum_QLC, sum_QLC, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.entries_QLC, sum_QLC / usage_QL[..., None], rtol=1e-4, atol=1e-5)
        for book, entries_LC in zip(branch.codebooks, found.entries_QLC, strict=True):
            book.embedding_LC[...] = entries_LC


def test_rows_that_do_not_use_a_codebook_do_not_move_it(branch):
    used_B = np.array([3, 2, 2, 0], np.int32)
    x_BTD = latents(0)
    other_BTD = np.concatenate([x_BTD[:3], latents(9, rows=1)])
    one, two = (run(branch, x, used_B=used_B) for x in (x_BTD, other_BTD))
    np.testing.assert_array_equal(one.entries_QLC, two.entries_QLC)
    np.testing.assert_array_equal(one.averages.sum_QLC, two.averages.sum_QLC)
    alone = run(branch, x_BTD, used_B=np.array([3, 0, 0, 0], np.int32))
    np.testing.assert_allclose(one.entries_QLC[2], alone.entries_QLC[2], atol=1e-6)
    assert not np.allclose(one.entries_QLC[1], alone.entries_QLC[1], atol=1e-3)


@pytest.mark.slow
def test_a_dead_entry_is_reset_to_a_vector_of_the_batch_and_other_entries_are_kept(branch):
    dead_QL = np.random.default_rng(0).random((Q, CONFIG.bins)) < 0.5
    averages = init_averages(branch, fresh=False)
    usage_QL = jnp.where(dead_QL, 1e-6, 1.0)
    averages = Averages(usage_QL, averages.sum_QLC * usage_QL[..., None])
    x_BTD = latents(0)
    given_QNC, codes_QN, _ = rounded(branch, x_BTD)
    rule = CodebookRule(decay=0.9, dead=0.05)
    found, stayed = run(branch, x_BTD, averages, rule), run(branch, x_BTD, averages)
    for q in range(Q):
        chosen_L = np.isin(np.arange(CONFIG.bins), codes_QN[q])
        replaced_L = dead_QL[q] & ~chosen_L  # one choice lifts an entry by 0.1
        assert 0 < replaced_L.sum() < CONFIG.bins
        distance_LN = np.abs(np.asarray(found.entries_QLC[q])[:, None] - given_QNC[q]).max(2)
        np.testing.assert_array_equal(distance_LN.min(1)[replaced_L] < 1e-5, True)
        assert len(set(distance_LN.argmin(1)[replaced_L].tolist())) > 1, "not all at the same vector"
        np.testing.assert_array_equal(found.entries_QLC[q][~replaced_L], stayed.entries_QLC[q][~replaced_L])
        assert (found.averages.usage_QL[q] > rule.dead).all(), "it has time to be chosen"
    other = run(branch, x_BTD, averages, rule, seed=1)
    assert not np.array_equal(other.entries_QLC, found.entries_QLC), "the key chooses"


@pytest.mark.slow
def test_averages_begin_at_the_entries_or_at_the_first_batch(branch):
    averages = init_averages(branch, fresh=False)
    for q, book in enumerate(branch.codebooks):
        np.testing.assert_array_equal(averages.sum_QLC[q] / averages.usage_QL[q][:, None], book.embedding_LC[...])
    x_BTD = latents(0)
    given_QNC, codes_QN, _ = rounded(branch, x_BTD)
    found = run(branch, x_BTD, init_averages(branch, fresh=True), CodebookRule())
    for q in range(Q):
        for v, entry_C in enumerate(np.asarray(found.entries_QLC[q])):
            mine_NC = given_QNC[q][codes_QN[q] == v]
            distances = np.abs(given_QNC[q] - entry_C).max(1)
            mean = np.abs(mine_NC.mean(0) - entry_C).max() if len(mine_NC) else np.inf
            assert min(mean, distances.min()) < 1e-5


def test_perplexity_is_the_number_of_entries_in_effective_use(branch):
    book_LC = np.asarray(branch.codebooks[0].embedding_LC[...])
    branch.input_proj.weight[...] = jnp.eye(CONFIG.dimension, CONFIG.input_dimension)
    for entries in (1, 2, 4):
        x_NC = np.tile(book_LC[:entries], (B * T // entries, 1))
        x_BTD = np.pad(x_NC, ((0, 0), (0, CONFIG.input_dimension - CONFIG.dimension))).reshape(B, T, -1)
        assert float(run(branch, x_BTD).perplexity_Q[0]) == pytest.approx(entries, rel=1e-4)


def test_entries_are_put_into_their_branches():
    quantizer = small.build(lambda rngs: SplitQuantizer(CONFIG, rngs=rngs))
    shape = (CONFIG.bins, CONFIG.dimension)
    semantic_QLC, acoustic_QLC = jnp.full((1, *shape), 7.0), jnp.arange(3.0)[:, None, None] * jnp.ones(shape)
    set_entries(quantizer, semantic_QLC, acoustic_QLC)
    assert [float(book.embedding_LC[0, 0]) for book in quantizer.semantic.codebooks] == [7.0]
    assert [float(book.embedding_LC[-1, -1]) for book in quantizer.acoustic.codebooks] == [0.0, 1.0, 2.0]
