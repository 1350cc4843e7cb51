"""Speech against moshi's `TTSModel`: every token, every word's time, every sample; and what chance chooses among.

Shape letters: B batch rows, K streams (text first), Q codebooks, P frames of a prefix, F frames, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from moshi.utils.sampling import sample_token

import dsm_jax
from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.nn.sampling import sample, top_k_capacity
from dsm_jax.tts import voices
from dsm_jax.tts.host import SpeechRequest
from dsm_jax.tts.script import Entry, entries_of
from dsm_jax.tts.state import TtsSettings
from dsm_jax.tts.words import WordMachine
from tests.helpers.speaking import Loop, Said
from tests.parity import references
from tests.parity.references import How

SCRIPTS = (
    ("good morning everyone", 'thank you <break time="0.5s"/> for coming', "to the station"),
    ("what time does",),
    ("", "hello there", "yes (please): go"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """The first of `SCRIPTS`, by a model and its settings.

    Attributes:
        kind: Of the model.
        how: Settings, as the reference names them.
        voices: Seeds of each row's, in its slots.
        guidance: Which distilled guidance it is told.
        prefixes: Frames of each row's.
        rows: How many.
    """

    kind: references.Kind
    how: How
    voices: tuple[tuple[int, ...], ...] = ()
    guidance: float | None = None
    prefixes: tuple[int, ...] = ()
    rows: int = 1

    def codes(self) -> list[np.ndarray] | None:
        """Return the codes [Q, P] of the prefixes."""
        random = np.random.default_rng(0)
        return [random.integers(0, 128, (8, length)).astype(np.int32) for length in self.prefixes] or None


CASES = {
    "two voices and distilled guidance": Case("speakers", How(), voices=((0, 1),), guidance=2.0),
    "ragged rows with fewer codebooks, slower": Case(
        "speakers", How(padding_between=1, padding_bonus=0.5, n_q=5), voices=((0, 1), (1,), (2, 0)), rows=3
    ),
    "guided by text and prefix": Case("prefix", How(cfg_coef=1.7), prefixes=(6, 3), rows=2),
    "guided by conditions only": Case(
        "prefix", How(cfg_coef=1.7, cfg_is_no_text=False, cfg_is_no_prefix=False), prefixes=(6, 3), rows=2
    ),
    "guided by the prefix": Case("prefix", How(cfg_coef=1.7, cfg_is_no_text=False), prefixes=(6, 3), rows=2),
    "guided by text": Case("prefix", How(cfg_coef=1.7)),
    "with a prefix": Case("prefix", How(), prefixes=(4,)),
    "with a prefix whose sound begins before its end": Case("prefix", How(cfg_coef=1.7), prefixes=(45, 29), rows=2),
}


@functools.cache
def ours(kind: references.Kind) -> tuple[dsm_jax.Model, DelayedStreamsLM, Mimi]:
    model = dsm_jax.load(references.kyutai_tts(kind))
    return model, model.lm, model.codec


def settings(case: Case) -> TtsSettings:
    """Return the same settings, as the program names them."""
    config = references.read_config(references.kyutai_tts(case.kind))
    ahead, delay_s = config["tts_config"]["second_stream_ahead"], config["tts_config"]["audio_delay"]
    return TtsSettings(
        slots=case.rows,
        machine=WordMachine(card=config["text_card"] + 1, second_stream_ahead=ahead),
        delay_steps=int(delay_s * 12.5),
        guided=case.how.cfg_coef != 1.0,
        uncond_drops_text=case.how.cfg_is_no_text,
        uncond_drops_prefix=case.how.cfg_is_no_prefix,
    )


def entries(case: Case) -> list[list[Entry]]:
    model = ours(case.kind)[0]
    multi_speaker, between = voices.has_speakers(model.config.lm), case.how.padding_between
    return [
        entries_of(script, model.tokenizer, frame_rate=12.5, multi_speaker=multi_speaker, padding_between=between)
        for script in SCRIPTS[: case.rows]
    ]


def steps_of(kind: references.Kind, seeds: tuple[int, ...]) -> list[np.ndarray]:
    """Return the steps of voices."""
    return [voices.read_voice(references.voice(seed), ours(kind)[0]) for seed in seeds]


def requests(case: Case) -> list[SpeechRequest]:
    """Return the rows of a case, greedy."""
    codes = case.codes() or [np.zeros((8, 0), np.int32)] * case.rows
    return [
        SpeechRequest(
            entries=row,
            complete=True,
            voices=steps_of(case.kind, case.voices[number] if case.voices else ()),
            condition_guidance=case.guidance,
            prefix_QT=codes[number],
            seed=0,
            temperature=0.0,
            top_k_text=25,
            top_k_audio=250,
            guidance=case.how.cfg_coef,
            padding_bonus=case.how.padding_bonus,
            codebooks=case.how.n_q,
            max_padding=8,
            initial_padding=2,
            final_padding=4,
            max_steps=case.how.max_gen_length,
        )
        for number, row in enumerate(entries(case))
    ]


@functools.cache
def both(name: str) -> tuple[list[Said], list[references.Spoken], np.ndarray]:
    """Return what the engine and the reference said, and the reference's samples of all rows."""
    case = CASES[name]
    spoken, pcm = references.moshi_speech(
        references.kyutai_tts(case.kind),
        SCRIPTS[: case.rows],
        case.how,
        voices=[[references.voice(seed) for seed in row] for row in case.voices] or None,
        cfg=case.guidance,
        prefixes=case.codes(),
    )
    _, lm, mimi = ours(case.kind)
    return Loop(lm, mimi, settings(case), requests(case)).speak(requests(case)), spoken, pcm


@pytest.mark.parametrize("name", CASES)
def test_every_token_is_moshis(name):
    said, spoken, _ = both(name)
    streams = 1 + CASES[name].how.n_q
    for mine, theirs, one in zip(said, spoken, requests(CASES[name]), strict=True):
        # The frames that a prefix makes whole are known, and the program returns those after them.
        first = max(one.prefix_QT.shape[1] - max(ours(CASES[name].kind)[1].config.delays), 0)
        np.testing.assert_array_equal(mine.frames_KF[:streams], theirs.frames_KF[:, first:])
        assert (mine.frames_KF[streams:] == -1).all()
        assert len(np.unique(theirs.frames_KF[1:])) > 40, "a constant output would prove nothing"


@pytest.mark.parametrize("name", CASES)
def test_words_begin_and_scripts_end_when_moshis_do(name):
    said, spoken, _ = both(name)
    for mine, theirs, row in zip(said, spoken, entries(CASES[name]), strict=True):
        assert (mine.taken, mine.end_step) == (theirs.consumed, theirs.end_step)
        words = [(entry.text, step) for entry, step in zip(row, mine.taken, strict=True) if entry.tokens]
        assert words == theirs.transcript


@pytest.mark.parametrize("name", CASES)
def test_samples_are_moshis(name):
    said, _, pcm = both(name)
    late = max(ours(CASES[name].kind)[1].config.delays) + settings(CASES[name]).delay_steps
    starts = [max(one.prefix_QT.shape[1] - late, 0) * 1920 for one in requests(CASES[name])]
    for mine, whole, start in zip(said, pcm, starts, strict=True):
        theirs = whole[start:]
        # float32 on both sides, summed in another order.
        np.testing.assert_allclose(mine.pcm_T, theirs[: mine.pcm_T.size], rtol=0, atol=1e-5)
        assert mine.pcm_T.size > 24_000
        assert theirs.std() > 0.01
    assert max(start + mine.pcm_T.size for start, mine in zip(starts, said, strict=True)) == pcm.shape[1]


def test_guidance_changes_the_speech():
    said = [both(name)[0][0].frames_KF.tobytes() for name, case in CASES.items() if case.prefixes == (6, 3)]
    assert len(set(said)) == len(said) == 3


DRAWS, TEMPERATURE, TOP_K = 20_000, 0.8, (12, 4)  # of text and of audio
VOICE, GUIDANCE = 0, 1.5
TEXT = 70  # a word begins and its first token is 5


@functools.cache
def first_scores() -> list[torch.Tensor]:
    """Return the reference's scores [V] of the first text token, and of the first code where the text is `TEXT`."""
    model = references.load_tts(references.kyutai_tts(), How())
    lm, attributes = model.lm, [model.make_condition_attributes([references.voice(VOICE)], cfg_coef=GUIDANCE)]
    with references.inference(), lm.streaming(1):
        told = lm.condition_provider.prepare_and_provide(attributes)
        hidden, text = lm.forward_text(lm._get_initial_token(), lm.fuser.get_sum(told), lm.fuser.get_cross(told))
        with lm.depformer.streaming(1):
            return [text.flatten(), lm.forward_depformer(0, torch.tensor([[[TEXT]]]), hidden).flatten()]


@functools.cache
def first_choices() -> list[np.ndarray]:
    """Count how often the program chooses each of these tokens [V], by as many keys as there are draws."""
    _, lm, _ = ours("speakers")
    keys_B2 = jax.vmap(jax.random.PRNGKey)(jnp.arange(DRAWS))

    def choose(logits_1V: jax.Array, stream: int) -> jax.Array:
        logits_BV = jnp.broadcast_to(logits_1V, (DRAWS, logits_1V.shape[1]))
        draws_B = jax.vmap(lambda key_2: jax.random.fold_in(jax.random.fold_in(key_2, 0), stream))(keys_B2)
        top_k_B, temperature_B = jnp.full(DRAWS, TOP_K[stream]), jnp.full(DRAWS, TEMPERATURE)
        return sample(logits_BV, draws_B, temperature_B, top_k_B, max_top_k=top_k_capacity(*TOP_K))

    def pure(lm: DelayedStreamsLM, conditions: Conditions) -> list[jax.Array]:
        hidden_1TD, _ = lm.step(lm.initial_M[None, :, None], lm.init_state(1), None, conditions)
        drawn = [choose(lm.text_logits(hidden_1TD)[:, 0], 0)]

        def walk(_: int, logits_1V: jax.Array) -> jax.Array:
            drawn.append(choose(logits_1V, 1))
            return drawn[1][:1]

        lm.depformer.walk(hidden_1TD[:, 0], jnp.array([TEXT], jnp.int32), walk, codebooks=1)
        return drawn

    values, masks, _ = voices.conditions(lm.config, [steps_of("speakers", (VOICE,))], GUIDANCE)
    drawn = jax.jit(pure)(lm, jax.jit(lambda lm, values, masks: lm.condition(values, masks))(lm, values, masks))
    return [
        np.bincount(tokens_B, minlength=scores.numel()) for tokens_B, scores in zip(drawn, first_scores(), strict=True)
    ]


def probabilities(scores_V: torch.Tensor, temperature: float, top_k: int) -> np.ndarray:
    """Softmax among the k most probable, 0 for the others [V]."""
    best = torch.topk(scores_V, top_k)
    probability_V = torch.zeros_like(scores_V)
    probability_V[best.indices] = torch.softmax(best.values / temperature, -1)
    return probability_V.double().numpy()


def deviations(count_V: np.ndarray, probability_V: np.ndarray) -> float:
    """Chi-square of counts, in its standard deviations above its mean; infinite if there is what cannot be."""
    if count_V[probability_V == 0].any():
        return float("inf")
    kept_V = probability_V > 0
    expected_K = count_V.sum() * probability_V[kept_V]
    freedom = kept_V.sum() - 1
    return float((((count_V[kept_V] - expected_K) ** 2 / expected_K).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("stream", [0, 1])
def test_first_tokens_come_as_often_as_moshis_should(stream):
    scores_V, top_k = first_scores()[stream], TOP_K[stream]
    wanted_V = probabilities(scores_V, TEMPERATURE, top_k)
    assert deviations(first_choices()[stream], wanted_V) < 5
    torch.manual_seed(0)
    moshis_B = sample_token(scores_V.expand(DRAWS, 1, -1), True, TEMPERATURE, top_k).flatten()
    assert deviations(np.bincount(moshis_B, minlength=wanted_V.size), wanted_V) < 5
    for temperature, other_k in [(0.9, top_k), (0.7, top_k), (TEMPERATURE, top_k + 1), (TEMPERATURE, top_k - 1)]:
        assert deviations(first_choices()[stream], probabilities(scores_V, temperature, other_k)) > 5
