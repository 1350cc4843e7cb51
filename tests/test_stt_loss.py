"""The loss of speech-to-text: against plain numpy, its masks and dropouts, and a model that learns a row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.stt.events import WordEnded
from dsm_jax.stt.words import Timing, VadOptions, WordReader
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training.alignment import text_stream
from dsm_jax.training.data import WordSpan
from dsm_jax.training.losses.stt import SttObjective, augment_codes, stt_loss
from dsm_jax.training.step import OptimizerConfig, init, make_step
from tests.helpers import checkpoint_maker, small
from tests.helpers.greedy import greedy_tokens
from tests.helpers.tokenizer_maker import make_tokenizer

pytestmark = pytest.mark.slow

LM = dataclasses.replace(small.STT, num_layers=1, context=64, text_card=64, text_card_out=None)
KEY = jax.random.key(0)
FRAMES = 24


@pytest.fixture(scope="module")
def network():
    """Make a model with delayed text and audio streams, with weights of about the initial scale."""
    return checkpoint_maker.untrained_lm(LM)


def codes(rows: int = 2) -> jax.Array:
    """Draw random codes and a text with words among padding, unknown at the end of the last row."""
    random = np.random.default_rng(3)
    codes_BMT = random.integers(0, LM.card, (rows, 1 + LM.n_q, FRAMES)).astype(np.int32)
    word_BT = random.random((rows, FRAMES)) < 0.3
    codes_BMT[:, 0] = np.where(word_BT, random.integers(4, LM.text_card, (rows, FRAMES)), 3)
    codes_BMT[0, 0, :2] = 0
    codes_BMT[-1, 0, 16:] = -1
    return jnp.asarray(codes_BMT)


def shares(objective: SttObjective) -> dict[str, float]:
    """Make the loss with the objective's numbers as arguments, so that one compilation serves all objectives."""
    return dataclasses.asdict(objective)


@pytest.fixture(scope="module")
def measured(network):
    """Compute the loss and metrics of rows under an objective."""
    graph, params = network
    compiled = jax.jit(lambda p, c, k, o: stt_loss(nnx.merge(graph, p), c, k, SttObjective(**o)))

    def measure(codes_BMT: jax.Array, objective: SttObjective = SttObjective(), key: jax.Array = KEY):
        return compiled(params, codes_BMT, key, shares(objective))

    return measure


@jax.jit
def augmented(codes_BMT: jax.Array, objective: dict[str, float]) -> jax.Array:
    return augment_codes(codes_BMT, KEY, SttObjective(**objective), card=LM.card, padding=3)


def plainly(logits_BTV: np.ndarray, codes_BMT: jax.Array, padding_weight: float) -> tuple[float, float]:
    """Compute the loss and the share of correct tokens, in loops."""
    total, weights, right = 0.0, 0.0, []
    for row, text_T in enumerate(np.asarray(codes_BMT[:, 0])):
        for t, token in enumerate(text_T):
            if token == -1 or t + LM.delays[0] >= FRAMES:  # unknown, or predicted after the end
                continue
            logits_V = logits_BTV[row, t]
            weight = padding_weight if token == 3 else 1.0
            total += weight * (np.log(np.exp(logits_V).sum()) - logits_V[token])
            weights += weight
            if token != 3:
                right.append(logits_V.argmax() == token)
    return total / weights, float(np.mean(right))


def test_the_loss_is_the_weighted_mean_cross_entropy(network, measured):
    graph, params = network
    logits_BTV = np.asarray(jax.jit(lambda p, c: nnx.merge(graph, p)(c).text_logits_BTV)(params, codes()), np.float64)
    for padding_weight in (0.3, 1.0, 0.0):
        loss, metrics = measured(codes(), SttObjective(padding_weight=padding_weight))
        expected, right = plainly(logits_BTV, codes(), padding_weight)
        assert float(loss) == pytest.approx(expected, rel=1e-5)  # float32 against float64
        assert float(metrics["words_right"]) == pytest.approx(right)


def test_unknown_text_does_not_count_and_known_text_does(measured):
    rows = codes()
    loss, _ = measured(rows)
    audio = rows.at[-1, 1:, 18:].set(0)  # changes only inputs of unknown text
    assert float(measured(audio)[0]) == float(loss)
    assert float(measured(rows.at[-1, 0, 16].set(5))[0]) != float(loss)
    nothing, metrics = measured(rows.at[:, 0].set(-1))
    assert float(nothing) == 0.0
    assert {name: float(value) for name, value in metrics.items()} == {"words_right": 0.0, "padding_right": 0.0}


def test_dropouts_change_the_inputs_and_not_the_targets(network, measured):
    rows = codes()
    plain, _ = measured(rows)
    for hidden in ({"text_dropout": 0.5}, {"codebook_dropout": 0.9}, {"random_codes": 0.5}):
        loss, _ = measured(rows, SttObjective(**hidden))
        assert np.isfinite(loss)
        assert float(loss) != float(plain)
    nothing_hidden, _ = measured(rows, key=jax.random.key(7))
    assert float(nothing_hidden) == float(plain)


def test_dropouts_have_the_objectives_shares():
    rows = jnp.tile(codes(), (100, 1, 1)).at[:, 0].set(5)

    def fed(**hidden: float) -> np.ndarray:
        return np.asarray(augmented(rows, shares(SttObjective(**hidden))))

    np.testing.assert_array_equal(fed(), rows)
    text = fed(text_dropout=0.25)
    assert np.mean(text[:, 0] == 3) == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(text[:, 1:], rows[:, 1:])
    books = fed(codebook_dropout=0.4)
    off = (books[:, 1:] == -1).all(2)
    np.testing.assert_array_equal(books[:, 1:], np.where(off[..., None], -1, rows[:, 1:]))
    assert not off[:, 0].any(), "the first codebook is never dropped"
    assert off[:, 1:].mean() == pytest.approx(0.4, abs=0.06)
    other = fed(random_codes=0.3)
    assert np.mean(other[:, 1:] != rows[:, 1:]) == pytest.approx(0.3 * (1 - 1 / LM.card), abs=0.03)
    assert 0 <= other[:, 1:].min() <= other[:, 1:].max() < LM.card


def test_dropout_never_replaces_absent_text():
    rows = jnp.tile(codes(), (100, 1, 1))
    fed = augmented(rows, shares(SttObjective(text_dropout=1.0)))
    np.testing.assert_array_equal(fed[:, 0], jnp.where(rows[:, 0] == -1, -1, 3))


def transcribed(network, codes_BQT: jax.Array) -> list[int]:
    """Run a model on codes greedily; return the token of each frame, in the frames of `transcribe`."""
    graph, params = network
    run = jax.jit(lambda params, codes_BQT: greedy_tokens(nnx.merge(graph, params), codes_BQT))
    return run(params, codes_BQT)[0].tolist()


def test_a_model_trained_on_a_row_transcribes_its_words(network, tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "words.model", LM.text_card))
    timing = Timing(12.5, text_offset=0.24, audio_offset=0.0)
    words = [WordSpan("on", 0.1, 0.3), WordSpan("a", 0.9, 1.0)]
    text_T = text_stream(words, tokenizer, LM, timing, frames=FRAMES)
    row = codes(1).at[0, 0].set(text_T)
    graph, params = network
    optimizer = OptimizerConfig(learning_rate=2e-2, warmup=5).build(60)

    def loss(params, frozen, aux, batch, key):
        value, metrics = stt_loss(nnx.merge(graph, params), batch, key, SttObjective())
        return value, (aux, metrics)

    step, state = make_step(loss, optimizer), init(jax.tree.map(jnp.copy, params), optimizer, 0)
    for _ in range(60):
        state, metrics = step(state, row)
    assert float(metrics["loss"]) < 0.05
    assert float(metrics["words_right"]) == float(metrics["padding_right"]) == 1.0

    tokens = transcribed((graph, state.params), row[:, 1:])
    # Column c is the text of frame c - 1, before the delay of the text stream.
    assert tokens[LM.delays[0] - 1 :][: FRAMES - LM.delays[0]] == list(text_T[: FRAMES - LM.delays[0]])
    reader = WordReader(tokenizer, timing, padding=3, boundary=0, pauses=VadOptions())
    events = [event for token in tokens for event in reader.read(token, 1.0)] + reader.finish()
    starts = {event.word.text: event.word.start for event in events if isinstance(event, WordEnded)}
    assert starts == {"on": pytest.approx(0.1, abs=0.04), "a": pytest.approx(0.9, abs=0.04)}  # half a frame
    assert transcribed(network, row[:, 1:]) != tokens
