"""Evaluate a model: transcribe a data set, normalize, score, and go on where a run was stopped."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import ConfigError, DsmError, EvaluationError
from dsm_jax.evaluation import datasets, metrics, normalizers, transcription
from dsm_jax.evaluation.datasets import Dataset, Failure, Sample
from dsm_jax.evaluation.files import Journal
from dsm_jax.evaluation.results import Evaluation, FileResult, timed_from, typed
from dsm_jax.evaluation.transcription import TimedTranscript, TranscribeOptions
from dsm_jax.options import check_functions
from dsm_jax.progress import Progress, ProgressCallback


def evaluate(
    model: Model,
    source: str | Path | Dataset | Sequence[Sample],
    *,
    normalizer: normalizers.Name = "english",
    streaming: bool = False,
    batch_size: int = 8,
    options: TranscribeOptions | None = None,
    limit: int | None = None,
    resume: str | Path | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Measure the accuracy and speed of a model on a data set.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      source: what `datasets.read` takes: a folder, a JSON Lines file, or the name of a data set on the hub; a
        data set that has been read; or samples.
      normalizer: brings references and transcripts to one spelling: "english", "basic" for other languages, "none".
        "english" writes number words as figures, so that "two seven one" is one word, 271.
      streaming: feed recordings live, one at a time, 80 ms at a time, and measure how late words are reported.
      batch_size: recordings at a time, unless streaming.
      options: how to transcribe; None for the defaults.
      limit: evaluate only so many recordings, the first ones.
      resume: a file that a row is written to as each recording ends. Where it exists, recordings that are in it are
        not transcribed again; it must be of the same weights, loaded in the same way, the same data and options.
      bootstrap: resamples of recordings for the intervals; 0 for none.
      seed: seed of the resampling.
      progress: called with the recordings that have ended.

    Returns:
      The figures, and a row for each recording. A recording whose reference is empty once normalized, or reads "ignore
      time segment in scoring", is not scored, as in the published script; one that cannot be read is in `failed`.

    Raises:
      CheckpointError: the model does not transcribe.
      ConfigError: a size, limit or number of resamples that is too small, or a `progress` that is no function.
      EvaluationError: there is no such data set, no recording of it can be evaluated, a library is missing, or `resume`
        is a file of another run.
    """
    check_functions(progress=progress)
    for name, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("bootstrap", bootstrap, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; give {least} or more")
    normalize, options = normalizers.normalizer(normalizer), options or TranscribeOptions()
    if isinstance(source, str | Path):
        source = datasets.read(source)
    if not isinstance(source, Dataset | Iterable):
        raise EvaluationError(f"the data set is {source!r}; expected its name, a folder, a file, or samples")
    dataset = source if isinstance(source, Dataset) else datasets.gather("samples", source)
    references: dict[str, str] = {}
    samples, skipped = [], []
    for sample in dataset.samples:
        if len(samples) == limit:
            break
        references[sample.id] = normalize(sample.reference)
        (samples if normalizers.counts(references[sample.id]) else skipped).append(sample)
    metrics.score("word", "word")  # raises where a library is missing, before there is work to lose

    def result(sample: Sample, timed: TimedTranscript) -> FileResult:
        reference, hypothesis = references[sample.id], normalize(timed.text)
        errors = metrics.score(reference, hypothesis)
        return FileResult(sample.id, sample.reference, reference, hypothesis, errors, timed)

    run = {
        "model": model.name,
        "weights": model.fingerprint,
        "dtype": model.dtype,
        "quantize": model.quantize,
        "source": dataset.name,
        "streaming": streaming,
        "options": _described(options),
    }
    journal = None if resume is None else Journal(Path(resume), run)
    done = _finished(journal)
    waiting = [sample for sample in samples if sample.id not in done]
    failures = list(dataset.failures)
    if waiting:
        if streaming:
            results = transcription.transcribe_live(model, waiting, options)
        else:
            results = transcription.transcribe(model, waiting, options, batch_size=batch_size)
        for count, (index, timed) in enumerate(results, 1 + len(samples) - len(waiting)):
            sample = waiting[index]
            if isinstance(timed, DsmError):
                failures.append(Failure(sample.id, str(timed)))
            else:
                done[sample.id] = timed
                if journal is not None:
                    journal.append(result(sample, timed).to_dict())
            if progress is not None:
                progress(Progress(count, len(samples)))
    files = tuple(result(sample, done[sample.id]) for sample in samples if sample.id in done)
    if not files:
        why = f"{failures[0].id}: {failures[0].reason}" if failures else "no reference has words once normalized"
        raise EvaluationError(f"no recording of {dataset.name} could be evaluated; {why}")
    errors = [row.errors for row in files]
    return Evaluation(
        model.name,
        dataset.name,
        normalizer,
        streaming,
        files,
        tuple(sample.id for sample in skipped),
        tuple(failures),
        metrics.intervals(errors, resamples=bootstrap, seed=seed),
    )


def _described(value: Any) -> str:
    """Write options as `repr` does, but arrays, which `repr` abbreviates, by a digest of their bytes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return f"{type(value).__qualname__}({', '.join(f'{name}={_described(one)}' for name, one in fields)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_described(one)}' for key, one in value.items())}}}"
    if hasattr(value, "__array__"):
        array = np.ascontiguousarray(value)
        return f"{array.dtype}{list(array.shape)} of SHA-256 {hashlib.sha256(array.tobytes()).hexdigest()}"
    return repr(value)


def _finished(journal: Journal | None) -> dict[str, TimedTranscript]:
    """Read the transcripts that an earlier run has left."""
    done = {}
    for number, row in enumerate(() if journal is None else journal.rows, 2):
        try:
            done[typed(row, "id", str)] = timed_from(row)
        except (KeyError, TypeError) as error:
            assert journal is not None
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise EvaluationError(
                f"{journal.path} line {number} is no row of results ({why}); delete the line, or give another file"
            ) from None
    return done
