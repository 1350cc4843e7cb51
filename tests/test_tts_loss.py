"""The loss of text-to-speech: against plain numpy, its masks and dropouts, and a model that learns a row.

Shape letters: B batch rows, T frames, M streams (text first), Q codebooks, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training.alignment import text_stream
from dsm_jax.training.data import WordSpan
from dsm_jax.training.losses.tts import TtsObjective, decisions, sampled_steps, tts_loss
from dsm_jax.training.step import OptimizerConfig, init, make_step
from dsm_jax.tts import voices
from dsm_jax.tts.host import SpeechRequest
from dsm_jax.tts.script import MAIN, entries_of
from dsm_jax.tts.state import TtsSettings
from dsm_jax.tts.words import WordMachine
from tests.helpers import checkpoint_maker, speaking, tts_model
from tests.helpers.tokenizer_maker import make_tokenizer

pytestmark = pytest.mark.slow

LM = dataclasses.replace(tts_model.SPEAKERS, demux_second_stream=False, context=64)
FRAMES, DELAY = 24, 3
UNDISTURBED = TtsObjective(random_codes=0.0)
CONDITIONAL_B = jnp.zeros(2, bool)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def network():
    return checkpoint_maker.untrained_lm(LM)


def conditions_of(lm: DelayedStreamsLM, rows: int):
    """Make the conditions of rows with one voice each."""
    values, masks, _ = voices.conditions(LM, [[tts_model.voice(row)] for row in range(rows)], 2.0)
    return lm.condition(values, masks)


def text_of(tokenizer) -> np.ndarray:
    """Make the text stream of a clip with two words."""
    words = [WordSpan("on", 0.16, 0.3), WordSpan("a", 0.9, 1.0)]
    return text_stream(words, tokenizer, LM, Timing(12.5, 0.0, 0.0), frames=FRAMES, prefixes={0: MAIN})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("words") / "words.model", LM.text_card))


@pytest.fixture(scope="module")
def rows(tokenizer) -> jax.Array:
    """Make two rows of text, with codes delayed after the text."""
    codes_BMT = np.random.default_rng(3).integers(0, LM.card, (2, 1 + LM.n_q, FRAMES)).astype(np.int32)
    codes_BMT[:, 0] = text_of(tokenizer)
    codes_BMT[1, 0, 12:] = 3
    codes_BMT[:, 1:, :DELAY] = -1
    return jnp.asarray(codes_BMT)


@pytest.fixture(scope="module")
def measured(network):
    """Compute the loss and metrics of rows under an objective; one compilation serves all objectives."""
    graph, params = network

    @jax.jit
    def compiled(params, codes_BMT, unconditional_B, key, shares):
        lm = nnx.merge(graph, params)
        return tts_loss(lm, codes_BMT, conditions_of(lm, len(codes_BMT)), unconditional_B, key, TtsObjective(**shares))

    return lambda codes_BMT, objective=UNDISTURBED, unconditional_B=CONDITIONAL_B, key=KEY: compiled(
        params, codes_BMT, unconditional_B, key, dataclasses.asdict(objective)
    )


def test_the_text_loss_covers_the_steps_that_inference_samples(tokenizer):
    text_T = text_of(tokenizer)
    begins = np.flatnonzero(text_T == 0)
    expected_T = ((text_T == 0) | (text_T == 3)) & (np.arange(FRAMES) <= begins[-1])
    assert begins.tolist() == [2, 11]
    assert text_T[3] == MAIN
    np.testing.assert_array_equal(np.asarray(sampled_steps(text_T[None]))[0], expected_T)
    assert not np.asarray(sampled_steps(np.full((1, 8), 3, np.int32))).any(), "no word, so no step is sampled"


def test_both_losses_are_masked_mean_cross_entropies(network, measured, rows):
    graph, params = network

    @jax.jit
    def scores(params):
        lm = nnx.merge(graph, params)
        out = lm(rows, conditions_of(lm, 2))
        return out.text_logits_BTV, out.audio_logits_BQTV

    text_BTV, audio_BQTV = (np.asarray(a, np.float64) for a in scores(params))
    text, audio = [], {True: [], False: []}  # whether it is the first codebook
    for row, codes_MT in enumerate(np.asarray(rows)):
        last = np.flatnonzero(codes_MT[0] == 0)[-1]
        for t, token in enumerate(codes_MT[0]):
            if token in (0, 3) and t <= last:
                text.append(np.log(np.exp(text_BTV[row, t]).sum()) - text_BTV[row, t, token])
        for q in range(LM.dep_q):
            for t in range(DELAY, FRAMES - LM.delays[1 + q]):  # what is later is generated after the end
                logits_V = audio_BQTV[row, q, t]
                audio[q == 0].append(np.log(np.exp(logits_V).sum()) - logits_V[codes_MT[1 + q, t]])
    for weight, semantic in ((1.0, 7.0), (0.3, 2.0)):
        loss, metrics = measured(rows, dataclasses.replace(UNDISTURBED, text=weight, semantic=semantic))
        expected = {"text": np.mean(text), "semantic": np.mean(audio[True]), "acoustic": np.mean(audio[False])}
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)
        others = LM.dep_q - 1
        of_audio = (semantic * expected["semantic"] + others * expected["acoustic"]) / (semantic + others)
        assert float(loss) == pytest.approx(weight * expected["text"] + of_audio, rel=1e-5)


def test_the_loss_depends_on_the_key_only_with_random_codes(measured, rows):
    plain = float(measured(rows)[0])
    assert float(measured(rows, key=jax.random.key(7))[0]) == plain
    random = TtsObjective(random_codes=0.5)
    assert len({plain, float(measured(rows, random)[0]), float(measured(rows, random, key=jax.random.key(7))[0])}) == 3


def test_the_text_is_an_input_of_conditional_rows_only(measured, rows):
    other = rows.at[1, 0, 4].set(9)  # a piece of the second row's first word, which is fed and never asked
    for unconditional_B, same in (
        (CONDITIONAL_B, False),
        (jnp.array([True, False]), False),
        (jnp.array([False, True]), True),
    ):
        losses = [float(measured(codes, unconditional_B=unconditional_B)[1]["text"]) for codes in (rows, other)]
        assert (losses[0] == losses[1]) is same


def test_decisions_reads_the_targets_from_a_second_text_stream():
    card = 50
    streams = [(-1, 3), (0, 7), (9, 8), (-1, 3), (0, 3)]  # second and first: padding, a word of two tokens, the end
    text_T = np.array([-1] + [(second + 1) * card + first for second, first in streams], np.int32)
    found_T = np.asarray(decisions(text_T[None], card, second_stream=True))[0]
    np.testing.assert_array_equal(found_T, [-1, 3, 0, 8, 3, 0])
    np.testing.assert_array_equal(np.asarray(sampled_steps(found_T[None]))[0], [False, True, True, False, True, True])
    np.testing.assert_array_equal(decisions(text_T[None], card, second_stream=False), text_T[None])


def test_a_prefix_does_not_count_and_is_no_input_of_unconditional_rows(network, rows):
    graph, params = network
    context_B = jnp.array([DELAY + 6, DELAY])

    @jax.jit
    def measure(codes_BMT, unconditional_B):
        lm = nnx.merge(graph, params)
        conditions = conditions_of(lm, 2)
        return tts_loss(lm, codes_BMT, conditions, unconditional_B, KEY, UNDISTURBED, context_B)[1]["acoustic"]

    def changed(where: tuple, unconditional: bool) -> bool:
        other = rows.at[where].set((rows[where] + 1) % LM.card)
        drop_B = jnp.array([unconditional, False])
        return float(measure(rows, drop_B)) != float(measure(other, drop_B))

    prefix, rest = (0, 1, DELAY + 2), (0, 1, DELAY + 8)
    assert changed(prefix, unconditional=False), "what follows depends on the prefix"
    assert not changed(prefix, unconditional=True), "it is neither fed nor counted"
    assert changed(rest, unconditional=True)


def test_a_model_trained_on_a_row_speaks_it(network, tokenizer, rows):
    graph, params = network
    row = rows[:1]
    optimizer = OptimizerConfig(learning_rate=2e-2, warmup=5).build(150)

    def loss(params, frozen, aux, batch, key):
        lm = nnx.merge(graph, params)
        value, metrics = tts_loss(lm, batch, conditions_of(lm, 1), CONDITIONAL_B[:1], key, UNDISTURBED)
        return value, (aux, metrics)

    step, state = make_step(loss, optimizer), init(jax.tree.map(jnp.copy, params), optimizer, 0)
    for _ in range(150):
        state, metrics = step(state, row)
    assert float(metrics["loss"]) < 0.05

    settings = TtsSettings(slots=1, machine=WordMachine(card=LM.text_card + 1), delay_steps=DELAY)
    mimi = nnx.merge(*nnx.split(Mimi(tts_model.MIMI, rngs=nnx.Rngs(0))))
    request = SpeechRequest(
        entries=entries_of(["on a"], tokenizer, frame_rate=12.5, multi_speaker=True),
        complete=True,
        voices=[tts_model.voice(0)],
        condition_guidance=2.0,
        prefix_QT=np.zeros((LM.n_q, 0), np.int32),
        seed=0,
        temperature=0.0,
        top_k_text=25,
        top_k_audio=250,
        guidance=1.0,
        padding_bonus=0.0,
        codebooks=LM.dep_q,
        max_padding=20,
        initial_padding=2,
        final_padding=1,
        max_steps=400,
    )
    (spoken,) = speaking.Loop(nnx.merge(graph, state.params), mimi, settings, [request]).speak([request])
    frames = min(spoken.frames_KF.shape[1], FRAMES - max(LM.delays))
    assert frames > 15
    np.testing.assert_array_equal(spoken.frames_KF[:, :frames], row[0, :, :frames])
