"""Plot the metrics of a run over its steps."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]  # metrics of a logged step; None replaces NaN and infinity, which JSON lacks
_COLOURS = 64  # in the plot's palette: the file is less than a third as large as with all colours of antialiasing


def draw_curve(records: Sequence[Record], path: Path) -> None:
    """Plot the loss, and metrics whose names begin with "validation", over steps, to a file of a few kB.

    Args:
      records: records in the order of their steps; values of None are left out.
      path: path of the PNG.

    Raises:
      OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lowest = math.inf
    for name in ["loss", *sorted({name for record in records for name in record if name.startswith("validation")})]:
        points = [(record["step"], value) for record in records if (value := record.get(name)) is not None]
        lowest = min([lowest, *(value for _, value in points)])
        marker = "" if name == "loss" and len(points) > 1 else "o"
        axes.plot([step for step, _ in points], [value for _, value in points], label=name, marker=marker, markersize=3)
    axes.set(xlabel="step", yscale="log" if lowest > 0 else "linear")
    # A folder may be named in another encoding than UTF-8, or with the signs of a formula.
    axes.set_title(path.absolute().parent.name.encode(errors="replace").decode(), parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(path, optimize=True)
