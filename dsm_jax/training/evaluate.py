"""Evaluate transcription: word error rate, and errors of word times."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.stt import transcribe
from dsm_jax.stt.transcript import Transcript
from dsm_jax.training.data import WordSpan


@dataclasses.dataclass(frozen=True)
class WerStats:
    """Error counts of transcripts against reference words.

    Attributes:
      words: number of reference words.
      substituted, inserted, deleted: numbers of edits that turn the reference into the transcript.
      start_errors: start of each correct word minus its reference start, in seconds.
    """

    words: int = 0
    substituted: int = 0
    inserted: int = 0
    deleted: int = 0
    start_errors: tuple[float, ...] = ()

    @property
    def word_error_rate(self) -> float:
        """Return the edits per reference word; the number of inserted words if there are no reference words."""
        return (self.substituted + self.inserted + self.deleted) / max(self.words, 1)

    @property
    def start_error(self) -> float:
        """Median of the absolute start errors, in seconds; NaN if no word was correct."""
        return float(np.median(np.abs(self.start_errors))) if self.start_errors else float("nan")

    def __add__(self, other: "WerStats") -> "WerStats":
        ours, theirs = (dataclasses.astuple(stats) for stats in (self, other))
        return WerStats(*(a + b for a, b in zip(ours, theirs, strict=True)))

    def __str__(self) -> str:
        edits = f"{self.substituted} substituted, {self.inserted} inserted, {self.deleted} deleted"
        rate = f"word error rate {100 * self.word_error_rate:.2f} % of {self.words} words ({edits})"
        return f"{rate}; word starts off by {1000 * self.start_error:.0f} ms (median)"


def word_errors(reference: Sequence[WordSpan], transcript: Transcript) -> WerStats:
    """Count the errors of one transcript; words are compared by their spelling in lower case."""
    import jiwer

    expected, found = [w.text.lower() for w in reference], [w.text.lower() for w in transcript.words]
    if not expected:
        return WerStats(inserted=len(found))
    result = jiwer.process_words(" ".join(expected), " ".join(found))
    errors = [transcript.words[j].start - reference[i].start for i, j in correct_words(result)]
    return WerStats(len(expected), result.substitutions, result.insertions, result.deletions, tuple(errors))


def correct_words(result: Any) -> Iterator[tuple[int, int]]:
    """Yield the positions of each correct word in the reference and in the transcript.

    Args:
      result: of `jiwer.process_words` for one reference.
    """
    for chunk in result.alignments[0]:
        if chunk.type == "equal":
            reference = range(chunk.ref_start_idx, chunk.ref_end_idx)
            yield from zip(reference, range(chunk.hyp_start_idx, chunk.hyp_end_idx), strict=True)


def total_word_errors(pairs: Iterable[tuple[Sequence[WordSpan], Transcript]]) -> WerStats:
    """Count the errors of many transcripts together."""
    return sum((word_errors(reference, transcript) for reference, transcript in pairs), WerStats())


def evaluate(model: Model, recordings: Sequence[tuple[np.ndarray, Sequence[WordSpan]]]) -> WerStats:
    """Transcribe recordings, given as (samples at the model's rate, reference words), and count the errors."""
    transcripts = transcribe(model, [pcm_T for pcm_T, _ in recordings], batch_size=16)
    return total_word_errors(zip((reference for _, reference in recordings), transcripts, strict=True))
