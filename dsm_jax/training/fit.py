"""One stage of a recipe: parameters learn from rows, and are measured on rows that are kept apart."""

from collections.abc import Callable
from typing import Any

import jax

from dsm_jax.training.batches import batches
from dsm_jax.training.run import Run
from dsm_jax.training.step import Loss, Metrics, OptimizerConfig, TrainState, init, make_step


def fit(
    run: Run,
    optimizer: OptimizerConfig,
    loss: Loss,
    measured: Callable[[Any, Any], Metrics],
    params: Any,
    memory: Any,
    rows: Any,
    *,
    batch_size: int,
    seed: int,
    resume: bool,
) -> TrainState:
    """Trains to the last step of a run.

    Args:
      run: where it is saved.
      optimizer: how.
      loss: see `step.make_step`.
      measured: of parameters and memory, jittable: figures of rows that are kept apart, reported at each checkpoint.
      params: to begin with; the run takes them over.
      memory: what the loss carries along.
      rows: see `batches`.
      batch_size: rows in a batch.
      seed: of the order of the rows, and of what is random in the loss.
      resume: go on from the last checkpoint, if there is one.

    Returns:
      The state after the last step; it has been saved.

    Raises:
      TrainingError: a loss that is not finite, or a checkpoint that cannot be written or resumed from.
    """
    update = optimizer.build(run.config.steps)
    state = init(params, memory, update, seed)
    state = run.restore(state) if resume and run.latest() is not None else state
    measure = jax.jit(measured)

    def evaluate(state: TrainState) -> dict[str, float]:
        figures = measure(state.params, state.memory)
        return {f"validation_{name}": float(value) for name, value in figures.items()}

    data = batches(rows, batch_size=batch_size, seed=seed, first_step=int(state.step))
    return run.train(make_step(loss, update), state, data, evaluate=evaluate)
