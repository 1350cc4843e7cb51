"""How good a model is: word error rate, and how far off word times are."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.stt import transcribe
from dsm_jax.stt.transcript import Transcript
from dsm_jax.training.compose import Spoken


@dataclasses.dataclass(frozen=True)
class Figures:
    """What transcripts come to, against what was said.

    Attributes:
      words: said.
      substituted, inserted, deleted: the edits that turn what was said into what was transcribed.
      start_errors: seconds that each word which was got right starts too late, or early if negative.
    """

    words: int
    substituted: int
    inserted: int
    deleted: int
    start_errors: tuple[float, ...]

    @property
    def word_error_rate(self) -> float:
        """Edits per word said; of nothing said, the number of words inserted."""
        return (self.substituted + self.inserted + self.deleted) / max(self.words, 1)

    @property
    def start_error(self) -> float:
        """Median of the absolute errors, seconds; NaN where no word was right."""
        return float(np.median(np.abs(self.start_errors))) if self.start_errors else float("nan")

    def __add__(self, other: "Figures") -> "Figures":
        ours, theirs = (dataclasses.astuple(figures) for figures in (self, other))
        return Figures(*(a + b for a, b in zip(ours, theirs, strict=True)))

    def __str__(self) -> str:
        edits = f"{self.substituted} substituted, {self.inserted} inserted, {self.deleted} deleted"
        rate = f"word error rate {100 * self.word_error_rate:.2f} % of {self.words} words ({edits})"
        return f"{rate}; word starts off by {1000 * self.start_error:.0f} ms (median)"


def compare(said: Sequence[Spoken], heard: Transcript) -> Figures:
    """The figures of one recording; words are compared as they are spelt, in lower case."""
    import jiwer

    reference, hypothesis = [w.text.lower() for w in said], [w.text.lower() for w in heard.words]
    if not reference:
        return Figures(0, 0, len(hypothesis), 0, ())
    result = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    errors = [
        heard.words[chunk.hyp_start_idx + i].start - said[chunk.ref_start_idx + i].start
        for chunk in result.alignments[0]
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]
    return Figures(len(reference), result.substitutions, result.insertions, result.deletions, tuple(errors))


def compare_all(pairs: Iterable[tuple[Sequence[Spoken], Transcript]]) -> Figures:
    """The figures of many recordings together."""
    return sum((compare(said, heard) for said, heard in pairs), Figures(0, 0, 0, 0, ()))


def measure(model: Model, recordings: Sequence[tuple[np.ndarray, Sequence[Spoken]]]) -> Figures:
    """What a model makes of recordings: samples at its rate, and the words said in them."""
    heard = transcribe(model, [pcm_T for pcm_T, _ in recordings], batch_size=16)
    return compare_all(zip((said for _, said in recordings), heard, strict=True))
