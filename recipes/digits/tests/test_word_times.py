"""Deviations of word times, from made-up transcripts."""

from types import SimpleNamespace

import numpy as np
import pytest

import dsm_jax
from dsm_jax import Word
from dsm_jax.training.data import WordSpan
from recipes.digits import word_times
from recipes.digits.utterances import Clip

SPANS = [WordSpan("one", 1.0, 1.5, "anna"), WordSpan("two", 4.0, 4.5, "anna"), WordSpan("six", 7.0, 7.5, "anna")]


def words(*times: tuple[str, float, float]) -> list[Word]:
    return [Word(text, start, end, 0.9) for text, start, end in times]


def deviations(monkeypatch, whole: list[Word], live: list[Word], told: list[float]) -> word_times.Deviations:
    def stream(model, chunks):
        sent, events = 0.0, list(zip(live, told, strict=True))
        for chunk in chunks:
            sent += len(chunk) / word_times.RATE
            while events and sent >= events[0][1] - 1e-6:
                yield dsm_jax.WordEnded(events.pop(0)[0])

    monkeypatch.setattr(dsm_jax, "transcribe", lambda model, recordings: [SimpleNamespace(words=whole)])
    monkeypatch.setattr(dsm_jax, "transcribe_stream", stream)
    return word_times.deviations(None, [(np.zeros(10 * word_times.RATE, np.float32), SPANS)])


def test_the_times_of_words_are_compared_with_the_truth_word_by_word(monkeypatch):
    found = words(("one", 1.02, 1.6), ("seven", 4.0, 4.5), ("six", 6.9, 9.5))
    off = deviations(monkeypatch, found, found, [1.6, 4.8, 9.6])
    np.testing.assert_allclose(off.starts, [0.02, -0.1], atol=1e-6)
    np.testing.assert_allclose(off.ends, [0.1, 2.0], atol=1e-6)
    assert off.same == 1
    assert off.late.max() == pytest.approx(9.6 - 7.5)
    assert str(off) == (
        "1 recordings with pauses, 2 of 3 words: ends off by 1050 ms (median), 1905 ms (95 %); "
        "starts off by 60 ms (median), 96 ms (95 %); 1 ends over 0.5 s in a pause; 1 streams equal the whole "
        "recording; words end 2.10 s after their sound at the latest"
    )


def test_a_stream_that_tells_other_times_is_not_the_same(monkeypatch):
    whole, live = words(("one", 1.0, 1.5), ("two", 4.0, 4.5)), words(("one", 1.0, 1.5), ("two", 4.0, 4.6))
    assert deviations(monkeypatch, whole, live, [2.0, 5.0]).same == 0


def test_words_lie_in_pauses_where_the_truth_says():
    pcm_T = np.zeros(8000, np.float32)
    pcm_T[2000:6000] = np.sin(np.arange(4000))
    pcm_T, spans = word_times.with_pauses(np.random.default_rng(0), [Clip("one", "anna", pcm_T, 0.25, 0.75)])
    assert 3 <= len(spans) <= 5
    loud = np.zeros(len(pcm_T), bool)
    for span in spans:
        loud[round(span.start * word_times.RATE) : round(span.end * word_times.RATE)] = True
    pauses = np.diff([0.0, *(at for span in spans for at in (span.start, span.end))])[::2]
    assert ((word_times.PAUSES[0] - 1e-3 <= pauses) & (pauses <= word_times.PAUSES[1] + 1e-3)).all()
    assert np.sqrt(np.mean(pcm_T[loud] ** 2)) > 0.1
    assert np.sqrt(np.mean(pcm_T[~loud] ** 2)) < 0.005
