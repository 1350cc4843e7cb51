"""Requests of every kind through few slots: each is as it is alone, whatever runs beside it, by one compilation."""

import dataclasses

import numpy as np
import pytest

import dsm_jax
from dsm_jax.runtime.compile import compilations
from dsm_jax.stt import Prompt, TranscribeOptions
from dsm_jax.stt.batch import CHUNK_FRAMES
from dsm_jax.stt.transcriber import FileSession, Transcriber
from dsm_jax.tts import Request, SynthesizeOptions, synthesize_each
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer
from tests.helpers import stt_model, tts_model

pytestmark = pytest.mark.slow

REQUESTS, SLOTS = 64, 8
WORDS = [
    *("good", "morning", "everyone", "thank", "you", "for", "coming", "to", "the"),
    *("station", "at", "noon", "what", "time", "does", "the", "train", "leave"),
]
PROMPTS = (None, "the quick fox", "hello there", "one two")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return tts_model.random_model(tmp_path_factory.mktemp("speakers"))


@pytest.fixture(scope="module")
def listener():
    return stt_model.model()


def speech_request(number: int) -> Request:
    """One of 1 to 40 words, with one voice or two, of 1 to 3 steps, with or without breaks, in turns or not."""
    random = np.random.default_rng(number)
    length = 1 + int(39 * (number / (REQUESTS - 1)) ** 2)
    words = [str(word) for word in random.choice(WORDS, length)]
    if number % 3 == 0:
        words.insert(length // 2, '<break time="0.4s"/>')
    text = " ".join(words)
    half = length // 2
    turns = (" ".join(words[:half]), " ".join(words[half:])) if number % 4 == 1 and half else text
    voices = tuple(tts_model.voice(10 * number + n, steps=1 + number % 3) for n in range(1 + number % 2))
    options = SynthesizeOptions(
        temperature=(0.0, 0.4, 0.8, 1.0)[number % 4],
        guidance_scale=(1.0, 2.0, 3.0)[number % 3],
        top_k_text=(5, 25, 0)[number % 3],
        top_k=(3, 8, 250)[number % 3],
        codebooks=1 + number % 2,
        padding_between=number % 2,
        padding_bonus=(0.0, 1.0, -0.5)[number % 3],
        seed=number,
    )
    return Request(turns, voices, options=options)


def transcription(number: int) -> tuple[np.ndarray, TranscribeOptions]:
    """Return a recording of 0.1 to 1.9 s, with a prompt or without, by a temperature and a seed of its own.

    Recordings that start 1,500 samples apart have a frame nearly midway between two codebook entries (the distances
    differ by 4e-5), and the rounding of a batch (3e-6 of the latents) takes the other one.
    """
    pcm, start = stt_model.recording(), 1_400 * number
    options = TranscribeOptions(
        prompt=Prompt(text=PROMPTS[number % 4], exclude_from_output=bool(number % 8 > 3)),
        temperature=(0.0, 0.5, 1.0)[number % 3],
        top_k=(0, 5, 20)[(number // 3) % 3],
        seed=number,
    )
    return pcm[start : start + 2_400 + 700 * number], options


def synthesizer_of(model, requests: list[Request]) -> tuple[Synthesizer, list]:
    synthesizer = Synthesizer(model, SLOTS, [request.options for request in requests])
    prepared = [synthesizer.prepare(request, SynthesizeOptions()) for request in requests]
    synthesizer.slots_for(*prepared)
    return synthesizer, prepared


def test_speech_requests_of_every_kind_through_few_slots_are_as_alone(speaker):
    requests = [speech_request(number) for number in range(REQUESTS)]
    together = dict(synthesize_each(speaker, requests, batch_size=SLOTS))
    before = compilations()
    again = dict(synthesize_each(speaker, requests[::-1], batch_size=SLOTS))
    assert compilations() == before, "nothing is compiled for another order of requests"
    assert len({speech.pcm.tobytes() for speech in together.values()}) == REQUESTS
    for number, request in enumerate(requests):
        alone = dsm_jax.synthesize(speaker, request)
        for found in (together[number], again[REQUESTS - 1 - number]):
            np.testing.assert_array_equal(found.frames, alone.frames, err_msg=f"request {number}")
            assert found.words == alone.words


def test_cancelling_speech_at_random_changes_no_other(speaker):
    requests = [speech_request(number) for number in range(24)]
    wanted = dict(synthesize_each(speaker, requests, batch_size=SLOTS))
    synthesizer, prepared = synthesizer_of(speaker, requests)
    slots, random = synthesizer.slots_for(), np.random.default_rng(0)
    sessions = [SpeechSession(speaker, one, index=index) for index, one in enumerate(prepared)]
    waiting, done, cancelled = list(sessions), [], 0
    while waiting or any(slots.sessions):
        free = len(slots.free)
        slots.admit(waiting[:free])
        waiting = waiting[free:]
        done += slots.step(waiting=bool(waiting))
        running = [session for session in slots.sessions if session is not None]
        if running and random.random() < 0.25:
            slots.cancel(running[random.integers(len(running))])
            cancelled += 1
    done += slots.drain()
    assert cancelled > 3
    assert len(done) == len(sessions) - cancelled > 5
    for session in done:
        np.testing.assert_array_equal(session.speech().frames, wanted[session.index].frames)


def same_as_alone(found, alone) -> None:
    """Assert equal tokens, text and words."""
    assert found.frames.text_tokens == alone.frames.text_tokens
    assert found.text == alone.text
    stt_model.check_same(found.words, alone.words)


def test_recordings_of_every_kind_through_few_slots_are_as_alone(listener):
    recordings, options = zip(*map(transcription, range(REQUESTS)), strict=True)
    together = dsm_jax.transcribe(listener, list(recordings), options=options, batch_size=SLOTS, frames=True)
    before = compilations()
    dsm_jax.transcribe(listener, list(recordings[::-1]), options=options[::-1], batch_size=SLOTS)
    assert compilations() == before
    assert len({transcript.frames.text_tokens for transcript in together}) > 0.9 * REQUESTS
    for number, found in enumerate(together):
        alone = dsm_jax.transcribe(listener, recordings[number], options=options[number], frames=True)
        same_as_alone(found, alone)


def test_cancelling_transcriptions_at_random_changes_no_other(listener):
    recordings, options = zip(*map(transcription, range(24)), strict=True)
    wanted = dsm_jax.transcribe(listener, list(recordings), options=options, batch_size=SLOTS, frames=True)
    transcriber, random = Transcriber(listener, SLOTS, (CHUNK_FRAMES,), options), np.random.default_rng(0)
    sessions = [
        FileSession(transcriber, transcriber.utterance(n), n, recordings[n], keep_frames=True) for n in range(24)
    ]
    slots, waiting, done, cancelled = transcriber.slots, list(sessions), [], 0
    while waiting or any(slots.sessions):
        free = len(slots.free)
        slots.admit(waiting[:free])
        waiting = waiting[free:]
        done += slots.step()
        running = [session for session in slots.sessions if session is not None]
        if running and random.random() < 0.7:
            slots.cancel(running[random.integers(len(running))])
            cancelled += 1
    done += slots.drain()
    assert cancelled > 3
    assert len(done) == len(sessions) - cancelled > 5
    for session in done:
        same_as_alone(session.transcript(None), wanted[session.index])


def test_as_many_options_as_recordings_are_needed(listener):
    recording, options = transcription(0)
    with pytest.raises(dsm_jax.DsmError, match="3 recordings have 2 options; give one for all, or one each"):
        dsm_jax.transcribe(listener, [recording] * 3, options=[options] * 2)


def test_options_of_a_request_that_do_not_fit_cost_only_that_request(speaker):
    bad = dataclasses.replace(speech_request(1), options=SynthesizeOptions(codebooks=30))
    results = dict(synthesize_each(speaker, [speech_request(0), bad], batch_size=2))
    assert "30 codebooks are to be generated" in str(results[1])
    assert results[0].words
