"""The model inside the package that speaks: what it says is heard, in every voice, whole and live."""

import functools
from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax.errors import CheckpointError, SpeechError
from dsm_jax.evaluation.metrics import corpus_wer
from dsm_jax.training.data import WordSpan
from dsm_jax.tts import Request, Speech, blend, read_voice, synthesize_each, voices_of
from recipes.digits.word_errors import word_errors

pytestmark = pytest.mark.slow

ASSETS = Path(__file__).resolve().parents[1] / "dsm_jax/assets/digits-tts"
VOICES = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TEXTS = ("zero one two three four", "five six seven eight nine")


@functools.cache
def speaker() -> dsm_jax.Model:
    return dsm_jax.load("digits-tts")


def test_it_is_small_and_has_six_voices():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert tuple(voices_of(speaker())) == VOICES
    assert (ASSETS / "README.md").is_file()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_its_speech_is_transcribed_as_its_text(quantize):
    model = dsm_jax.load("digits-tts", quantize=quantize)
    requests = [Request(text, (voice,), seed=1) for voice in VOICES for text in TEXTS]
    said = [result for _, result in synthesize_each(model, requests, batch_size=12) if isinstance(result, Speech)]
    assert len(said) == len(VOICES) * len(TEXTS)
    heard = dsm_jax.transcribe(dsm_jax.load("digits"), said, batch_size=12)
    words = [[WordSpan(word.text, word.start, word.end) for word in speech.words] for speech in said]
    figures = word_errors(zip(words, heard, strict=True))
    assert sum(one.words for one in figures.errors) == 10 * len(VOICES)
    assert corpus_wer(figures.errors) <= 0.08  # of so few words; the model card has the rate
    assert np.median(np.abs(figures.start_errors)) <= 0.12


def test_live_speech_is_the_same():
    whole = dsm_jax.synthesize(speaker(), TEXTS[0], voice="theo")
    live = np.concatenate(
        list(dsm_jax.synthesize_stream(speaker(), iter(["zero on", "e two three ", "four"]), voice="theo"))
    )
    np.testing.assert_allclose(live, whole.pcm, rtol=0, atol=1e-5)


def test_voices_differ_and_can_be_blended():
    theo, lucas = (read_voice(name, speaker()) for name in ("theo", "lucas"))
    made = [dsm_jax.synthesize(speaker(), "one two", voice=voice) for voice in (theo, lucas, blend([theo, lucas]))]
    assert len({speech.frames.tobytes() for speech in made}) == 3


def test_a_voice_that_is_missing_or_unknown_is_answered_with_those_that_it_has():
    own = r"george, jackson, lucas, nicolas, theo, yweweler$"
    with pytest.raises(SpeechError, match=rf"^digits-tts needs a voice, and was given none; its own are {own}"):
        dsm_jax.synthesize(speaker(), "one")
    message = rf"^the voice ann is not a file; give a voice's safetensors file, or one of the model's own: {own}"
    with pytest.raises(CheckpointError, match=message):
        dsm_jax.synthesize(speaker(), "one", voice="ann")
