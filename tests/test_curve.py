"""The curve of a training run."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from PIL import Image

from dsm_jax.training.curve import draw_curve


def pixels(folder: Path, rows: list[dict[str, float | None]]) -> np.ndarray:
    (folder / "run").mkdir(parents=True)  # its name is the title
    draw_curve(rows, folder / "run/curve.png")
    return image.imread(folder / "run/curve.png")


@pytest.mark.slow
def test_the_curve_shows_the_loss_and_validation_figures_and_nothing_else(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "gradient_norm": step} for step in range(1, 6)]
    last = rows[-1]
    curve = pixels(tmp_path / "plain", rows)
    others = {"loss": {"loss": 0.5}, "validation": {"validation_x": 0.5}}
    other_norm = [*rows[:-1], last | {"gradient_norm": 9.0}]
    np.testing.assert_array_equal(pixels(tmp_path / "norm", other_norm), curve)
    measured = [rows[0] | {"validation_x": 0.5}, *rows[1:]]
    with_null = [measured[0], rows[1] | {"validation_x": None}, *rows[2:]]
    np.testing.assert_array_equal(pixels(tmp_path / "null", with_null), pixels(tmp_path / "measured", measured))
    for name, change in others.items():
        assert not np.array_equal(pixels(tmp_path / name, [*rows[:-1], last | change]), curve)


def test_a_curve_is_small(tmp_path):
    pixels(tmp_path, [{"step": step, "loss": 1 / step, "validation_x": 2 / step} for step in range(1, 400)])
    with Image.open(tmp_path / "run/curve.png") as curve:
        assert len(curve.getcolors()) <= 64
    assert (tmp_path / "run/curve.png").stat().st_size < 20_000


@pytest.mark.parametrize("rows", [[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.0}], [{"step": 1, "loss": -1.0}]])
def test_a_loss_without_a_logarithm_is_drawn(tmp_path, rows):
    assert pixels(tmp_path, rows).std() > 0
