"""The stages that the codec of `digits` is trained in.

Shape letters: B batch rows.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsm_jax.models.mimi import Mimi
from dsm_jax.training import codec, digits
from dsm_jax.training.compose import Delivery
from dsm_jax.training.digits import CodecRows, Mix
from dsm_jax.training.fit import fit
from dsm_jax.training.run import Run, RunConfig
from dsm_jax.training.step import OptimizerConfig

VALIDATION_ROWS = 32
_DENSE = Mix(
    sentences=0.15,
    noise=0.05,
    short=0.1,
    delivery=Delivery(lead=0.4, longest_gap=0.5, speed=0.15, tempo=0.2),
    harshness=0.4,
    quietest_db=-20.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecStage:
    """Training of the codec, mostly for what is said: dense strings, and not too much done to them.

    None is very quiet: the gradient of a string 40 dB down is twenty times that of others, as norms divide by its
    level, and once clipping has made it small enough, nothing is left of the others.
    """

    rows: int = 6  # in a batch
    frames: int = 60  # in a row
    run: RunConfig = RunConfig(steps=10_000, log_every=50, save_every=500)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup=200, weight_decay=0.02, b1=0.8, clip=5.0)
    objective: codec.CodecObjective = codec.CodecObjective()
    mix: Mix = _DENSE


_LATER = OptimizerConfig(learning_rate=7e-4, warmup=100, weight_decay=0.02, b1=0.8, clip=5.0)
# Once it names all that it has heard, it goes on with what is harder to name: strings spoilt twice as much, as new
# recordings are, and more of the speaker whom it mishears most.
HARDENED = CodecStage(
    run=RunConfig(steps=14_000, log_every=50, save_every=500),
    optimizer=_LATER,
    mix=dataclasses.replace(
        _DENSE,
        delivery=dataclasses.replace(_DENSE.delivery, speed=0.2, tempo=0.25),
        harshness=0.8,
        often=digits.OFTEN,
    ),
)
# Then with words that have lost their ends, as some recordings have: of these it mishears four times as many.
CUT = CodecStage(
    optimizer=_LATER,
    mix=dataclasses.replace(HARDENED.mix, delivery=dataclasses.replace(HARDENED.mix.delivery, tempo=0.3, cut=0.1)),
)
# What it makes of codes is to be like recordings, and not like what was done to them.
# Of its objective, only the weight of the waveform counts: see `codec.decoder_loss`.
DECODER = CodecStage(
    frames=30,
    run=RunConfig(steps=2500, log_every=50, save_every=500),
    optimizer=_LATER,
    mix=Mix(
        sentences=0.2,
        noise=0.0,
        short=0.0,
        delivery=Delivery(lead=0.3, shortest_gap=0.05, longest_gap=0.4, speed=0.05, tempo=0.05),
        harshness=0.0,
        quietest_db=-14.0,
    ),
)


def train_codec(
    stage: CodecStage,
    run: Run,
    trainee: codec.CodecTrainee,
    rows: CodecRows,
    unseen: CodecRows,
    *,
    seed: int,
    resume: bool,
    fresh: bool,
) -> codec.CodecTrainee:
    """Trains the codec for one stage; `fresh` codebooks start at the first batch's vectors."""
    graph, params, memory = codec.split(trainee, fresh=fresh)
    held_out = first_rows(unseen, VALIDATION_ROWS)

    def loss(params: Any, memory: codec.CodecMemory, batch: Any, key: jax.Array):
        return codec.codec_loss(codec.merge(graph, params, memory), memory, batch, key, stage.objective)

    def measure(params: Any, memory: codec.CodecMemory) -> dict[str, jax.Array]:
        figures = loss(params, memory, held_out, jax.random.PRNGKey(0))[1][1]
        return {name: figures[name] for name in ("spectral", "semantic", "named")}

    state = fit(
        run, stage.optimizer, loss, measure, params, memory, rows, batch_size=stage.rows, seed=seed, resume=resume
    )
    return codec.merge(graph, state.params, state.memory)


def train_decoder(
    stage: CodecStage, run: Run, mimi: Mimi, rows: CodecRows, unseen: CodecRows, *, seed: int, resume: bool
) -> Mimi:
    """Trains what the codec makes sound with, and nothing else: its codes stay what they are."""
    graph, decoder, rest = nnx.split(mimi, codec.is_decoder, ...)
    held_out = first_rows(unseen, VALIDATION_ROWS)

    def loss(params: Any, memory: nnx.State, batch: Any, _: jax.Array):
        value, metrics = codec.decoder_loss(nnx.merge(graph, params, memory), batch, stage.objective)
        return value, (memory, metrics)

    def measure(params: Any, memory: nnx.State) -> dict[str, jax.Array]:
        return codec.decoder_loss(nnx.merge(graph, params, memory), held_out, stage.objective)[1]

    state = fit(
        run, stage.optimizer, loss, measure, decoder, rest, rows, batch_size=stage.rows, seed=seed, resume=resume
    )
    return nnx.merge(graph, state.params, state.memory)


def first_rows(rows: CodecRows, count: int) -> dict[str, Any]:
    """The first of some rows as one batch."""
    drawn = [rows[i] for i in range(count)]
    return {name: np.stack([row[name] for row in drawn]) for name in drawn[0]}
