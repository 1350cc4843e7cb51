"""The language model: embeddings, delays, heads, masks. test_goldens.py compares its outputs with the reference.

Shape letters: B batch rows, T steps, M streams, Q audio streams, V vocabulary, D model width.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.errors import StreamError
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.streams import TokenRing, behind_text, delay, initial_tokens, inputs_of, undelay
from dsm_jax.nn.embedding import TokenEmbedding
from tests.helpers import small
from tests.helpers.check import check_in_place


@functools.cache
def stt() -> DelayedStreamsLM:
    return small.build(lambda rngs: DelayedStreamsLM(small.STT, rngs=rngs))


def tokens(steps: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 12, size=(2, 4, steps)).astype(np.int32)


@pytest.mark.slow
def test_an_absent_token_adds_exactly_nothing():
    lm, codes_BMT = stt(), tokens(3)
    np.testing.assert_array_equal(lm.embed(jnp.full((1, 4, 2), -1)), np.zeros((1, 2, 16)))
    for stream in range(4):
        only_BMT = np.where(np.arange(4)[None, :, None] == stream, codes_BMT, -1)
        table_LD = lm.text_emb.table_LW[...] if stream == 0 else lm.audio_emb.table_QLW[stream - 1]
        np.testing.assert_array_equal(lm.embed(only_BMT), np.array(table_LD)[codes_BMT[:, stream]])


def test_the_embedding_is_the_sum_over_streams():
    lm, codes_BMT = stt(), tokens(3)
    wanted_BTD = np.array(lm.text_emb.table_LW[...])[codes_BMT[:, 0]]
    for q in range(3):
        wanted_BTD = wanted_BTD + np.array(lm.audio_emb.table_QLW[q])[codes_BMT[:, q + 1]]
    np.testing.assert_allclose(lm.embed(codes_BMT), wanted_BTD, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_low_rank_embedding_projects_the_rows_of_its_table(rank):
    embedding = small.build(lambda rngs: TokenEmbedding(9, 6, rank=rank, rngs=rngs))
    found = embedding(jnp.array([[4, -1, 0]]))
    rows = np.array(embedding.table_LW[...])[[4, 0, 0]]
    rows = rows if embedding.low_rank is None else rows @ np.array(embedding.low_rank.weight[...]).T
    np.testing.assert_allclose(found[0], rows * [[1], [0], [1]], atol=1e-6)
    assert not np.any(found[0, 1])


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 8), second=st.integers(-1, 8), absent=st.booleans(), rank=st.sampled_from([None, 3]))
def test_a_folded_token_is_embedded_as_two_tokens(first, second, absent, rank):
    embedding = demuxed(rank)
    token = -1 if absent else (second + 1) * 9 + first
    table = np.array(embedding.table_LW[...])
    wanted = table[first] @ np.array(embedding.first.weight[...]).T
    if second >= 0:
        wanted = wanted + table[second] @ np.array(embedding.second.weight[...]).T
    np.testing.assert_allclose(embedding(jnp.array([token]))[0], 0 * wanted if absent else wanted, atol=1e-6)


@functools.cache
def demuxed(rank: int | None) -> TokenEmbedding:
    return small.build(lambda rngs: TokenEmbedding(9, 6, rank=rank, demux=True, rngs=rngs))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(delays=st.lists(st.integers(0, 6), min_size=3, max_size=3), steps=st.sampled_from([1, 4]))
def test_delaying_shifts_each_stream_right_and_undelaying_brings_it_back(delays, steps):
    M = 3
    codes_BMT = np.arange(2 * M * steps).reshape(2, M, steps)
    initial_M = np.arange(M) - 100
    delayed_BMT = np.array(delay(jnp.asarray(codes_BMT), jnp.asarray(initial_M), tuple(delays)))
    for k, by in enumerate(delays):
        for t in range(steps):
            wanted = codes_BMT[:, k, t - by] if t >= by else [initial_M[k]] * 2
            np.testing.assert_array_equal(delayed_BMT[:, k, t], wanted)
    back_BMT, valid_MT = undelay(jnp.asarray(delayed_BMT, jnp.float32)[..., None], tuple(delays))
    np.testing.assert_array_equal(valid_MT, [[t + by < steps for t in range(steps)] for by in delays])
    np.testing.assert_array_equal(back_BMT[..., 0], np.where(valid_MT, codes_BMT, 0))


def test_audio_behind_its_text_is_absent_first_and_cut_at_the_end():
    assert behind_text(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), 2).tolist() == [[-1, -1, 1, 2], [-1, -1, 5, 6]]
    assert behind_text(np.array([[1, 2]]), 3).tolist() == [[-1, -1]]


@pytest.mark.slow
def test_the_ring_feeds_the_tokens_of_a_delayed_clip():
    config, codes_BMT, initial_M = small.STT, tokens(9), initial_tokens(small.STT)
    last = max(config.delays)
    delayed_BMT = delay(jnp.asarray(codes_BMT), initial_M, config.delays)
    wanted_BMT = inputs_of(delayed_BMT, initial_M)
    spoken = heard = TokenRing.empty(config, 2)
    one_B = jnp.ones(2, jnp.int32)
    for t in range(9):
        step_B, now = jnp.full((2,), t), slice(t, t + 1)
        np.testing.assert_array_equal(spoken.inputs(step_B[:, None], config), wanted_BMT[:, :, now])
        spoken = spoken.with_made(delayed_BMT[:, :, now], step_B, one_B)
        at_once = TokenRing.after(delayed_BMT, step_B + 1, config)
        np.testing.assert_array_equal(
            at_once.inputs(step_B[:, None] + 1, config), spoken.inputs(step_B[:, None] + 1, config)
        )
        if t >= last:
            for ring in (spoken, at_once):
                np.testing.assert_array_equal(ring.newest_frame(step_B, config), codes_BMT[:, :, t - last])
        if t:
            heard = heard.with_frames(jnp.asarray(codes_BMT[:, 1:, t - 1 : t]), step_B - 1, one_B, config)
        np.testing.assert_array_equal(heard.inputs(step_B[:, None], config), wanted_BMT[:, :, now])
        heard = heard.with_made(delayed_BMT[:, :1, now], step_B, one_B)


@pytest.mark.slow
def test_the_ring_feeds_several_steps_at_once_to_rows_that_keep_different_numbers_of_them():
    config, codes_BMT = small.STT, jnp.asarray(tokens(15))
    delayed_BMT = delay(codes_BMT, initial_tokens(config), config.delays)
    wanted_BMT = inputs_of(delayed_BMT, initial_tokens(config))
    four, one_B = np.arange(4), jnp.ones(2, jnp.int32)
    ring, step_B = TokenRing.empty(config, 2, ahead=4).with_made(delayed_BMT[:, :1, :1], 0 * one_B, one_B), one_B
    for taken in ([4, 1], [1, 3], [0, 4], [4, 0], [0, 1]):
        step_B4 = np.array(step_B)[:, None] + four
        frames_BQ4 = jnp.stack([codes_MT[1:, steps - 1] for codes_MT, steps in zip(codes_BMT, step_B4, strict=True)])
        ring = ring.with_frames(frames_BQ4, step_B - 1, 4 * one_B, config)
        found_BM4 = ring.inputs(jnp.asarray(step_B4), config)
        for row, steps in enumerate(step_B4):
            np.testing.assert_array_equal(found_BM4[row, 1:], wanted_BMT[row, 1:, steps].T)
            assert found_BM4[row, 0, 0] == wanted_BMT[row, 0, steps[0]]
        text_B14 = jnp.stack([delayed_MT[:1, steps] for delayed_MT, steps in zip(delayed_BMT, step_B4, strict=True)])
        before, ring = ring, ring.with_made(text_B14, step_B, jnp.array(taken))
        for row in np.flatnonzero(np.equal(taken, 0)):
            np.testing.assert_array_equal(ring.tokens_BMS[row], before.tokens_BMS[row])
        step_B = step_B + jnp.array(taken)


@pytest.mark.slow
def test_the_forward_pass_equals_single_steps():
    lm, codes_BMT = stt(), tokens(13)
    codes_BMT[0, 2, 5] = codes_BMT[1, 0, 4] = -1
    output = jax.jit(lm.__call__)(codes_BMT)

    def one(column_BM1, state):
        hidden_B1D, state = lm.step(column_BM1, state)
        return lm.text_logits(hidden_B1D), state

    step, state, fed_BM1, logits = jax.jit(one), lm.init_state(2), np.tile(lm.initial_M, (2, 1))[..., None], []
    for t in range(13):
        y_B1V, state = step(fed_BM1.astype(np.int32), state)
        logits.append(y_B1V)
        late = [codes_BMT[:, k, t - by] if t >= by else fed_BM1[:, k, 0] for k, by in enumerate(small.STT.delays)]
        fed_BM1 = np.stack(late, axis=1)[..., None]
    # The text's delay is 2: frame t is predicted in step t + 2, and the last two frames are never predicted.
    np.testing.assert_allclose(output.text_logits_BTV[:, :11], np.concatenate(logits[2:], axis=1), atol=1e-5)
    assert not np.any(output.text_logits_BTV[:, 11:])
    mask_BT = np.ones((2, 13), bool)
    mask_BT[:, 11:] = mask_BT[1, 4] = False
    np.testing.assert_array_equal(output.text_mask_BT, mask_BT)
    assert output.audio_logits_BQTV is output.audio_mask_BQT is None


def test_every_stream_has_an_initial_token():
    assert stt().initial_M.tolist() == [20, 12, 12, 12]
    assert stt().initial_M.dtype == jnp.int32


@pytest.mark.slow
def test_heads_score_in_float32():
    lm = stt()
    hidden_BTD = jax.random.normal(jax.random.key(0), (2, 3, 16))
    wanted = np.array(hidden_BTD) @ np.array(lm.text_linear.weight[...]).T + np.array(lm.text_linear.bias_V[...])
    np.testing.assert_allclose(lm.text_logits(hidden_BTD), wanted, atol=1e-5)
    probability_BTPO = lm.extra_probabilities(hidden_BTD)
    score = np.stack([np.array(hidden_BTD) @ np.array(lm.extra_heads.weight[p]).T for p in range(4)], axis=2)
    np.testing.assert_allclose(probability_BTPO, np.exp(score) / np.exp(score).sum(-1, keepdims=True), atol=1e-6)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), lm)
    assert low.text_logits(hidden_BTD.astype(jnp.bfloat16)).dtype == jnp.float32
    assert low.extra_probabilities(hidden_BTD.astype(jnp.bfloat16)).dtype == jnp.float32


def test_a_model_without_extra_heads_has_no_extra_probabilities():
    config = dataclasses.replace(small.STT, extra_heads_num_heads=0, bias_proj=False)
    lm = small.build(lambda rngs: DelayedStreamsLM(config, rngs=rngs))
    assert lm.extra_heads is None
    assert not lm.text_linear.bias
    assert lm.extra_probabilities(jnp.zeros((2, 3, 16))).shape == (2, 3, 0, 6)


@pytest.mark.slow
def test_the_forward_pass_has_finite_gradients_in_every_weight():
    config = dataclasses.replace(small.STT, extra_heads_num_heads=0)
    graphdef, params = nnx.split(small.build(lambda rngs: DelayedStreamsLM(config, rngs=rngs)))
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)

    def loss(params, codes_BMT):
        output = nnx.merge(graphdef, params)(codes_BMT)
        score_BT = jnp.take_along_axis(jax.nn.log_softmax(output.text_logits_BTV), codes_BMT[:, 0, :, None], axis=2)
        return -jnp.where(output.text_mask_BT, score_BT[..., 0], 0).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, tokens(5))
    assert np.isfinite(value)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(np.asarray(gradient, np.float32)).all(), path
        assert np.asarray(gradient, np.float32).any(), path


def test_another_number_of_streams_is_refused():
    message = "the model got 3 streams; it has 4: text, then 3 of audio, [batch, streams, steps]"
    with pytest.raises(StreamError, match=re.escape(message)):
        stt().step(jnp.zeros((1, 3, 1), jnp.int32), stt().init_state(1))


@pytest.mark.slow
def test_a_step_updates_its_caches_in_place():
    config = dataclasses.replace(small.STT, context=8192)
    lm = small.build(lambda rngs: DelayedStreamsLM(config, rngs=rngs))
    check_in_place(lm.step, jnp.zeros((2, 4, 1), jnp.int32), lm.init_state(2))
