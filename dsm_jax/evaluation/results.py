"""Hold the results of an evaluation: a row for each recording, and the figures of all together."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dsm_jax.errors import EvaluationError, plural
from dsm_jax.evaluation import metrics
from dsm_jax.evaluation.datasets import Failure
from dsm_jax.evaluation.files import encoded, replaced
from dsm_jax.evaluation.metrics import Errors, Interval, Intervals
from dsm_jax.evaluation.tables import aligned, percent
from dsm_jax.evaluation.transcription import TimedTranscript
from dsm_jax.files import decode_json


@dataclasses.dataclass(frozen=True)
class FileResult:
    """One recording.

    Attributes:
      id: its name in the data set.
      reference, normalized_reference: the right transcript, as it was given and as it was compared.
      normalized_hypothesis: the transcript as it was compared.
      errors: errors of the transcript.
      transcript: the model's transcript before it was normalized, and its times.
    """

    id: str
    reference: str
    normalized_reference: str
    normalized_hypothesis: str
    errors: Errors
    transcript: TimedTranscript

    @property
    def hypothesis(self) -> str:
        """The transcript before it was normalized."""
        return self.transcript.text

    @property
    def wer(self) -> float:
        """Word errors per word of the reference."""
        return self.errors.wer

    @property
    def cer(self) -> float:
        """Character errors per character of the reference."""
        return self.errors.cer

    @property
    def duration(self) -> float:
        """Seconds of audio."""
        return self.transcript.duration

    def to_dict(self) -> dict[str, Any]:
        """Turn the row into values that `json` can write."""
        timed = dataclasses.asdict(self.transcript)
        return {
            "id": self.id,
            "reference": self.reference,
            "hypothesis": timed.pop("text"),
            "normalized_reference": self.normalized_reference,
            "normalized_hypothesis": self.normalized_hypothesis,
            **dataclasses.asdict(self.errors),
            **timed,
        }


@dataclasses.dataclass(frozen=True)
class Latency:
    """The wait from a word until live transcription reports it, in seconds of audio fed meanwhile.

    Attributes:
      words: number of words whose ends were reported before the audio ended; the figures are of these words.
      flushed: number of words only reported after the end of the audio, whose wait is not known.
      start_median, start_95: from a word's start until its start was reported: the median, and what 95 % do not exceed.
      end_median, end_95: from a word's end until its end was reported.
    """

    words: int
    flushed: int
    start_median: float
    start_95: float
    end_median: float
    end_95: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The accuracy and speed of a model on a data set.

    Attributes:
      model, source: names of the model and the data set.
      normalizer: of both texts before they were compared.
      streaming: whether the recordings were fed live.
      files: a row for each recording that was evaluated, in the order of the data set.
      skipped: ids of recordings whose reference is empty once normalized, or marked as not to be scored.
      failed: recordings that could not be evaluated.
      intervals: in which 95 % of resampled data sets lie; None where there are none.
    """

    model: str
    source: str
    normalizer: str
    streaming: bool
    files: tuple[FileResult, ...]
    skipped: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()
    intervals: Intervals | None = None

    @property
    def errors(self) -> list[Errors]:
        """The errors of each recording."""
        return [row.errors for row in self.files]

    @property
    def corpus_wer(self) -> float:
        """Word errors of all recordings per word of all references."""
        return metrics.corpus_wer(self.errors)

    @property
    def mean_wer(self) -> float:
        """Mean of the word error rates of recordings."""
        return metrics.mean_wer(self.errors)

    @property
    def cer(self) -> float:
        """Mean of the character error rates of recordings."""
        return metrics.mean_cer(self.errors)

    @property
    def audio_seconds(self) -> float:
        """Length of all recordings together."""
        return sum(row.duration for row in self.files)

    @property
    def processing_seconds(self) -> float:
        """Wall time of the transcription: reading of audio included, loading, compilation and scoring not."""
        return sum(row.transcript.processing for row in self.files)

    @property
    def real_time_factor(self) -> float:
        """Seconds of processing per second of audio: low is fast."""
        return self.processing_seconds / self.audio_seconds

    @property
    def speed(self) -> float:
        """Seconds of audio per second of processing, the inverse of the real-time factor: high is fast."""
        return self.audio_seconds / self.processing_seconds

    @property
    def latency(self) -> Latency | None:
        """The wait for words; None unless streaming, and where all words came after the audio."""
        starts = [late for row in self.files for late in row.transcript.start_latencies]
        ends = [late for row in self.files for late in row.transcript.end_latencies]
        if not starts or not ends:
            return None
        quantiles = [float(q) for late in (starts, ends) for q in np.quantile(late, (0.5, 0.95))]
        return Latency(len(ends), sum(row.transcript.flushed for row in self.files), *quantiles)

    def worst(self, count: int) -> tuple[FileResult, ...]:
        """List the recordings with the highest word error rates, the worst first; none without an error."""
        wrong = [row for row in self.files if row.errors.total]
        return tuple(sorted(wrong, key=lambda row: (-row.wer, -row.errors.total, row.id))[:count])

    def table(self) -> str:
        """List the recordings: name, length, word error rate, and errors."""
        rows = [(row.id, f"{row.duration:.2f} s", percent(row.wer), _edits(row.errors)) for row in self.files]
        return aligned([("recording", "length", "WER", "errors"), *rows], "<>><")

    def summary(self) -> str:
        """Write the figures of all recordings together."""
        errors = self.errors
        words = sum(one.words for one in errors)
        counts = [sum(getattr(one, name) for one in errors) for name in ("substituted", "inserted", "deleted")]
        edits = ", ".join(f"{n} {what}" for n, what in zip(counts, ("substituted", "inserted", "deleted"), strict=True))
        found = self.intervals
        ranges = [_range(one) for one in (found.corpus_wer, found.mean_wer, found.cer)] if found else [""] * 3
        rows = [
            ("corpus WER", percent(self.corpus_wer), f"{ranges[0]}of {words} words: {edits}"),
            ("mean WER", percent(self.mean_wer), f"{ranges[1]}of {plural(len(errors), 'recording')}"),
            ("mean CER", percent(self.cer), ranges[2].rstrip("; ")),
            ("speed", f"{self.speed:.2f}", "seconds of audio per second of processing"),
            ("real-time factor", f"{self.real_time_factor:.4f}", "seconds of processing per second of audio"),
        ]
        if late := self.latency:
            spread = (
                f"median of {late.words} words, {late.start_95:.2f} s at 95 %; {late.flushed} reported after the audio"
            )
            rows.append(("start latency", f"{late.start_median:.2f} s", f"after a word began: {spread}"))
            rows.append(
                ("end latency", f"{late.end_median:.2f} s", f"after it ended: median, {late.end_95:.2f} s at 95 %")
            )
        lines = [f"{self.model} on {self.source}, normalizer {self.normalizer}{', live' * self.streaming}"]
        if self.skipped:
            lines.append(f"{plural(len(self.skipped), 'recording')} without words in the reference left out")
        if self.failed:
            lines.append(f"{plural(len(self.failed), 'recording')} could not be evaluated")
        return "\n".join(lines) + "\n" + aligned(rows, "<><")

    def to_dict(self) -> dict[str, Any]:
        """Turn the evaluation into values that `json` can write: figures first, then a row for each recording."""
        figures = ("corpus_wer", "mean_wer", "cer")
        speed = ("audio_seconds", "processing_seconds", "real_time_factor", "speed")
        edits = ("words", "substituted", "inserted", "deleted")
        return {
            "model": self.model,
            "source": self.source,
            "normalizer": self.normalizer,
            "streaming": self.streaming,
            **{name: getattr(self, name) for name in figures},
            "intervals": None if self.intervals is None else dataclasses.asdict(self.intervals),
            **{name: sum(getattr(one, name) for one in self.errors) for name in edits},
            **{name: getattr(self, name) for name in speed},
            "latency": None if self.latency is None else dataclasses.asdict(self.latency),
            "skipped": list(self.skipped),
            "failed": [dataclasses.asdict(one) for one in self.failed],
            "files": [row.to_dict() for row in self.files],
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON; a file already there is replaced once the new one is whole.

        Raises:
          EvaluationError: the file cannot be written.
        """
        with replaced(Path(path)) as file:
            file.write(encoded(self.to_dict(), indent=2))


def load(path: str | Path) -> Evaluation:
    """Read a file that `Evaluation.save` has written.

    Raises:
      EvaluationError: the file cannot be read, or holds something else.
    """
    try:
        values = decode_json(Path(path).read_text(encoding="utf-8"))
        return Evaluation(
            model=typed(values, "model", str),
            source=typed(values, "source", str),
            normalizer=typed(values, "normalizer", str),
            streaming=values["streaming"],
            files=tuple(_row(row) for row in values["files"]),
            skipped=tuple(values["skipped"]),
            failed=tuple(Failure(**one) for one in values["failed"]),
            intervals=values["intervals"] and Intervals(**{k: Interval(**v) for k, v in values["intervals"].items()}),
        )
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}); give what --output wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} is no result of an evaluation ({type(error).__name__}: {error}); give what --output wrote"
        ) from None


def _row(values: dict[str, Any]) -> FileResult:
    kinds = {field.name: int if field.type is int else float for field in dataclasses.fields(Errors)}
    return FileResult(
        id=typed(values, "id", str),
        reference=typed(values, "reference", str),
        normalized_reference=typed(values, "normalized_reference", str),
        normalized_hypothesis=typed(values, "normalized_hypothesis", str),
        errors=Errors(**{name: typed(values, name, kind) for name, kind in kinds.items()}),
        transcript=timed_from(values),
    )


def timed_from(values: dict[str, Any]) -> TimedTranscript:
    """Read the transcript and its times back from a row.

    Raises:
      KeyError: a value is missing.
      TypeError: a value is of another type.
    """
    lists = {name: typed(values, name, list) for name in ("start_latencies", "end_latencies")}
    starts, ends = (tuple(_of(one, name, float) for one in listed) for name, listed in lists.items())
    duration, processing = (typed(values, name, float) for name in ("duration", "processing"))
    return TimedTranscript(
        typed(values, "hypothesis", str), duration, processing, starts, ends, typed(values, "flushed", int)
    )


def typed(values: dict[str, Any], name: str, kind: type) -> Any:
    """Return a value of a row; whole numbers are numbers of the type float too.

    Raises:
      KeyError: the value is missing.
      TypeError: the value is of another type.
    """
    return _of(values[name], name, kind)


def _of(value: Any, name: str, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
        raise TypeError(f"{name} is {value!r}; expected {kind.__name__}")
    return value


def _edits(errors: Errors) -> str:
    kinds = [(getattr(errors, name), name) for name in ("substituted", "inserted", "deleted")]
    listed = ", ".join(f"{count} {name}" for count, name in kinds if count)
    return f"{errors.total} of {errors.words}" + (f": {listed}" if listed else "")


def _range(interval: Interval) -> str:
    return f"95 %: {100 * interval.low:.2f} to {percent(interval.high)}; "
