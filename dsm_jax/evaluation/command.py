"""Carry out `dsm-jax evaluate`: check the request, evaluate, and write the results."""

import dataclasses
import functools
from pathlib import Path

from dsm_jax import files
from dsm_jax.checkpoints import Model
from dsm_jax.errors import EvaluationError
from dsm_jax.evaluation import comparison, datasets, normalizers, report, results
from dsm_jax.evaluation.datasets import Dataset
from dsm_jax.evaluation.results import Evaluation
from dsm_jax.evaluation.run import evaluate
from dsm_jax.progress import ProgressCallback


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A request of the command.

    Attributes:
      source: of recordings, as for `evaluate`.
      normalizer, streaming, batch_size, limit: as for `evaluate`.
      output: a JSON file of results; rows are kept in a `.rows.jsonl` next to it while it runs. None writes neither.
      plot: a picture of the word error rates; None draws none.
      resume: continue from the rows that are there.
    """

    source: str
    normalizer: normalizers.Name = "english"
    streaming: bool = False
    batch_size: int = 8
    limit: int | None = None
    output: Path | None = None
    plot: Path | None = None
    resume: bool = False

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The recordings, which are read before the model, as that takes longer."""
        return datasets.read(self.source)

    def __post_init__(self) -> None:
        normalizers.normalizer(self.normalizer)
        if self.resume and self.output is None:
            raise EvaluationError("--resume continues from the rows next to the results; add --output RESULTS.json")
        if self.output is not None and self.output.suffix != ".json":
            raise EvaluationError(f"--output is {self.output}; name a .json file")
        if self.plot is not None:
            report.check_plot(self.plot)
        for path in filter(None, (self.output, self.rows, self.plot)):
            if path.resolve() == Path(self.source).resolve():
                raise EvaluationError(f"{path} is the source, and would be overwritten; name another file")
            files.check_folder_of(path, EvaluationError)
        _ = self.dataset

    @property
    def rows(self) -> Path | None:
        """The file of rows."""
        return None if self.output is None else self.output.with_suffix(".rows.jsonl")


def run(model: Model, job: Job, *, progress: ProgressCallback | None = None) -> Evaluation:
    """Evaluate, and write the files that were asked for.

    Raises:
      EvaluationError: as `evaluate` does; or a file cannot be written.
    """
    if job.rows is not None and not job.resume:
        job.rows.unlink(missing_ok=True)
    evaluation = evaluate(
        model,
        job.dataset,
        normalizer=job.normalizer,
        streaming=job.streaming,
        batch_size=job.batch_size,
        limit=job.limit,
        resume=job.rows,
        progress=progress,
    )
    if job.output is not None:
        evaluation.save(job.output)
    if job.plot is not None:
        report.plot(evaluation, job.plot)
    return evaluation


def text(evaluation: Evaluation, *, worst: int) -> str:
    """Return an evaluation as text: the recordings, the worst ones with both texts, and the figures."""
    shown = [
        f"{row.id}\n  reference   {row.normalized_reference}\n"
        f"  hypothesis  {row.normalized_hypothesis.strip() or '(nothing)'}"
        for row in evaluation.worst(worst)
    ]
    return "\n\n".join([evaluation.table(), *shown, evaluation.summary()])


def compare(before: Path, after: Path, *, worst: int) -> str:
    """Compare two files of results, and write the comparison out.

    Raises:
      EvaluationError: a file cannot be read, or the two are not of the same data.
    """
    return comparison.compare(results.load(before), results.load(after)).table(worst or 5)
