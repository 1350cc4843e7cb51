"""The timed training steps: the sizes and batches of both sides, and our steps.

A step is a loss, its gradients, clipping by the global norm and AdamW, on the recipe's two networks. The recipe's
random dropouts are off, so that both sides do the same work.

Shape letters: B batch rows, M streams (text first), Q audio streams, T frames of codes or samples, N frames of audio.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import malloc
from dsm_jax.configs import LMConfig, MimiConfig
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.training import step
from dsm_jax.training.losses import codec
from dsm_jax.training.losses.codec import CodecObjective, CodecTrainee
from dsm_jax.training.losses.stt import SttObjective, stt_loss
from dsm_jax.training.step import OptimizerConfig
from recipes.digits.codec import CodecStage
from recipes.digits.data import LABELS, MIMI
from recipes.digits.stt import SttStage, lm_config
from tests.benchmarks.worker import Step
from tests.helpers import small

_LM, _CODEC = SttStage(), CodecStage()
_LM_CONFIG = lm_config(MIMI.quantizer, 41, _LM.context)  # as many pieces as the recipe's tokenizer has
_NEVER = 10**9  # steps of a schedule that stays at its beginning


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmCase:
    """A language model with its batch, objective and optimizer."""

    config: LMConfig = _LM_CONFIG
    rows: int = _LM.batch_size
    frames: int = _LM.frames
    objective: SttObjective = SttObjective(padding_weight=_LM.objective.padding_weight)
    optimizer: OptimizerConfig = dataclasses.replace(_LM.optimizer, warmup=0)

    def codes(self) -> np.ndarray:
        """Draw random tokens, int32 [B, M, T]: text, half of it padding, and audio."""
        random, config = np.random.default_rng(0), self.config
        audio_BQT = random.integers(config.card, size=(self.rows, config.n_q, self.frames))
        text_B1T = random.integers(config.text_logits, size=(self.rows, 1, self.frames))
        text_B1T = np.where(random.random(text_B1T.shape) < 0.5, config.existing_text_padding_id, text_B1T)
        return np.concatenate([text_B1T, audio_BQT], axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecCase:
    """A codec with its batch, objective and optimizer."""

    config: MimiConfig = MIMI
    labels: int = LABELS
    rows: int = _CODEC.batch_size
    frames: int = _CODEC.frames
    objective: CodecObjective = dataclasses.replace(_CODEC.objective, codebook_dropout=0.0)
    optimizer: OptimizerConfig = dataclasses.replace(_CODEC.optimizer, warmup=0)

    def sound(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw noise, float32 [B, T], and random labels, int32 [B, N], a few of them unknown."""
        random = np.random.default_rng(0)
        pcm_BT = 0.1 * random.standard_normal((self.rows, self.frames * self.config.frame_size), np.float32)
        return pcm_BT, random.integers(-1, self.labels, size=(self.rows, self.frames)).astype(np.int32)


# The longest window of the spectral loss is 128 frames of the miniature codec.
TINY_LM = LmCase(config=small.STT, rows=3, frames=17)
TINY_CODEC = CodecCase(
    config=small.MIMI,
    labels=5,
    rows=3,
    frames=132,
    objective=CodecObjective(codebook_dropout=0.0, decoded_frames=130),
)


@dataclasses.dataclass(frozen=True)
class Training:
    """The arguments of `dsm_jax.training.step`."""

    loss: step.Loss
    params: Any
    aux: Any
    batch: dict[str, jax.Array]
    optimizer: OptimizerConfig


def make(task: str, tiny: bool) -> Step:
    """Make the step of `task`, with initial weights and the malloc settings of `dsm-jax train`."""
    malloc.keep_freed()
    malloc.set_pieces_aside_after_compiling()
    if task == "train_lm_step":
        case = TINY_LM if tiny else LmCase()
        return start(train_lm(case, DelayedStreamsLM(case.config, rngs=nnx.Rngs(0))))
    case = TINY_CODEC if tiny else CodecCase()
    mimi = Mimi(case.config, block_frames=None, rngs=nnx.Rngs(0))
    return start(train_codec(case, CodecTrainee(mimi, case.labels, rngs=nnx.Rngs(1)), fresh=True))


def train_lm(case: LmCase, lm: DelayedStreamsLM) -> Training:
    """Set up the training of a language model, as the recipe does."""
    graph, params = nnx.split(lm)

    def loss(params: Any, frozen: tuple, aux: tuple, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        value, metrics = stt_loss(nnx.merge(graph, params), batch["codes_BMT"], key, case.objective)
        return value, (aux, metrics)

    return Training(loss, params, (), {"codes_BMT": jnp.asarray(case.codes())}, case.optimizer)


def train_codec(case: CodecCase, trainee: CodecTrainee, *, fresh: bool) -> Training:
    """Set up the training of a codec, as the recipe does; `fresh` codebooks start at vectors of the first batch."""
    graph, params, aux = codec.split(trainee, fresh=fresh)

    def loss(params: Any, frozen: tuple, aux: codec.CodecAux, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        return codec.codec_loss(codec.merge(graph, params, aux), aux, batch, key, case.objective)

    pcm_BT, labels_BN = map(jnp.asarray, case.sound())
    return Training(loss, params, aux, {"pcm_BT": pcm_BT, "labels_BN": labels_BN}, case.optimizer)


def start(training: Training) -> Step:
    """Make a step that continues from the step before, and returns the loss after its update."""
    optimizer = training.optimizer.build(_NEVER)
    state = step.init(training.params, optimizer, seed=0, aux=training.aux)
    advance = step.make_step(training.loss, optimizer).lower(state, training.batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(advance(state, training.batch))
        return float(metrics["loss"])

    return run
