"""A small training run, for tests that stop, break and resume it.

Shape letters: B batch rows, D features.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.errors import TrainingError
from dsm_jax.progress import ProgressCallback
from dsm_jax.training.data import batches
from dsm_jax.training.loop import Run, RunConfig
from dsm_jax.training.step import OptimizerConfig, TrainState, init, make_step

CONFIG = RunConfig(steps=10, log_every=2, save_every=4, keep=2)
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup=2).build(CONFIG.steps)


def loss(params, frozen, aux, batch, key):
    """Compute a loss with random noise, so that a resumed run needs the right key."""
    noise_D = 0.1 * jax.random.normal(key, params["w_D"].shape)
    made_B = batch["x_BD"] @ (params["w_D"] + noise_D)
    return jnp.mean((made_B - batch["y_B"]) ** 2), ({"mean": 0.9 * aux["mean"] + batch["y_B"].mean()}, {})


STEP = make_step(loss, OPTIMIZER)


def start(width: int = 3) -> TrainState:
    return init({"w_D": jnp.ones(width)}, OPTIMIZER, 0, aux={"mean": jnp.zeros(())})


class Rows:
    """Twelve rows of a regression; reading or the content of one row can be replaced."""

    def __init__(self, bad: Callable[[], object] | float | None = None):
        self.bad = bad

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        x_D = np.random.default_rng(index).normal(size=3).astype(np.float32)
        y = np.float32(x_D.sum())
        if self.bad is not None and index == BAD_ROW:
            y = np.float32(self.bad() if callable(self.bad) else self.bad)
        return {"x_BD": x_D, "y_B": y, "row_B": np.int32(index)}


def data(first_step: int = 0, rows: Rows | None = None) -> Iterator:
    return batches(rows or Rows(), batch_size=4, seed=3, first_step=first_step)


BAD_STEP = 3
BAD_ROW = int(
    next(itertools.islice(data(), BAD_STEP - 1, None))["row_B"][0]
)  # the row is in that step's batch, and in none before


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows]


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def evaluate(state: TrainState) -> dict[str, float]:
    return {"validation_w": np.abs(np.asarray(state.params["w_D"])).sum()}


def assert_same(a: TrainState, b: TrainState):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def stopped(folder: Path, steps: int, progress: ProgressCallback | None = None) -> Run:
    """Run with data that ends early."""
    with pytest.raises(TrainingError, match=f"the data ended before step {steps + 1} of 10; give more, or fewer steps"):
        Run(folder, CONFIG, progress).train(STEP, start(), itertools.islice(data(), steps), evaluate=evaluate)
    return Run(folder, CONFIG)
