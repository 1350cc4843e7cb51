"""Counting errors of transcripts: edits, and errors of word starts."""

import math

import pytest

from dsm_jax.stt.events import Word
from dsm_jax.stt.transcript import Transcript
from dsm_jax.training.data import WordSpan
from dsm_jax.training.evaluate import total_word_errors, word_errors

REFERENCE = [WordSpan("one", 0.0, 0.3), WordSpan("two", 0.5, 0.8), WordSpan("three", 1.0, 1.4)]


def transcript(*words: tuple[str, float]) -> Transcript:
    texts = tuple(Word(text, start, start + 0.2, 1.0) for text, start in words)
    return Transcript(" ".join(text for text, _ in words), texts, (), 2.0, None, None, "test")


@pytest.mark.parametrize(
    ("words", "edits", "late"),
    [
        ([("one", 0.1), ("two", 0.5), ("three", 0.9)], (0, 0, 0), (0.1, 0.0, -0.1)),
        ([("One", 0.1), ("three", 0.9)], (0, 0, 1), (0.1, -0.1)),
        ([("one", 0.0), ("two", 0.5), ("two", 0.6), ("three", 1.0)], (0, 1, 0), (0.0, 0.0, 0.0)),
        ([("one", 0.0), ("nine", 0.5), ("three", 1.2)], (1, 0, 0), (0.0, 0.2)),
        ([], (0, 0, 3), ()),
    ],
)
def test_edits_and_start_times(words, edits, late):
    stats = word_errors(REFERENCE, transcript(*words))
    assert (stats.substituted, stats.inserted, stats.deleted) == edits
    assert stats.word_error_rate == pytest.approx(sum(edits) / 3)
    assert stats.start_errors == pytest.approx(late)


def test_words_in_silence_are_all_inserted():
    assert word_errors([], transcript(("one", 0.0), ("two", 1.0))).word_error_rate == 2.0


def test_stats_of_several_recordings_add_up():
    pairs = [
        (REFERENCE, transcript(("one", 0.04), ("two", 0.5), ("three", 1.0))),
        (REFERENCE[:1], transcript(("nine", 0.0))),
    ]
    stats = total_word_errors(pairs)
    assert (stats.words, stats.word_error_rate) == (4, 0.25)
    assert stats.start_error == 0.0
    assert str(stats).startswith("word error rate 25.00 % of 4 words (1 substituted, 0 inserted, 0 deleted)")
    assert math.isnan(total_word_errors([]).start_error)
