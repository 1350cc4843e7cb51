"""Draw the word error rates of an evaluation."""

from pathlib import Path

import numpy as np

from dsm_jax.errors import EvaluationError
from dsm_jax.evaluation.extras import needed
from dsm_jax.evaluation.files import replaced
from dsm_jax.evaluation.results import Evaluation
from dsm_jax.evaluation.tables import percent

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be drawn, before the work for it is done.

    Raises:
      EvaluationError: another kind of file is named, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise EvaluationError(f"{path} is no plot that can be drawn; name it {', '.join(SUFFIXES)}")
    with needed():
        import matplotlib.figure  # noqa: F401


def plot(evaluation: Evaluation, path: str | Path) -> None:
    """Draw the word error rate of each recording, worst first, and a histogram of them.

    Args:
      evaluation: the evaluation to draw.
      path: path of a png, svg or pdf; a file already there is replaced.

    Raises:
      EvaluationError: another kind of file is named, it cannot be written, or matplotlib is not installed.
    """
    path = Path(path)
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = 100 * np.sort([row.wer for row in evaluation.files])[::-1]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_file, histogram = figure.subplots(1, 2)
    by_file.fill_between(np.arange(len(rates) + 1), np.append(rates, rates[-1]), step="post", alpha=0.6)
    by_file.axhline(100 * evaluation.corpus_wer, color="black", linewidth=1, label="corpus WER")
    by_file.set(xlabel="recordings, worst first", ylabel="WER, %", xlim=(0, len(rates)), ylim=(0, None))
    by_file.legend()
    histogram.hist(rates, bins=np.linspace(0, max(10.0, rates[0]), 21).tolist())
    histogram.set(xlabel="WER, %", ylabel="recordings")
    title = f"{evaluation.model} on {evaluation.source}: corpus WER {percent(evaluation.corpus_wer)}"
    # Matplotlib refuses what UTF-8 lacks, such as parts of file names in other encodings.
    figure.suptitle(title.encode(errors="replace").decode(), parse_math=False)
    with replaced(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=110)
