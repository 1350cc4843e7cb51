"""Measure word and character errors, speed and latency of a model on recordings whose words are known."""

from dsm_jax.evaluation.comparison import Comparison, compare
from dsm_jax.evaluation.datasets import Dataset, Failure, Sample, read
from dsm_jax.evaluation.metrics import Errors, Interval, Intervals, score
from dsm_jax.evaluation.report import plot
from dsm_jax.evaluation.results import Evaluation, FileResult, Latency, load
from dsm_jax.evaluation.run import evaluate

__all__ = [
    "Comparison",
    "Dataset",
    "Errors",
    "Evaluation",
    "Failure",
    "FileResult",
    "Interval",
    "Intervals",
    "Latency",
    "Sample",
    "compare",
    "evaluate",
    "load",
    "plot",
    "read",
    "score",
]
