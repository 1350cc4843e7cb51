"""Count word errors of transcripts, and measure how far the starts of their correct words are from the truth."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

import dsm_jax
from dsm_jax.evaluation import metrics
from dsm_jax.evaluation.metrics import Errors
from dsm_jax.training.data import WordSpan


@dataclasses.dataclass(frozen=True)
class WordErrors:
    """Errors of several transcripts.

    Attributes:
      errors: of each transcript.
      start_errors: start of each correct word minus its reference start, in seconds.
    """

    errors: tuple[Errors, ...]
    start_errors: tuple[float, ...]

    def __str__(self) -> str:
        words = sum(one.words for one in self.errors)
        kinds = ("substituted", "inserted", "deleted")
        edits = ", ".join(f"{sum(getattr(one, kind) for one in self.errors)} {kind}" for kind in kinds)
        rate = f"word error rate {100 * metrics.corpus_wer(self.errors):.2f} % of {words} words ({edits})"
        if not self.start_errors:
            return rate
        return f"{rate}; word starts off by {1000 * np.median(np.abs(self.start_errors)):.0f} ms (median)"


def word_errors(pairs: Iterable[tuple[Sequence[WordSpan], dsm_jax.Transcript]]) -> WordErrors:
    """Count the errors of transcripts against their reference words, by the words' spelling in lower case."""
    errors, start_errors = [], []
    for spans, transcript in pairs:
        reference, found = ([word.text.lower() for word in words] for words in (spans, transcript.words))
        errors.append(metrics.score(" ".join(reference), " ".join(found)))
        for i, j in metrics.correct_words(reference, found):
            start_errors.append(transcript.words[j].start - spans[i].start)
    return WordErrors(tuple(errors), tuple(start_errors))


def evaluate(model: dsm_jax.Model, utterances: Sequence[tuple[np.ndarray, Sequence[WordSpan]]]) -> WordErrors:
    """Transcribe utterances, given as (samples at the model's rate, reference words), and count the errors."""
    transcripts = dsm_jax.transcribe(model, [pcm_T for pcm_T, _ in utterances], batch_size=16)
    return word_errors(zip((words for _, words in utterances), transcripts, strict=True))
