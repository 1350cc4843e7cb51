"""Train the codec of `digits` in stages.

Shape letters: B batch rows.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsm_jax.models.mimi import Mimi
from dsm_jax.training.loop import Run, RunConfig, fit
from dsm_jax.training.losses import codec
from dsm_jax.training.step import OptimizerConfig
from recipes.digits.data import CodecDataset, DataMix
from recipes.digits.utterances import ProsodyConfig

VALIDATION_ROWS = 32
# Most transcription errors were on this speaker's clips, which are trimmed tightly.
OVERSAMPLED = ("nicolas",)
_DENSE = DataMix(
    sentences=0.15,
    noise=0.05,
    short=0.1,
    prosody=ProsodyConfig(lead=0.4, longest_gap=0.5, speed=0.15, tempo=0.2),
    strength=0.4,
    quietest_db=-20.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecStage:
    """Settings of one stage of the codec's training: by default on dense, lightly augmented utterances.

    No row is very quiet. Norms divide by the level, so the gradient of a row 40 dB down is twenty times as large as
    that of other rows, and clipping it would leave nothing of the other rows' gradients.

    Attributes:
      batch_size: rows in a batch.
      frames: frames in a row.
      run: length of the stage.
      optimizer: settings of the optimizer.
      objective: weights of the loss.
      mix: kinds of rows and their shares.
    """

    batch_size: int = 6
    frames: int = 60
    run: RunConfig = RunConfig(steps=10_000, log_every=50, save_every=500)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup=200, weight_decay=0.02, b1=0.8, clip=5.0)
    objective: codec.CodecObjective = codec.CodecObjective()
    mix: DataMix = _DENSE


_LATER = OptimizerConfig(learning_rate=7e-4, warmup=100, weight_decay=0.02, b1=0.8, clip=5.0)
# Stage 2: stronger augmentation, and more data from the speaker with most errors.
AUGMENTED = CodecStage(
    run=RunConfig(steps=14_000, log_every=50, save_every=500),
    optimizer=_LATER,
    mix=dataclasses.replace(
        _DENSE,
        prosody=dataclasses.replace(_DENSE.prosody, speed=0.2, tempo=0.25),
        strength=0.8,
        oversampled=OVERSAMPLED,
    ),
)
# Stage 3: truncated words, on which stage 2 makes four times as many errors.
TRUNCATED = CodecStage(
    optimizer=_LATER,
    mix=dataclasses.replace(AUGMENTED.mix, prosody=dataclasses.replace(AUGMENTED.mix.prosody, tempo=0.3, truncate=0.1)),
)
# The decoder is trained on clean audio, so that it does not reproduce augmentation. Of its objective, only `waveform`
# has an effect: see `codec.decoder_loss`.
DECODER = CodecStage(
    frames=30,
    run=RunConfig(steps=2500, log_every=50, save_every=500),
    optimizer=_LATER,
    mix=DataMix(
        sentences=0.2,
        noise=0.0,
        short=0.0,
        prosody=ProsodyConfig(lead=0.3, shortest_gap=0.05, longest_gap=0.4, speed=0.05, tempo=0.05),
        strength=0.0,
        quietest_db=-14.0,
    ),
)


def train_codec(
    stage: CodecStage,
    run: Run,
    trainee: codec.CodecTrainee,
    rows: CodecDataset,
    validation: CodecDataset,
    *,
    seed: int,
    resume: bool,
    fresh: bool,
) -> codec.CodecTrainee:
    """Train the codec for one stage; if `fresh`, codebooks start at vectors of the first batch."""
    graph, params, aux = codec.split(trainee, fresh=fresh)
    held_out = first_rows(validation, VALIDATION_ROWS)

    def loss(params: Any, frozen: tuple, aux: codec.CodecAux, batch: Any, key: jax.Array):
        return codec.codec_loss(codec.merge(graph, params, aux), aux, batch, key, stage.objective)

    def measure(params: Any, frozen: tuple, aux: codec.CodecAux) -> dict[str, jax.Array]:
        metrics = loss(params, frozen, aux, held_out, jax.random.PRNGKey(0))[1][1]
        return {name: metrics[name] for name in ("spectral", "semantic", "label_accuracy")}

    size, optimizer = stage.batch_size, stage.optimizer
    state = fit(run, optimizer, loss, measure, params, rows, batch_size=size, seed=seed, resume=resume, aux=aux)
    return codec.merge(graph, state.params, state.aux)


def train_decoder(
    stage: CodecStage, run: Run, mimi: Mimi, rows: CodecDataset, validation: CodecDataset, *, seed: int, resume: bool
) -> Mimi:
    """Train the decoder alone, so that the codec's codes do not change."""
    graph, decoder, rest = nnx.split(mimi, codec.is_decoder, ...)
    held_out = first_rows(validation, VALIDATION_ROWS)

    def loss(params: Any, frozen: nnx.State, aux: tuple, batch: Any, _: jax.Array):
        value, metrics = codec.decoder_loss(nnx.merge(graph, params, frozen), batch, stage.objective)
        return value, (aux, metrics)

    def measure(params: Any, frozen: nnx.State, aux: tuple) -> dict[str, jax.Array]:
        return codec.decoder_loss(nnx.merge(graph, params, frozen), held_out, stage.objective)[1]

    size, optimizer = stage.batch_size, stage.optimizer
    state = fit(run, optimizer, loss, measure, decoder, rows, batch_size=size, seed=seed, resume=resume, frozen=rest)
    return nnx.merge(graph, state.params, state.frozen)


def first_rows(rows: CodecDataset, count: int) -> dict[str, Any]:
    """Stack the first rows of a dataset into one batch."""
    drawn = [rows[i] for i in range(count)]
    return {name: np.stack([row[name] for row in drawn]) for name in drawn[0]}
