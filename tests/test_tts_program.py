"""The loop that speaks: how it may be cut, batched and fed, and what it costs. Values are in tests/parity/test_tts.py.

Shape letters: B slots, R rows of the backbone, K streams (text first), Q codebooks, P frames of a prefix, F frames, V
vocabulary.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.models.depformer import WALK_GROUP, Depformer
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.runtime.compile import compilations
from dsm_jax.runtime.steps import Leave, step_limits
from dsm_jax.tts import host, program
from dsm_jax.tts.host import SpeechRequest
from dsm_jax.tts.script import NEW_WORD, PAD, Entry
from dsm_jax.tts.state import TtsSettings
from dsm_jax.tts.words import WordMachine
from tests.helpers import small
from tests.helpers.optimized import compile_optimized
from tests.helpers.speaking import Loop, Said, join, steps_B

pytestmark = pytest.mark.slow

# A frame of 4 samples, as compiling is what these tests spend their time on.
SEANET = dataclasses.replace(small.MIMI.seanet, ratios=(2,))
WINDOW = 1000  # so long that one cache is larger than everything else in a step
DELAY_STEPS, CODEBOOKS, FINAL_PADDING, MAX_PADDING = 3, 3, 5, 6
CALMLY = TtsSettings(
    slots=3, machine=WordMachine(card=small.TTS.text_card + 1, second_stream_ahead=2), delay_steps=DELAY_STEPS, steps=12
)
# Guided by the prefix.
STRICTLY = dataclasses.replace(CALMLY, guided=True, uncond_drops_text=False, steps=60)
LAST = max(small.TTS.delays)
ROUNDING = 1e-5  # of samples whose sums are in another order, as programs for other batches have it


@functools.cache
def build(window: int) -> tuple[DelayedStreamsLM, Mimi]:
    """Return a model that speaks and its codec, of one layer each; it often chooses words and padding."""
    lm_config = dataclasses.replace(
        small.TTS, context=window, num_layers=1, depformer=dataclasses.replace(small.TTS.depformer, num_layers=1)
    )
    transformer = dataclasses.replace(small.MIMI.transformer, context=window, num_layers=1)
    mimi_config = dataclasses.replace(small.MIMI, sample_rate=100, seanet=SEANET, transformer=transformer)
    lm = small.build(lambda rngs: DelayedStreamsLM(lm_config, rngs=rngs))
    lm.text_linear.weight[...] = lm.text_linear.weight[...].at[np.array([NEW_WORD, PAD])].mul(3.0)
    mimi = small.build(lambda rngs: Mimi(mimi_config, rngs=rngs))
    last = mimi.decoder.seanet.layers[-1]
    last.kernel_RCO[...], last.bias_O[...] = 0.25 * last.kernel_RCO[...], 0.25 * last.bias_O[...]
    return lm, mimi


@functools.cache
def calm(slots: int = 3) -> Loop:
    """One program for most tests: 12 steps a call at most."""
    return Loop(*build(WINDOW), dataclasses.replace(CALMLY, slots=slots), requests(range(3)))


@functools.cache
def strict() -> Loop:
    return Loop(*build(5), STRICTLY, [guided(row) for row in range(3)])


def word(*tokens: int, padding: int = 0) -> Entry:
    return Entry(tokens, "word", padding)


PAUSE = Entry((), "", 4)
SCRIPTS = (
    [word(4, 5), word(6), PAUSE, word(7, 8, 9, padding=2), word(10), word(11, 12), PAUSE, word(13)],
    [word(14)],
    [word(15, 16), word(17), PAUSE, word(18), word(5)],
)


def request(row: int, **more) -> SpeechRequest:
    """Return what a row says, each with its script, its voice and its seed."""
    fields = {
        "entries": SCRIPTS[row],
        "complete": True,
        "voices": [np.random.default_rng(row).normal(size=(2, 10)).astype(np.float32)],
        "condition_guidance": 2.0,
        "prefix_QT": np.zeros((small.TTS.n_q, 0), np.int32),
        "seed": 70 + row,
        "temperature": 0.8,
        "top_k_text": 6,
        "top_k_audio": 5,
        "guidance": 1.0,
        "padding_bonus": 0.0,
        "codebooks": CODEBOOKS,
        "max_padding": MAX_PADDING,
        "initial_padding": 2,
        "final_padding": FINAL_PADDING,
        "max_steps": 400,
    }
    return SpeechRequest(**fields | more)


def requests(rows, **more) -> list[SpeechRequest]:
    return [request(row, **more) for row in rows]


def prefix(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 12, (small.TTS.n_q, (4, 0, 2)[row]))


def random_codes(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 12, (small.TTS.n_q, length))


def guided(row: int, **more) -> SpeechRequest:
    """Return a greedy row that is guided by its prefix, with fewer codebooks."""
    return request(row, **{"temperature": 0.0, "guidance": 1.7, "codebooks": 2, "prefix_QT": prefix(row)} | more)


@functools.cache
def whole() -> list[Said]:
    return calm().speak(requests(range(3)))


def test_rows_of_a_batch_differ_and_are_not_constant():
    assert len({said.pcm_T.tobytes() for said in whole()}) == 3
    assert all(len(np.unique(said.frames_KF[1:4])) > 5 for said in whole())


@pytest.mark.parametrize("row", range(3))
def test_a_row_of_a_ragged_batch_is_as_alone(row):
    calm(1).speak(requests([row]))[0].like(whole()[row], atol=ROUNDING)


def test_a_row_depends_on_its_own_seed_whatever_its_slot():
    turned = calm().speak(requests((2, 0, 1)))
    for slot, row in enumerate((2, 0, 1)):
        turned[slot].like(whole()[row])
    changed = calm().speak([request(0), request(1, seed=8), request(2)])
    changed[0].like(whole()[0])
    changed[2].like(whole()[2])
    assert changed[1].frames_KF.tobytes() != whole()[1].frames_KF.tobytes()


def test_a_guided_greedy_row_depends_on_its_own_script_and_prefix():
    together = strict().speak([guided(row) for row in range(3)])
    other = strict().speak([guided(row) for row in (1, 0, 1)])
    other[1].like(together[0])
    other[0].like(together[1])
    other[2].like(together[1])
    for row, said in enumerate(together):
        length = prefix(row).shape[1]
        left = min(length, LAST)  # frames that end after the steps of the prefix
        late = DELAY_STEPS - length + left
        np.testing.assert_array_equal(said.frames_KF[1:3, late : late + length], prefix(row)[:2])
        np.testing.assert_array_equal(said.frames_KF[0, :left], ZERO_TOKEN)
        assert (said.frames_KF[0, left:] != ZERO_TOKEN).all()


def test_a_prefix_that_is_read_in_blocks_is_as_one_that_is_read_at_once(monkeypatch):
    several = [request(row, prefix_QT=random_codes(length)) for row, length in enumerate((30, 64, 7))]
    at_once = Loop(*build(40), CALMLY, several).speak(several)
    monkeypatch.setattr(program, "PREFILL_BLOCK", 24)
    settings = dataclasses.replace(CALMLY, steps=13)  # another program than the one before
    in_blocks = Loop(*build(40), settings, several).speak(several)
    for said, other in zip(at_once, in_blocks, strict=True):
        other.like(said, atol=ROUNDING)


def test_a_request_without_a_prefix_is_the_same_beside_requests_with_one():
    room = Loop(*build(WINDOW), CALMLY, [request(0, prefix_QT=random_codes(30))])
    assert room.settings.prefix_frames == 64
    for said, other in zip(room.speak(requests(range(3))), whole(), strict=True):
        said.like(other, atol=ROUNDING)


def test_a_guided_slot_begins_anew_in_both_its_halves():
    _, state = strict().go_on(strict().start([guided(2), guided(1), None]))
    before_R = state.lm.position_B.tolist()
    assert min(before_R[0], before_R[3]) > 0
    state = strict().program.insert(state, [0], [guided(0)])
    length = prefix(0).shape[1]
    assert state.lm.position_B.tolist() == [length, *before_R[1:3], length, *before_R[4:]]


def test_requests_of_every_kind_share_one_program_and_each_is_as_alone():
    several = [
        request(0, temperature=0.0),
        request(1, temperature=1.3, top_k_audio=2, padding_bonus=1.0, codebooks=1),
        request(2, top_k_text=0, top_k_audio=0, max_padding=2, initial_padding=4, final_padding=1),
    ]
    before = compilations()
    together = calm().speak(several)
    assert compilations() == before
    for row, one in enumerate(several):
        alone = calm().speak([None, one, None])[1]
        alone.like(together[row])
        assert alone.frames_KF.tobytes() != whole()[row].frames_KF.tobytes()
    assert (together[1].frames_KF[2:] == ZERO_TOKEN).all(), "of the codebooks one was asked for"


def test_without_guidance_a_slot_of_a_guided_program_is_as_in_one_that_is_not():
    plain = Loop(*build(5), dataclasses.replace(CALMLY, steps=60), [guided(0)])
    mixed = strict().speak([guided(0, guidance=1.0), guided(1), guided(0)])
    plain.speak([guided(0, guidance=1.0)])[0].like(mixed[0], atol=ROUNDING)
    assert mixed[0].frames_KF.tobytes() != mixed[2].frames_KF.tobytes()


def test_the_unconditional_half_leaves_out_the_prefix_of_the_rows_that_have_one():
    def next_inputs(state) -> list[np.ndarray]:
        step_B1, config = steps_B(state)[:, None], strict().lm.config
        inputs_BK1 = state.ring.inputs(step_B1, config)
        both_RK1 = program._with_unconditional(inputs_BK1, step_B1, state.request, config, strict().settings)
        return np.split(np.asarray(both_RK1)[:, :, 0], 2)

    state = strict().start([guided(row) for row in range(3)])
    with_BK, without_BK = next_inputs(state)
    first_K = [1 + q for q in range(2) if small.TTS.delays[1 + q] == 0]
    assert (with_BK[0, first_K] >= 0).all(), "of the prefix"
    assert (without_BK[0, first_K] == ZERO_TOKEN).all()
    _, state = strict().call(state, DELAY_STEPS)
    with_BK, without_BK = next_inputs(state)
    assert with_BK[1, 0] >= 0
    np.testing.assert_array_equal(without_BK[1], with_BK[1])  # without a prefix, nothing is left out


def test_voices_of_several_lengths_share_a_batch():
    def with_voice(row: int, steps: int) -> SpeechRequest:
        voice = np.random.default_rng(row).normal(size=(steps, 10)).astype(np.float32)
        return request(row, voices=[voice] * (1 + row % 2), temperature=0.0)

    several = [with_voice(row, steps) for row, steps in enumerate((1, 3, 2))]
    wide = Loop(*build(5), CALMLY, several)
    together = wide.speak(several)
    for row, one in enumerate(several):
        # Alone, in a program with room for this row's voices and no more.
        exact = Loop(*build(5), dataclasses.replace(CALMLY, slots=1), [one])
        assert exact.settings.voice_steps <= wide.settings.voice_steps
        exact.speak([one])[0].like(together[row], atol=ROUNDING)


def test_a_slot_takes_the_next_request_while_others_speak():
    state = calm().start([*requests((0, 1)), None])
    first = []
    while not first or not first[-1].ended_B[1]:
        outputs, state = calm().call(state, 4, allowed=[True, True, False], waiting=True)
        first.append(outputs)
    assert not first[-1].ended_B[0], "the other goes on"
    state = calm().program.insert(state, [1], [request(2)])
    said, state = calm().go_on(state, allowed=[True, True, False])
    said[1].like(whole()[2])
    before = np.concatenate([np.asarray(part.step_NB)[: int(part.count), 0] for part in first])
    assert before.tolist() == list(range(len(before))), "it takes every step once"
    assert said[0].steps == whole()[0].steps


def test_a_call_ends_when_a_slot_becomes_free_for_a_request_that_waits():
    shortest = min(said.steps for said in whole())
    outputs, state = calm().call(calm().start(requests(range(3))), 12, waiting=True)
    while not outputs.ended_B.any():
        outputs, state = calm().call(state, 12, waiting=True)
    assert steps_B(state).max() == shortest
    outputs, state = calm().call(state, 12, waiting=True)
    assert int(outputs.count) == 0, "not a step until the slot is filled"
    outputs, state = calm().call(state, 12, waiting=False)
    assert int(outputs.count) == 12


def test_slots_that_are_not_allowed_are_untouched_and_go_on_later():
    state = calm().start(requests(range(3)))
    _, state = calm().call(state, 7)
    before = jax.tree.map(np.array, state)
    _, state = calm().call(state, 9, allowed=[True, False, True])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
    assert steps_B(state).tolist() == [16, 7, 16]
    said, _ = calm().go_on(state)
    assert [one.steps for one in said] == [one.steps for one in whole()]


def test_a_slot_gives_up_after_its_own_limit():
    state = calm().start([request(0, max_steps=9), request(1), request(2)])
    outputs, state = calm().call(state, 12)
    assert steps_B(state)[0] == 9
    assert (bool(outputs.ended_B[0]), bool(outputs.complete_B[0])) == (True, False)
    said, _ = calm().go_on(state)
    assert said[2].steps == whole()[2].steps


@pytest.mark.parametrize("limits", [(1,), (5,), (12,), (3, 1, 7, 2)])
def test_calls_of_any_length_give_the_same_speech(limits):
    for row, said in enumerate(calm().speak(requests(range(3)), itertools.cycle(limits))):
        said.like(whole()[row])


@pytest.mark.parametrize("limit", [2, 12])
def test_a_script_that_grows_gives_the_speech_of_the_whole(limit):
    state, parts, waits = calm().start([request(row, entries=[], complete=False) for row in range(3)]), [[], [], []], 0
    for known in [(0, 0, 0), (0, 1, 1), (2, 1, 3), (4, 1, 4), (5, 1, 5), None]:
        for row in range(3):
            more = {"entries": SCRIPTS[row][: known[row]], "complete": row == 1 and known[1] == 1} if known else {}
            state = calm().program.extend(state, row, request(row, **more))
        said, state = calm().go_on(state, itertools.repeat(limit))
        waits += known is not None and -1 in [said[0].end_step, said[2].end_step]
        for row in range(3):
            parts[row].append(said[row])
    assert waits == 5
    assert len({part.steps for part in parts[0]}) > 2, "the row went on in several of the rounds"
    for row in range(3):
        join(parts[row]).like(whole()[row])


def test_a_row_with_a_prefix_waits_at_its_end_for_text():
    state = strict().start([guided(0, entries=[], complete=False, initial_padding=0), None, None])
    outputs, state = strict().call(state, 12)
    assert (int(outputs.count), bool(outputs.waits_B[0])) == (0, True)
    assert steps_B(state)[0] == prefix(0).shape[1]


def test_rows_that_have_ended_or_wait_are_untouched_while_another_runs():
    state = calm().start([request(0), request(1), request(2, entries=SCRIPTS[2][:3], complete=False)])
    outputs, state = calm().call(state, 1)
    while not (outputs.ended_B[1] and outputs.waits_B[2]):
        outputs, state = calm().call(state, 1)
    assert (np.asarray(state.words.end_step_B) >= 0).tolist()[1:] == [True, False]
    before = jax.tree.map(np.array, state)
    _, after = calm().go_on(state)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[1:], new[1:])
    assert int(after.lm.position_B[0]) > int(before.lm.position_B[0]) + 5


@pytest.mark.parametrize("row", range(3))
def test_a_row_stops_when_its_last_word_has_sounded(row):
    said = whole()[row]
    assert said.steps == said.end_step + DELAY_STEPS + FINAL_PADDING
    assert said.frames_KF.shape == (1 + small.TTS.n_q, said.steps - LAST)
    # The sound of the step in which a word begins is `delay_steps` later, and no frame of sound is left out.
    frames = said.frames_KF.shape[1] - DELAY_STEPS
    assert said.pcm_T.size == frames * calm().mimi.config.frame_size
    assert said.taken[-1] < said.end_step <= frames - (FINAL_PADDING - LAST)
    sound_QF, late = said.frames_KF[1 : 1 + CODEBOOKS], DELAY_STEPS
    assert (sound_QF[:, :late] == ZERO_TOKEN).all()
    assert (sound_QF[:, late:] >= 0).all()
    assert (said.frames_KF[1 + CODEBOOKS :] == ZERO_TOKEN).all()


def test_samples_are_what_the_codec_makes_of_the_frames():
    codes_BQF = jnp.asarray(whole()[0].frames_KF[None, 1:4, DELAY_STEPS:])
    pcm_T = jnp.clip(jax.jit(calm().mimi.decode)(codes_BQF)[0, :, 0], -1, 1)
    np.testing.assert_allclose(whole()[0].pcm_T, pcm_T, rtol=0, atol=ROUNDING)
    assert 0 < (np.abs(pcm_T) == 1).mean() < 0.1


def test_the_bonus_of_padding_slows_its_own_row():
    slow, plain, _ = calm().speak([request(0, padding_bonus=1000.0), request(0), request(2)])
    same_key = calm().speak(requests((0, 0, 2)))
    assert plain.taken == same_key[1].taken == same_key[0].taken == whole()[0].taken
    # Never chosen, the second word is ordered after `max_padding` steps without one.
    assert slow.taken[1] - slow.taken[0] == MAX_PADDING + 1
    assert slow.end_step > plain.end_step


def test_scripts_of_ten_lengths_share_one_program():
    whole()
    before = compilations()
    for length in range(1, 11):
        scripts = ([word(4, 5)] * length, [PAUSE] * length, [word(*range(4, 4 + length))])
        said = calm().speak([request(row, entries=entries) for row, entries in enumerate(scripts)])
        assert all(one.end_step > 0 for one in said)
    assert compilations() == before


def test_a_request_larger_than_the_room_makes_the_program_grow_and_the_others_go_on():
    loop = Loop(*build(5), dataclasses.replace(CALMLY, entries=2, tokens=2), [])
    assert loop.settings.voice_steps == 1
    state = loop.start([request(0), request(1), None])
    _, state = loop.call(state, 9)
    state = loop.program.insert(state, [2], [request(2, prefix_QT=prefix(2), entries=SCRIPTS[2] * 300)])
    assert loop.settings.entries == 2048
    assert loop.settings.prefix_frames == 64
    said, _ = loop.go_on(state, [12] * 3)
    assert len(said[2].taken) > 1
    wide = Loop(*build(5), loop.settings)
    calmly, _ = wide.go_on(wide.start([request(0), request(1), None]))
    assert said[1].end_step == calmly[1].end_step


def test_a_program_whose_growth_was_interrupted_grows_at_the_next_request(monkeypatch):
    loop = Loop(*build(5), dataclasses.replace(CALMLY, entries=2, tokens=2), [])
    state, large = loop.program.init(), request(2, prefix_QT=prefix(2))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(host, "compiled_over_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.program.fit(state, large)
    assert loop.settings.prefix_frames == 0
    grown = jax.tree.map(lambda leaf: leaf.shape, loop.program.fit(state, large))
    assert grown == jax.tree.map(lambda leaf: leaf.shape, loop.program.init())
    assert loop.settings.prefix_frames == 64


def test_nothing_leaves_or_enters_the_device_in_a_call():
    state = calm().start(requests(range(3)))
    inputs = jax.tree.map(jnp.asarray, step_limits([Leave()] * 3, calm().program.limit, waiting=False))
    params, step = calm().program._params, calm().program._step
    outputs, state = step(params, state, inputs)
    with jax.transfer_guard("disallow"):
        outputs, state = step(params, state, inputs)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(params, state, dataclasses.replace(inputs, limit=np.int32(12)))
    assert int(outputs.count) == 12
    assert "callback" not in compiled_step().as_text()


@functools.cache
def compiled_step() -> jax.stages.Compiled:
    """Compile the loop as users do."""
    loop = calm()
    inputs = step_limits([Leave()] * 3, loop.program.limit, waiting=False)
    return compile_optimized(loop.program._step._jitted.lower(loop.program._params, loop.program.init(), inputs))


def test_the_state_is_updated_where_it_lies():
    memory, state = compiled_step().memory_analysis(), calm().program.init()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    caches = [*state.lm.caches, *state.codec.transformer.caches]
    assert memory.temp_size_in_bytes < min(cache.k_BKSH.nbytes for cache in caches)


@pytest.mark.parametrize("prefix_frames", [0, 3])
def test_depformer_and_codec_rest_until_there_is_sound(monkeypatch, prefix_frames):
    walks, decodes = [], []

    def walk(self, hidden_RD, text_R, choose, *, codebooks, wanted):
        jax.debug.callback(lambda: walks.append(1))
        return jnp.zeros((hidden_RD.shape[0], codebooks), jnp.int32)

    def decode_step(self, codes_BQT, state, lengths_B):
        jax.debug.callback(lambda: decodes.append(1))
        return jnp.zeros((codes_BQT.shape[0], self.config.frame_size, 1)), state

    monkeypatch.setattr(Depformer, "walk", walk)
    monkeypatch.setattr(Mimi, "decode_step", decode_step)
    settings = dataclasses.replace(CALMLY, steps=11)  # another program than those that other tests have compiled
    spoken = [request(row, prefix_QT=np.zeros((small.TTS.n_q, row * prefix_frames // 2))) for row in range(3)]
    loop = Loop(*build(5), settings, spoken)
    state, steps, late = loop.start(spoken), 0, DELAY_STEPS
    jax.effects_barrier()
    decodes.clear()  # what was heard of the prefixes
    for limit in (late, 1, LAST - 1, 1, 4):
        _, state = loop.call(state, limit)
        jax.effects_barrier()
        steps += limit
        # The sound of the longest prefix comes first.
        assert (len(walks), len(decodes)) == (
            max(steps - late, 0),
            min(max(steps + prefix_frames - late - LAST, 0), steps),
        )


def test_a_codec_with_fewer_codebooks_than_are_generated_is_refused():
    lm, mimi = build(5)
    few = dataclasses.replace(mimi.config, quantizer=dataclasses.replace(mimi.config.quantizer, n_q=2))
    small_codec = small.build(lambda rngs: Mimi(few, rngs=rngs))
    with pytest.raises(ConfigError, match="the model generates 4 codebooks; its codec has 2"):
        program.init_state(lm, small_codec, CALMLY)


def test_a_walk_stops_after_the_group_in_which_the_last_wanted_codebook_is():
    config = dataclasses.replace(
        small.TTS,
        n_q=9,
        dep_q=9,
        delays=(0,) * 10,
        depformer=dataclasses.replace(small.TTS.depformer, weights_per_step_schedule=(0,) * 9),
    )
    depformer = small.build(lambda rngs: Depformer(config, rngs=rngs))
    hidden_BD = np.random.default_rng(0).normal(size=(2, config.dim)).astype(np.float32)
    text_B, graph, params = jnp.array([3, 4]), *nnx.split(depformer)

    @jax.jit
    def walk(params, wanted):
        def choose(_, logits_BV):
            return 1 + jnp.argmax(logits_BV[:, 1:], axis=-1).astype(jnp.int32)

        return nnx.merge(graph, params).walk(hidden_BD, text_B, choose, codebooks=9, wanted=wanted)

    whole_BQ = np.asarray(walk(params, 9))
    assert (whole_BQ > 0).all()
    for wanted in range(1, 10):
        made = min(-(-wanted // WALK_GROUP) * WALK_GROUP, 9)
        found_BQ = np.asarray(walk(params, wanted))
        np.testing.assert_array_equal(found_BQ[:, :made], whole_BQ[:, :made])
        assert not found_BQ[:, made:].any()


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


def test_text_and_audio_are_each_sampled_among_their_own_top_k(monkeypatch):
    settings, chosen = dataclasses.replace(CALMLY, max_top_k_text=7, max_top_k_audio=9), set()

    def step(state):
        def choose(logits_BV, keys_B, temperature_B, top_k_B, *, max_top_k):
            is_of_text = top_k_B is state.request.top_k_text_B
            assert is_of_text or top_k_B is state.request.top_k_audio_B
            chosen.add((logits_BV.shape[1], is_of_text, max_top_k))
            return jnp.zeros(3, jnp.int32)

        monkeypatch.setattr(program, "sample", choose)
        return program._take_step(*build(5), state, jnp.ones(3, bool), settings)

    jax.eval_shape(step, jax.eval_shape(lambda: program.init_state(*build(5), settings)))
    assert chosen == {(small.TTS.text_card, True, 7), (small.TTS.card, False, 9)}


def test_a_request_has_each_choice_in_the_row_of_its_name():
    choices = {
        "temperature": 0.5, "top_k_text": 2, "top_k_audio": 3, "guidance": 1.5, "padding_bonus": 0.25, "codebooks": 4,
        "max_padding": 5, "initial_padding": 6, "final_padding": 7, "max_steps": 8,
    }  # fmt: skip
    one = request(0, **choices)
    row = one.row(one.fitted(CALMLY))
    assert {name: getattr(row, f"{name}_B").tolist() for name in choices} == {n: [v] for n, v in choices.items()}


def test_room_is_made_for_a_request_and_never_taken_from_those_before_it():
    one = request(0, prefix_QT=np.zeros((small.TTS.n_q, 65), np.int32))
    assert one.fitted(CALMLY) == dataclasses.replace(CALMLY, voice_steps=10, prefix_frames=128)
    assert request(0).fitted(CALMLY).prefix_frames == 0
    large = dataclasses.replace(CALMLY, entries=2048, tokens=8192, voice_steps=50, prefix_frames=192)
    assert one.fitted(large) == large


def test_noise_is_of_the_row_the_step_and_the_stream():
    settings = dataclasses.replace(CALMLY, slots=300, entries=1, tokens=1)
    requests_B = jax.eval_shape(lambda: program.init_state(*build(5), settings)).request
    requests_B = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), requests_B)
    keys_B2 = jax.vmap(jax.random.PRNGKey)(jnp.arange(300))
    requests_B = dataclasses.replace(requests_B, key_B2=keys_B2, temperature_B=jnp.ones(300))
    zeros_B = jnp.zeros(300, jnp.int32)
    draw = jax.jit(lambda stream, step_B: program._sample(jnp.zeros((300, 9)), requests_B, step_B, stream, zeros_B, 0))
    step_B = jnp.arange(300) % 2
    drawn_B = np.asarray(draw(1, step_B))
    np.testing.assert_array_equal(draw(1, step_B), drawn_B)
    for other_B in (draw(2, step_B), draw(1, step_B + 1), np.roll(drawn_B, 2)):
        # Of unrelated draws one in nine is equal: 33, within five standard deviations of 5.4.
        assert 6 < (np.asarray(other_B) == drawn_B).sum() < 61
