"""What a run shows of itself: how far it is, and at the end the curve of its loss."""

import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = 64  # of a curve, which makes it less than a third as large as in all that antialiasing needs


@contextlib.contextmanager
def bar(name: str, steps: int, first: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """Shows how far a run is on standard error: a bar on a terminal, elsewhere a line per report.

    Args:
      name: of the run.
      steps: of the whole run.
      first: steps that were taken before.

    Yields:
      What to call with each row of metrics.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console, disable=not shown) as progress:
        task = progress.add_task(name, total=steps, completed=first, loss="")

        def report(row: dict[str, float]) -> None:
            progress.update(task, completed=row["step"], loss=f"loss {row['loss']:.4g}")
            if not shown:
                values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
                print(f"{name} {row['step']}/{steps}  {values}", file=sys.stderr, flush=True)

        yield report


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the loss, and any figures whose names begin with "validation", over steps: in few colours, a few kB.

    Args:
      rows: of metrics, in order; None is left out.
      path: of the PNG.

    Raises:
      OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lowest = math.inf
    for name in ["loss", *sorted({name for row in rows for name in row if name.startswith("validation")})]:
        points = [(row["step"], value) for row in rows if (value := row.get(name)) is not None]
        lowest = min([lowest, *(value for _, value in points)])
        marker = "" if name == "loss" and len(points) > 1 else "o"
        axes.plot([step for step, _ in points], [value for _, value in points], label=name, marker=marker, markersize=3)
    axes.set(xlabel="step", yscale="log" if lowest > 0 else "linear", title=path.absolute().parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(path, optimize=True)
