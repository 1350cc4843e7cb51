"""Compare two evaluations of the same recordings."""

import dataclasses
from typing import Any

from dsm_jax.errors import EvaluationError, plural
from dsm_jax.evaluation import metrics
from dsm_jax.evaluation.metrics import Interval
from dsm_jax.evaluation.results import Evaluation, FileResult
from dsm_jax.evaluation.tables import aligned, percent


@dataclasses.dataclass(frozen=True)
class Change:
    """One recording in both evaluations."""

    before: FileResult
    after: FileResult

    @property
    def difference(self) -> float:
        """Word error rate after, less that before: below 0 is better."""
        return self.after.wer - self.before.wer


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side, on the recordings that both have.

    Attributes:
      before, after: the evaluations, of those recordings alone.
      changes: change of each recording, in the order of the first evaluation.
      left_out: recordings that only one of the two has.
      interval: interval of the difference of corpus WER, paired by recording, at 95 %; None where there is none.
    """

    before: Evaluation
    after: Evaluation
    changes: tuple[Change, ...]
    left_out: int
    interval: Interval | None

    @property
    def difference(self) -> float:
        """Corpus WER after, less that before: below 0 is better."""
        return self.after.corpus_wer - self.before.corpus_wer

    def better(self, count: int) -> tuple[Change, ...]:
        """List the recordings that improved most, the largest change first."""
        improved = [change for change in self.changes if change.difference < 0]
        return tuple(sorted(improved, key=lambda change: (change.difference, change.before.id))[:count])

    def worse(self, count: int) -> tuple[Change, ...]:
        """List the recordings that got worse most, the largest change first."""
        worsened = [change for change in self.changes if change.difference > 0]
        return tuple(sorted(worsened, key=lambda change: (-change.difference, change.before.id))[:count])

    def table(self, count: int = 5) -> str:
        """Return a table of the figures of both evaluations, and of the recordings that changed most.

        Args:
          count: number of recordings listed among those that improved, and among those that got worse.
        """
        a, b = self.before, self.after
        rows = [("", "A", "B", "B - A"), ("model", a.model, b.model, "")]
        for name, label in (("corpus_wer", "corpus WER"), ("mean_wer", "mean WER"), ("cer", "mean CER")):
            before, after = getattr(a, name), getattr(b, name)
            rows.append((label, percent(before), percent(after), _signed(after - before)))
        speeds = f"{a.speed:.2f}", f"{b.speed:.2f}"
        rows.append(("speed", *speeds, f"{b.speed / a.speed:.2f} times"))
        lines = [
            f"{plural(len(self.changes), 'recording')} in both, {self.left_out} in one only",
            aligned(rows, "<>>>"),
        ]
        if self.interval is not None:
            low, high = self.interval.low, self.interval.high
            verdict = "0 is outside" if low > 0 or high < 0 else "0 is inside: it may be chance"
            lines.append(f"corpus WER, B - A, 95 %: {_signed(low)} to {_signed(high)}; {verdict}")
        for title, changes in (("better", self.better(count)), ("worse", self.worse(count))):
            if changes:
                rows = [
                    (c.before.id, percent(c.before.wer), percent(c.after.wer), _signed(c.difference)) for c in changes
                ]
                lines += ["", aligned([(title, "A", "B", "B - A"), *rows], "<>>>")]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Turn the comparison into values that `json` can write."""
        return {
            "before": {"model": self.before.model, "corpus_wer": self.before.corpus_wer},
            "after": {"model": self.after.model, "corpus_wer": self.after.corpus_wer},
            "difference": self.difference,
            "interval": None if self.interval is None else dataclasses.asdict(self.interval),
            "recordings": len(self.changes),
            "left_out": self.left_out,
        }


def compare(before: Evaluation, after: Evaluation, *, bootstrap: int = 1000, seed: int = 0) -> Comparison:
    """Compare two evaluations by the recordings that both have.

    Args:
      before: evaluation A.
      after: evaluation B.
      bootstrap: resamples for the interval of the difference; 0 for none.
      seed: seed of the resampling.

    Raises:
      EvaluationError: the two have no recording in common, or their references or normalizers differ.
    """
    if before.normalizer != after.normalizer:
        raise EvaluationError(
            f"the normalizers are {before.normalizer!r} and {after.normalizer!r}; evaluate both with one of them"
        )
    later = {row.id: row for row in after.files}
    changes = tuple(Change(row, later[row.id]) for row in before.files if row.id in later)
    if not changes:
        raise EvaluationError(
            f"{before.source} and {after.source} have no recording in common; evaluate both on the same data"
        )
    for change in changes:
        if change.before.normalized_reference != change.after.normalized_reference:
            raise EvaluationError(
                f"the references of {change.before.id} differ, {change.before.normalized_reference[:40]!r} and "
                f"{change.after.normalized_reference[:40]!r}; evaluate both on the same data"
            )
    a = dataclasses.replace(before, files=tuple(change.before for change in changes), intervals=None)
    b = dataclasses.replace(after, files=tuple(change.after for change in changes), intervals=None)
    interval = metrics.paired_interval(a.errors, b.errors, resamples=bootstrap, seed=seed)
    left_out = len(before.files) + len(after.files) - 2 * len(changes)
    return Comparison(a, b, changes, left_out, interval)


def _signed(fraction: float) -> str:
    return f"{100 * fraction:+.2f} %"
