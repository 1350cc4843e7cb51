"""The delays of the streams: the only code that knows them.

A token of frame f of a stream with delay d is made in step f + d, and fed to the model in the step after. Step t
therefore feeds, for a stream of delay d, the token of frame t - 1 - d, or the stream's initial token while there is
none: step 0 feeds initial tokens only. The models were trained so. The reference's `LMGen` arrives at the same when it
is given frame 0 twice, as `moshi.run_inference` does.

A clip is delayed and undelayed whole; generation keeps the tokens that are still to be fed in a ring.

Shape letters: docs/axes.md; of tokens, K are the streams, text first (M in the ring), and Q some of the audio streams.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling); kyutai-labs/moshi@e6a55d2 moshi/models/lm.py:LMGen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsm_jax.configs import LMConfig
from dsm_jax.streaming import select_rows

ZERO_TOKEN = -1  # an absent token: its embedding is zero, and losses leave it out


def initial_tokens(config: LMConfig) -> jax.Array:
    """Returns the token that each stream is fed before its first own one, int32 [K]."""
    return jnp.array([config.text_card] + [config.card] * config.n_q, jnp.int32)


def delay(codes_BKT: jax.Array, initial_K: jax.Array, delays: tuple[int, ...]) -> jax.Array:
    """Shifts stream k right by `delays[k]` steps and fills it with its initial token: frames to steps."""
    from_KT = jnp.arange(codes_BKT.shape[2]) - jnp.array(delays)[:, None]
    shifted_BKT = jnp.take_along_axis(codes_BKT, jnp.maximum(from_KT, 0)[None], axis=2)
    return jnp.where(from_KT[None] >= 0, shifted_BKT, initial_K[None, :, None])


def undelay(logits_BQTV: jax.Array, delays: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Shifts every stream left by its delay: steps to frames.

    Args:
      logits_BQTV: scores of some streams, by step.
      delays: of these streams.

    Returns:
      The scores by frame, zero past the end, and which of them are real, bool [Q, T].
    """
    steps = logits_BQTV.shape[2]
    from_QT = jnp.arange(steps) + jnp.array(delays)[:, None]
    valid_QT = from_QT < steps
    moved = jnp.take_along_axis(logits_BQTV, jnp.minimum(from_QT, steps - 1)[None, :, :, None], axis=2)
    return jnp.where(valid_QT[None, :, :, None], moved, 0.0), valid_QT


def inputs_of(delayed_BKT: jax.Array, initial_K: jax.Array) -> jax.Array:
    """Returns the tokens fed at every step of a delayed clip: those of the step before, initial ones at step 0."""
    start_BK1 = jnp.broadcast_to(initial_K[None, :, None], (*delayed_BKT.shape[:2], 1))
    return jnp.concatenate([start_BK1, delayed_BKT[:, :, :-1]], axis=2)


def behind_text(codes_QT: np.ndarray, steps: int) -> np.ndarray:
    """Shifts the audio of a clip some steps behind its text, on top of the streams' own delays.

    Args:
      codes_QT: integer codes [..., Q, T] of the audio.
      steps: of the shift; as many frames are cut off at the end.

    Returns:
      Codes of the same shape, absent (-1) in the first `steps` frames.
    """
    shifted_QT = np.full_like(codes_QT, ZERO_TOKEN)
    shifted_QT[..., steps:] = codes_QT[..., : codes_QT.shape[-1] - steps]
    return shifted_QT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRing:
    """The tokens that are still to be fed, each in the ring slot of the step that feeds it, modulo S."""

    tokens_BMS: jax.Array

    @classmethod
    def empty(cls, config: LMConfig, batch_size: int) -> "TokenRing":
        """Returns a ring without tokens, long enough for the longest delay."""
        return cls(jnp.full((batch_size, config.n_q + 1, max(config.delays) + 2), ZERO_TOKEN, jnp.int32))

    def _slot(self, step: jax.Array) -> jax.Array:
        return step % self.tokens_BMS.shape[2]

    def inputs(self, step_B: jax.Array, config: LMConfig) -> jax.Array:
        """Returns the tokens that step `step_B` of each row feeds, int32 [B, K]."""
        step_B1 = step_B[:, None]
        held_BK = jnp.take_along_axis(self.tokens_BMS, self._slot(step_B1)[:, :, None], axis=2)[:, :, 0]
        return jnp.where(step_B1 <= jnp.array(config.delays), initial_tokens(config), held_BK)

    def with_made(self, tokens_BQ: jax.Array, step_B: jax.Array) -> "TokenRing":
        """Adds the tokens made in step `step_B` of the first streams, text first."""
        rows_B, streams = jnp.arange(tokens_BQ.shape[0]), slice(tokens_BQ.shape[1])
        return TokenRing(self.tokens_BMS.at[rows_B, streams, self._slot(step_B + 1)].set(tokens_BQ))

    def with_frame(self, codes_BQ: jax.Array, frame_B: jax.Array, config: LMConfig) -> "TokenRing":
        """Adds a frame of the audio streams, which each stream is fed after its own delay."""
        rows_B1, streams_Q = jnp.arange(codes_BQ.shape[0])[:, None], jnp.arange(1, 1 + codes_BQ.shape[1])
        step_BQ = frame_B[:, None] + jnp.array(config.delays[1 : 1 + codes_BQ.shape[1]])
        return TokenRing(self.tokens_BMS.at[rows_B1, streams_Q, self._slot(step_BQ + 1)].set(codes_BQ))

    def newest_frame(self, step_B: jax.Array, config: LMConfig) -> jax.Array:
        """Returns the tokens of the newest frame that is whole once step `step_B` is made, int32 [B, K].

        The frame is number `step_B` less the longest delay; before that there is none.
        """
        made_in_BK = step_B[:, None] - max(config.delays) + jnp.array(config.delays)
        return jnp.take_along_axis(self.tokens_BMS, self._slot(made_in_BK + 1)[:, :, None], axis=2)[:, :, 0]

    def kept(self, mask_B: jax.Array, before: "TokenRing") -> "TokenRing":
        """Returns the marked rows of this ring and the other rows of the one before."""
        return select_rows(mask_B, self, before)
