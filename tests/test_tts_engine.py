"""The loop that speaks: how it may be cut, batched and fed, and what it costs. Values are in tests/parity/test_tts.py.

Shape letters: B batch rows, R rows of the backbone, K streams (text first), Q codebooks, P frames of a prefix,
F frames, V vocabulary.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.errors import ConfigError
from dsm_jax.models.depformer import Depformer
from dsm_jax.models.lm import ZERO_TOKEN, DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.tts import engine, voices
from dsm_jax.tts.engine import Manner
from dsm_jax.tts.script import NEW_WORD, PAD, Entry
from dsm_jax.tts.words import WordMachine
from tests import small
from tests.speaking import Loop, Said, condition, join, tell

# A frame of 4 samples, as compiling is what these tests spend their time on.
SEANET = dataclasses.replace(small.MIMI.seanet, ratios=(2,))
WINDOW = 1000  # so long that one cache is larger than everything else in a step
CALMLY = Manner(
    machine=WordMachine(card=small.TTS.text_card + 1, second_stream_ahead=2, max_padding=6),
    delay_steps=3,
    codebooks=3,
    final_padding=5,
    temperature=0.8,
    top_k_text=6,
    top_k_audio=5,
)
# Greedy, and guided by the prefix.
STRICTLY = dataclasses.replace(CALMLY, codebooks=2, temperature=0.0, guidance=1.7, hide_text=False)
LAST = max(small.TTS.delays)
PREFIX_ROOM = (2, 4)
KEYS_B = jax.random.split(jax.random.key(7), 3)
ROUNDING = 1e-5  # of samples whose sums are in another order, as programs for other batches have it


@functools.cache
def build(window: int) -> tuple[DelayedStreamsLM, Mimi]:
    """A model that speaks and its codec, of one layer each; it often chooses words and padding."""
    lm_config = dataclasses.replace(
        small.TTS, context=window, num_layers=1, depformer=dataclasses.replace(small.TTS.depformer, num_layers=1)
    )
    transformer = dataclasses.replace(small.MIMI.transformer, context=window, num_layers=1)
    mimi_config = dataclasses.replace(small.MIMI, sample_rate=100, seanet=SEANET, transformer=transformer)
    lm = small.build(lambda rngs: DelayedStreamsLM(lm_config, rngs=rngs))
    lm.text_linear_DV[...] = lm.text_linear_DV[...].at[:, np.array([NEW_WORD, PAD])].mul(3.0)
    mimi = small.build(lambda rngs: Mimi(mimi_config, rngs=rngs))
    last = mimi.decoder.seanet.layers[-1]
    last.kernel_KCD[...], last.bias_D[...] = 0.25 * last.kernel_KCD[...], 0.25 * last.bias_D[...]
    return lm, mimi


@functools.cache
def calm(batch_size: int = 3) -> Loop:
    """One program for most tests: 12 steps a call at most."""
    return Loop(*build(WINDOW), CALMLY, batch_size, most=12)


@functools.cache
def strict() -> Loop:
    return Loop(*build(5), STRICTLY, 3, most=60)


def word(*tokens: int, padding: int = 0) -> Entry:
    return Entry(tokens, "word", padding)


PAUSE = Entry((), "", 4)
SCRIPTS = (
    [word(4, 5), word(6), PAUSE, word(7, 8, 9, padding=2), word(10), word(11, 12), PAUSE, word(13)],
    [word(14)],
    [word(15, 16), word(17), PAUSE, word(18), word(5)],
)


@functools.cache
def conditions(loop: Loop, rows: tuple[int, ...]):
    """What rows are told of their voices, which differ."""
    config = loop.lm.config
    given = [np.random.default_rng(row).normal(size=(2, 10)).astype(np.float32) for row in rows]
    told = voices.conditions(config, [[voice] for voice in given], 2.0)
    if loop.how.halves == 2:
        told = voices.without(*told, config)
    return condition(loop.lm, *told)


def told(loop: Loop, rows: tuple[int, ...] = (0, 1, 2), scripts=SCRIPTS, **more):
    """What these rows are told, each of its script, its voice and its key, in this order."""
    return tell([scripts[row] for row in rows], conditions(loop, rows), KEYS_B[np.array(rows)], **more)


@functools.cache
def whole() -> list[Said]:
    return calm().speak(told(calm()))


def prefix(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 12, (PREFIX_ROOM[0], (4, 0, 2)[row]))


def test_rows_of_a_batch_differ_and_are_not_constant():
    assert len({said.pcm_T.tobytes() for said in whole()}) == 3
    assert all(len(np.unique(said.frames_KF[1:4])) > 5 for said in whole())


@pytest.mark.parametrize("row", range(3))
def test_a_row_of_a_ragged_batch_is_as_alone(row):
    calm(1).speak(told(calm(1), (row,)))[0].like(whole()[row], atol=ROUNDING)


def test_a_row_depends_on_its_own_key_whatever_its_place():
    turned = calm().speak(told(calm(), (2, 0, 1)))
    for place, row in enumerate((2, 0, 1)):
        turned[place].like(whole()[row])
    other = dataclasses.replace(told(calm()), keys_B=KEYS_B.at[1].set(jax.random.key(8)))
    changed = calm().speak(other)
    changed[0].like(whole()[0])
    changed[2].like(whole()[2])
    assert changed[1].frames_KF.tobytes() != whole()[1].frames_KF.tobytes()


def test_a_guided_greedy_row_depends_on_its_own_script_and_prefix():
    together = strict().speak(told(strict(), prefixes=[prefix(row) for row in range(3)], room=PREFIX_ROOM))
    other = strict().speak(told(strict(), (1, 0, 1), prefixes=[prefix(row) for row in (1, 0, 1)], room=PREFIX_ROOM))
    other[1].like(together[0])
    other[0].like(together[1])
    other[2].like(together[1])
    for row, said in enumerate(together):
        length, late = prefix(row).shape[1], STRICTLY.delay_steps
        np.testing.assert_array_equal(said.frames_KF[1:3, late : late + length], prefix(row))
        np.testing.assert_array_equal(said.frames_KF[0, :length], ZERO_TOKEN)
        assert (said.frames_KF[0, length:] != ZERO_TOKEN).all()


@pytest.mark.parametrize("limits", [(1,), (5,), (12,), (3, 1, 7, 2)])
def test_calls_of_any_length_say_the_same(limits):
    for row, said in enumerate(calm().speak(told(calm()), itertools.cycle(limits))):
        said.like(whole()[row])


@pytest.mark.parametrize("limit", [2, 12])
def test_a_script_that_grows_is_said_as_the_whole(limit):
    state, parts, waits = calm().init(), [[], [], []], 0
    for known in [(0, 0, 0), (0, 1, 1), (2, 1, 3), (4, 1, 4), (5, 1, 5), None]:
        scripts = SCRIPTS if known is None else [script[:n] for script, n in zip(SCRIPTS, known, strict=True)]
        now = told(calm(), scripts=scripts, complete=None if known is None else [False, known[1] == 1, False])
        said, state = calm().go_on(now, state, itertools.repeat(limit))
        waits += known is not None and -1 in [said[0].end_step, said[2].end_step]
        for row in range(3):
            parts[row].append(said[row])
    assert waits == 5
    assert len({part.steps for part in parts[0]}) > 2, "the row went on in several of the rounds"
    for row in range(3):
        join(parts[row]).like(whole()[row])


def test_rows_that_have_ended_or_wait_are_untouched_while_another_runs():
    rows = told(calm(), scripts=(SCRIPTS[0], SCRIPTS[1], SCRIPTS[2][:3]), complete=[True, True, False])
    state = calm().init()
    while np.asarray(engine.running_B(CALMLY, rows, state))[1:].any():
        _, state = calm().go_on(rows, state, [1])
    assert (np.asarray(state.words.end_step_B) >= 0).tolist()[1:] == [True, False]
    before = jax.tree.map(np.array, state)
    _, after = calm().go_on(rows, state)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[1:], new[1:])
    assert int(after.lm.position_B[0]) > int(before.lm.position_B[0]) + 5


@pytest.mark.parametrize("row", range(3))
def test_a_row_stops_when_its_last_word_has_sounded(row):
    said, how = whole()[row], CALMLY
    assert said.steps == said.end_step + how.delay_steps + how.final_padding
    assert said.frames_KF.shape == (1 + small.TTS.n_q, said.steps - LAST)
    # The sound of the step in which a word begins is `delay_steps` later, and no frame of sound is left out.
    frames = said.frames_KF.shape[1] - how.delay_steps
    assert said.pcm_T.size == frames * calm().mimi.config.frame_size
    assert said.taken[-1] < said.end_step <= frames - (how.final_padding - LAST)
    sound_QF, late = said.frames_KF[1 : 1 + how.codebooks], how.delay_steps
    assert (sound_QF[:, :late] == ZERO_TOKEN).all()
    assert (sound_QF[:, late:] >= 0).all()
    assert (said.frames_KF[1 + how.codebooks :] == ZERO_TOKEN).all()


def test_samples_are_what_the_codec_makes_of_the_frames():
    codes_BQF = jnp.asarray(whole()[0].frames_KF[None, 1:4, CALMLY.delay_steps :])
    pcm_T = jnp.clip(jax.jit(calm().mimi.decode)(codes_BQF)[0, :, 0], -1, 1)
    np.testing.assert_allclose(whole()[0].pcm_T, pcm_T, rtol=0, atol=ROUNDING)
    assert 0 < (np.abs(pcm_T) == 1).mean() < 0.1


def test_the_bonus_of_padding_slows_its_own_row():
    slow, plain, _ = calm().speak(told(calm(), (0, 0, 2), bonus=[1000.0, 0.0, 0.0]))
    same_key = calm().speak(told(calm(), (0, 0, 2)))
    assert plain.taken == same_key[1].taken == same_key[0].taken == whole()[0].taken
    # Never chosen, the second word is ordered after `max_padding` steps without one.
    assert slow.taken[1] - slow.taken[0] == CALMLY.machine.max_padding + 1
    assert slow.end_step > plain.end_step


def test_scripts_of_ten_lengths_share_one_program():
    for length in range(1, 11):
        scripts = ([word(4, 5)] * length, [PAUSE] * length, [word(*range(4, 4 + length))])
        assert all(said.end_step > 0 for said in calm().speak(told(calm(), scripts=scripts)))
    assert calm().advance._cache_size() == 1


def test_nothing_leaves_or_enters_the_device_in_a_call():
    now, state, limit = told(calm()), calm().init(), jnp.int32(12)
    steps, state = calm().advance(calm().lm, calm().mimi, now, state, limit)
    with jax.transfer_guard("disallow"):
        steps, state = calm().advance(calm().lm, calm().mimi, now, state, limit)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            calm().advance(calm().lm, calm().mimi, now, state, np.int32(12))
    assert int(steps.count) == 12
    assert "callback" not in program().as_text()


def program():
    """The compiled loop; compiled once, as jax keeps it."""
    loop = calm()
    return loop.advance.lower(loop.lm, loop.mimi, told(loop), loop.init(), jnp.int32(1)).compile()


def test_the_state_is_updated_where_it_lies():
    memory, state = program().memory_analysis(), calm().init()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    caches = [*state.lm.caches, *state.codec.transformer.caches]
    assert memory.temp_size_in_bytes < min(cache.k_BKSH.nbytes for cache in caches)


def test_depformer_and_codec_rest_until_there_is_sound(monkeypatch):
    walks, decodes = [], []

    def walk(self, hidden_RD, text_R, choose, *, codebooks):
        jax.debug.callback(lambda: walks.append(1))
        return jnp.zeros((hidden_RD.shape[0], codebooks), jnp.int32)

    def decode_step(self, codes_BQT, state, active_B):
        jax.debug.callback(lambda: decodes.append(1))
        return jnp.zeros((codes_BQT.shape[0], self.config.frame_size, 1)), state

    monkeypatch.setattr(Depformer, "walk", walk)
    monkeypatch.setattr(Mimi, "decode_step", decode_step)
    loop = Loop(*build(5), CALMLY, 3, most=12)
    now, state, steps, late = told(loop), loop.init(), 0, CALMLY.delay_steps
    for limit in (late, 1, LAST - 1, 1, 4):
        _, state = loop.call(now, state, limit)
        jax.effects_barrier()
        steps += limit
        assert (len(walks), len(decodes)) == (max(steps - late, 0), max(steps - late - LAST, 0))


@pytest.mark.parametrize("codebooks", [0, 5])
def test_codebooks_that_the_model_does_not_make_are_refused(codebooks):
    how = dataclasses.replace(CALMLY, codebooks=codebooks)
    with pytest.raises(ConfigError, match=f"{codebooks} codebooks are to be generated; the model and its codec make 1"):
        engine.init_state(calm().lm, calm().mimi, how, 1)


def test_a_greedy_walk_takes_what_teacher_forcing_scores_highest():
    @jax.jit
    def pure(depformer, hidden_BD, text_B):
        def choose(_, logits_BV):
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

        tokens_BQ = depformer.walk(hidden_BD, text_B, choose, codebooks=4)
        heard_BK = jnp.concatenate([text_B[:, None], tokens_BQ, jnp.zeros((text_B.size, 2), jnp.int32)], axis=1)
        scores_BQV = depformer(hidden_BD[:, None], heard_BK[:, :, None])[:, :, 0]
        return tokens_BQ, scores_BQV, depformer.walk(hidden_BD, text_B, choose, codebooks=2)

    random = np.random.default_rng(0)
    hidden_BD = random.normal(size=(50, small.TTS.dim)).astype(np.float32)
    text_B = random.integers(-1, 21**2, 50).astype(np.int32)
    tokens_BQ, scores_BQV, two_BQ = pure(calm().lm.depformer, hidden_BD, text_B)
    assert len(np.unique(tokens_BQ)) > 6
    np.testing.assert_array_equal(tokens_BQ, np.argmax(scores_BQV, axis=-1))
    np.testing.assert_array_equal(two_BQ, tokens_BQ[:, :2])


def test_noise_is_of_the_row_the_step_and_the_stream():
    now = dataclasses.replace(told(calm()), keys_B=jax.random.split(jax.random.key(0), 300))
    draw = jax.jit(lambda stream, step_B: engine._choose(jnp.zeros((300, 9)), now, step_B, stream, 1.0, 0))
    step_B = jnp.arange(300) % 2
    drawn_B = np.asarray(draw(1, step_B))
    np.testing.assert_array_equal(draw(1, step_B), drawn_B)
    for other_B in (draw(2, step_B), draw(1, step_B + 1), np.roll(drawn_B, 2)):
        # Of unrelated draws one in nine is equal: 33, within five standard deviations of 5.4.
        assert 6 < (np.asarray(other_B) == drawn_B).sum() < 61
