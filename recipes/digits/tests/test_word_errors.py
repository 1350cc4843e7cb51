"""Counting errors of transcripts: edits, and errors of word starts."""

import pytest

from dsm_jax.evaluation.metrics import corpus_wer
from dsm_jax.stt.events import Word
from dsm_jax.stt.transcript import Transcript
from dsm_jax.training.data import WordSpan
from recipes.digits.word_errors import word_errors

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
    found = word_errors([(REFERENCE, transcript(*words))])
    assert (found.errors[0].substituted, found.errors[0].inserted, found.errors[0].deleted) == edits
    assert corpus_wer(found.errors) == pytest.approx(sum(edits) / 3)
    assert found.start_errors == pytest.approx(late)


def test_errors_of_several_recordings_are_counted_together():
    pairs = [
        (REFERENCE, transcript(("one", 0.04), ("two", 0.5), ("three", 1.0))),
        (REFERENCE[:1], transcript(("nine", 0.0))),
    ]
    assert str(word_errors(pairs)) == (
        "word error rate 25.00 % of 4 words (1 substituted, 0 inserted, 0 deleted); word starts off by 0 ms (median)"
    )
    assert str(word_errors(pairs[1:])) == "word error rate 100.00 % of 1 words (1 substituted, 0 inserted, 0 deleted)"
