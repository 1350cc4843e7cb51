"""Count word and character errors, and estimate how far chance may have moved them.

The formulas are those of kyutai-labs/delayed-streams-modeling scripts/stt_evaluate_on_dataset.py: errors over words of
all recordings together (corpus WER), and means over recordings (mean WER, CER), by jiwer.

Shape letters: B resamples, N recordings.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsm_jax.errors import EvaluationError
from dsm_jax.evaluation.extras import needed

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors of one transcript.

    Attributes:
      words: number of words of the reference.
      substituted, inserted, deleted: numbers of edits that turn the reference into the transcript, as few as possible.
      wer: edits per word of the reference.
      cer: edits of characters, per character of the reference.
    """

    words: int
    substituted: int
    inserted: int
    deleted: int
    wer: float
    cer: float

    @property
    def total(self) -> int:
        """All edits together."""
        return self.substituted + self.inserted + self.deleted


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range that holds the true figure with a confidence of 95 %."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Intervals:
    """The intervals of an evaluation's figures, each a fraction as the figure is."""

    corpus_wer: Interval
    mean_wer: Interval
    cer: Interval


def score(reference: str, transcript: str) -> Errors:
    """Count the errors of a transcript.

    Args:
      reference: the right transcript, normalized; not empty.
      transcript: the model's transcript, normalized.

    Raises:
      EvaluationError: the reference has no words, so that no rate can be formed; or jiwer is not installed.
    """
    with needed():
        import jiwer
    if not reference.strip():
        raise EvaluationError("the reference has no words, and errors are counted per word; leave the recording out")
    result = jiwer.process_words(reference, transcript)
    words = result.hits + result.substitutions + result.deletions
    edits = (result.substitutions, result.insertions, result.deletions)
    return Errors(words, *edits, wer=float(result.wer), cer=float(jiwer.cer(reference, transcript)))


def correct_words(reference: Sequence[str], transcript: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the positions of each correct word in the reference and in the transcript.

    Args:
      reference: words of the right transcript, normalized, without spaces inside.
      transcript: words of the model's transcript, likewise.

    Raises:
      EvaluationError: jiwer is not installed.
    """
    with needed():
        import jiwer
    for chunk in jiwer.process_words(" ".join(reference), " ".join(transcript)).alignments[0]:
        if chunk.type == "equal":
            places = range(chunk.ref_start_idx, chunk.ref_end_idx)
            yield from zip(places, range(chunk.hyp_start_idx, chunk.hyp_end_idx), strict=True)


def corpus_wer(errors: Sequence[Errors]) -> float:
    """Divide the number of edits of all recordings by the number of words of all references."""
    return sum(one.total for one in errors) / sum(one.words for one in errors)


def mean_wer(errors: Sequence[Errors]) -> float:
    """Average the word error rates of recordings; short ones weigh as much as long ones."""
    return sum(one.wer for one in errors) / len(errors)


def mean_cer(errors: Sequence[Errors]) -> float:
    """Average the character error rates of recordings."""
    return sum(one.cer for one in errors) / len(errors)


def intervals(errors: Sequence[Errors], *, resamples: int, seed: int) -> Intervals | None:
    """Resample recordings with replacement (percentile bootstrap) and take the middle 95 % of each figure.

    Args:
      errors: errors of each recording.
      resamples: number of resamples; 0 for no intervals.
      seed: seed of the resampling.

    Returns:
      The intervals; None without resamples, and for fewer than two recordings, whose figures chance cannot vary.
    """
    if not resamples or len(errors) < 2:
        return None
    table_N4 = np.array([(one.total, one.words, one.wer, one.cer) for one in errors], float)
    sums_B4 = _resample(lambda rows_N: table_N4[rows_N].sum(0), len(errors), resamples, seed)
    means = sums_B4[:, 2] / len(errors), sums_B4[:, 3] / len(errors)
    return Intervals(_middle(sums_B4[:, 0] / sums_B4[:, 1]), *map(_middle, means))


def paired_interval(before: Sequence[Errors], after: Sequence[Errors], *, resamples: int, seed: int) -> Interval | None:
    """Resample the same recordings of two evaluations and take the middle 95 % of the difference of corpus WER.

    Args:
      before: errors of each recording in one evaluation.
      after: errors of the same recordings in the other evaluation, in the same order.
      resamples: number of resamples; 0 for no interval.
      seed: seed of the resampling.

    Returns:
      The interval of after - before; None where `intervals` gives none.
    """
    if not resamples or len(before) < 2:
        return None
    edits_N3 = np.array([(b.total, a.total, b.words) for b, a in zip(before, after, strict=True)], float)
    sums_B3 = _resample(lambda rows_N: edits_N3[rows_N].sum(0), len(before), resamples, seed)
    return _middle((sums_B3[:, 1] - sums_B3[:, 0]) / sums_B3[:, 2])


def _resample(statistic: Callable[[np.ndarray], np.ndarray], recordings: int, resamples: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([statistic(random.integers(0, recordings, recordings)) for _ in range(resamples)])


def _middle(values_B: np.ndarray) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values_B, (tail, 1 - tail))
    return Interval(float(low), float(high))
