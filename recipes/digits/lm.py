"""Encode utterances as codes, and train a language model on the codes from scratch.

Shape letters: B rows that are encoded together, N rows, Q codebooks, T frames.
"""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.configs import LMConfig
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.training.data import WordSpan
from dsm_jax.training.encoding import encoder
from dsm_jax.training.loop import Run, RunConfig, fit
from dsm_jax.training.step import OptimizerConfig

_ENCODE_BATCH = 32

LmLoss = Callable[[DelayedStreamsLM, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""(model, batch, key) -> loss, metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmStage:
    """Settings of a language model's training.

    Utterances are longer than the model's attention window, so that the model also learns to run beyond the window.

    Attributes:
      utterances: number of utterances, made and encoded once.
      batch_size: utterances in a batch.
      run: length of the training.
      frames: frames in each utterance.
      context: frames of the attention window.
      optimizer: settings of the optimizer.
    """

    utterances: int
    batch_size: int
    run: RunConfig
    frames: int = 100
    context: int = 40
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, warmup=100, weight_decay=0.05)


def encode_utterances(mimi: Mimi, rows: Any, count: int) -> tuple[np.ndarray, list[list[WordSpan]]]:
    """Encode the first `count` rows, given as (samples, words), to codes, int16 [count, Q, T], and words."""
    encode = encoder(*nnx.split(mimi), mimi.config.quantizer.n_q)

    def draw(start: int) -> tuple[np.ndarray, list[list[WordSpan]]]:
        drawn = [rows[i] for i in range(start, start + _ENCODE_BATCH)]
        return np.stack([pcm_T for pcm_T, _ in drawn]), [words for _, words in drawn]

    codes, spans = [], []
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(draw, 0)
        for after in range(_ENCODE_BATCH, count + _ENCODE_BATCH, _ENCODE_BATCH):
            pcm_BT, words = ahead.result()
            # Only one batch is drawn ahead, as the samples are many times the size of the codes.
            if after < count:
                ahead = pool.submit(draw, after)
            codes.append(np.asarray(encode(jnp.asarray(pcm_BT[..., None]))).astype(np.int16))
            spans += words
    return np.concatenate(codes)[:count], spans[:count]


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Rows for `batches` from arrays [N, ...] of small integers, by name."""

    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index].astype(np.int32) for name, array in self.arrays.items()}


def train_lm(
    stage: LmStage,
    run: Run,
    config: LMConfig,
    loss: LmLoss,
    validation_loss: LmLoss,
    stored: Mapping[str, np.ndarray],
    validation: Mapping[str, np.ndarray],
    *,
    seed: int,
    resume: bool,
) -> DelayedStreamsLM:
    """Train a language model from scratch.

    Args:
      stage: settings of the training.
      run: the run, which saves the training.
      config: config of the language model.
      loss: loss of a batch.
      validation_loss: loss of a batch without dropouts.
      stored: training rows: arrays [N, ...] of integers by name.
      validation: validation rows, evaluated as one batch.
      seed: seed of the parameters and of the order of the rows.
      resume: whether to continue from the last checkpoint, if there is one.

    Raises:
      TrainingError: a loss is not finite, or a checkpoint cannot be written or resumed from.
    """
    graph, params = nnx.split(DelayedStreamsLM(config, rngs=nnx.Rngs(seed)))
    held_out = {name: array.astype(np.int32) for name, array in validation.items()}

    def train_loss(params: Any, frozen: tuple, aux: tuple, batch: Any, key: jax.Array):
        value, metrics = loss(nnx.merge(graph, params), batch, key)
        return value, (aux, metrics)

    def measure(params: nnx.State, frozen: tuple, aux: tuple) -> dict[str, jax.Array]:
        value, metrics = validation_loss(nnx.merge(graph, params), held_out, jax.random.PRNGKey(0))
        return {"loss": value, **metrics}

    rows, size = StoredRows(stored), stage.batch_size
    state = fit(run, stage.optimizer, train_loss, measure, params, rows, batch_size=size, seed=seed, resume=resume)
    return nnx.merge(graph, state.params)
