"""Strings of spoken words as tokens, and language models that learn from them.

Shape letters: B rows that are worked on together, N rows, Q codebooks, T frames.
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
from dsm_jax.training.compose import Spoken
from dsm_jax.training.fit import fit
from dsm_jax.training.rows import encoder
from dsm_jax.training.run import Run, RunConfig
from dsm_jax.training.step import OptimizerConfig

_ENCODED_AT_ONCE = 32

Loss = Callable[[DelayedStreamsLM, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""Of a model, a batch and a key; and what else is worth knowing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringsStage:
    """Training of a language model on strings.

    Strings are longer than the window of its attention: what it does once that slides has to be learnt too.
    """

    strings: int  # made and encoded once
    rows: int  # in a batch
    run: RunConfig
    frames: int = 100  # in each string
    context: int = 40  # frames that the model attends to
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, warmup=100, weight_decay=0.05)


def encode_strings(mimi: Mimi, rows: Any, count: int) -> tuple[np.ndarray, list[list[Spoken]]]:
    """The first `count` rows, each samples and words: their codes, int16 [count, Q, T], and their words."""
    graph, params = nnx.split(mimi)
    encode = encoder(graph, mimi.config.quantizer.n_q)

    def draw(start: int) -> tuple[np.ndarray, list[list[Spoken]]]:
        drawn = [rows[i] for i in range(start, start + _ENCODED_AT_ONCE)]
        return np.stack([pcm_T for pcm_T, _ in drawn]), [words for _, words in drawn]

    codes, spoken = [], []
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(draw, 0)
        for after in range(_ENCODED_AT_ONCE, count + _ENCODED_AT_ONCE, _ENCODED_AT_ONCE):
            pcm_BT, words = ahead.result()
            # One batch ahead and no more: the sound of all strings is many times the size of their codes.
            if after < count:
                ahead = pool.submit(draw, after)
            codes.append(np.asarray(encode(params, jnp.asarray(pcm_BT[..., None]))).astype(np.int16))
            spoken += words
    return np.concatenate(codes)[:count], spoken[:count]


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Arrays [N, ...] of small integers, by name, as rows for `batches`."""

    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index].astype(np.int32) for name, array in self.arrays.items()}


def train_lm(
    stage: StringsStage,
    run: Run,
    config: LMConfig,
    loss: Loss,
    measured: Loss,
    stored: Mapping[str, np.ndarray],
    unseen: Mapping[str, np.ndarray],
    *,
    seed: int,
    resume: bool,
) -> DelayedStreamsLM:
    """Trains a language model from scratch.

    Args:
      stage: how.
      run: where it is saved.
      config: of the model.
      loss: what it learns by.
      measured: the same without what is random in it, for the rows that are `unseen`.
      stored: rows, by name an array [N, ...] of integers.
      unseen: rows to measure, as many as fit into one batch.
      seed: of the parameters and of the order of the rows.
      resume: go on from the last checkpoint, if there is one.

    Raises:
      TrainingError: a loss that is not finite, or a checkpoint that cannot be written or resumed from.
    """
    graph, params = nnx.split(DelayedStreamsLM(config, rngs=nnx.Rngs(seed)))
    held_out = {name: array.astype(np.int32) for name, array in unseen.items()}

    def learn(params: Any, memory: tuple, batch: Any, key: jax.Array):
        value, metrics = loss(nnx.merge(graph, params), batch, key)
        return value, (memory, metrics)

    def measure(params: nnx.State, _: tuple) -> dict[str, jax.Array]:
        value, metrics = measured(nnx.merge(graph, params), held_out, jax.random.PRNGKey(0))
        return {"loss": value, **metrics}

    rows, optimizer = StoredRows(stored), stage.optimizer
    state = fit(run, optimizer, learn, measure, params, (), rows, batch_size=stage.rows, seed=seed, resume=resume)
    return nnx.merge(graph, state.params)
