"""The delays of the streams, for whole clips and for generation; no other module implements them.

In a stream with delay d, the token of frame f is predicted in step f + d and is an input of the step after. The input
of step t is therefore the token of frame t - 1 - d, or the stream's initial token if that frame is negative; the inputs
of step 0 are all initial tokens. The models were trained so. The reference's `LMGen` does the same if frame 0 is given
to it twice, as `moshi.run_inference` does.

`delay` and `undelay` shift whole clips; generation keeps future inputs in a ring.

Shape letters: docs/axes.md; M is the streams, text first, and Q some of the audio streams.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling); kyutai-labs/moshi@e6a55d2 moshi/models/lm.py:LMGen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsm_jax.configs import LMConfig
from dsm_jax.streaming import taken_BT

ZERO_TOKEN = -1  # an absent token: its embedding is zero, and losses mask it


def initial_tokens(config: LMConfig) -> jax.Array:
    """Return the initial token of each stream, its input before its first own token, int32 [M]."""
    return jnp.array([config.text_card] + [config.card] * config.n_q, jnp.int32)


def delay(codes_BMT: jax.Array, initial_M: jax.Array, delays: tuple[int, ...]) -> jax.Array:
    """Shift stream m right by `delays[m]` steps and fill with its initial token: frames to steps."""
    from_MT = jnp.arange(codes_BMT.shape[2]) - jnp.array(delays)[:, None]
    shifted_BMT = jnp.take_along_axis(codes_BMT, jnp.maximum(from_MT, 0)[None], axis=2)
    return jnp.where(from_MT[None] >= 0, shifted_BMT, initial_M[None, :, None])


def undelay(logits_BQTV: jax.Array, delays: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Shift every stream left by its delay: steps to frames.

    Args:
      logits_BQTV: logits of Q streams by step.
      delays: delays of these Q streams.

    Returns:
      The logits by frame, and a mask, bool [Q, T], of the frames that have any; the others are zero.
    """
    steps = logits_BQTV.shape[2]
    from_QT = jnp.arange(steps) + jnp.array(delays)[:, None]
    valid_QT = from_QT < steps
    moved = jnp.take_along_axis(logits_BQTV, jnp.minimum(from_QT, steps - 1)[None, :, :, None], axis=2)
    return jnp.where(valid_QT[None, :, :, None], moved, 0.0), valid_QT


def inputs_of(delayed_BMT: jax.Array, initial_M: jax.Array) -> jax.Array:
    """Return the input of every step of a delayed clip: the tokens of the step before, at step 0 the initial tokens."""
    start_BM1 = jnp.broadcast_to(initial_M[None, :, None], (*delayed_BMT.shape[:2], 1))
    return jnp.concatenate([start_BM1, delayed_BMT[:, :, :-1]], axis=2)


def behind_text(codes_QT: Any, steps: int) -> Any:
    """Shift the audio of a clip behind its text, in addition to the streams' own delays.

    Args:
      codes_QT: integer codes [..., Q, T] of the audio, of numpy or JAX.
      steps: size of the shift; as many frames are dropped at the end.

    Returns:
      Codes of the same shape, absent (-1) in the first `steps` frames.
    """
    arrays, kept = codes_QT.__array_namespace__(), max(codes_QT.shape[-1] - steps, 0)
    absent_QT = arrays.full_like(codes_QT[..., kept:], ZERO_TOKEN)
    return arrays.concatenate([absent_QT, codes_QT[..., :kept]], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRing:
    """The inputs of future steps: the input of step t is in slot t % S."""

    tokens_BMS: jax.Array

    @classmethod
    def empty(cls, config: LMConfig, batch_size: int, *, ahead: int = 1) -> "TokenRing":
        """Make a ring without tokens, long enough for the longest delay and for `ahead` steps at a time."""
        return cls(jnp.full((batch_size, config.n_q + 1, max(config.delays) + 1 + ahead), ZERO_TOKEN, jnp.int32))

    @classmethod
    def after(cls, delayed_BMT: jax.Array, lengths_B: jax.Array, config: LMConfig) -> "TokenRing":
        """Make the ring after the first `lengths_B` steps of a delayed clip."""
        last = max(config.delays)
        step_BT = lengths_B[:, None] - 1 - last + jnp.arange(1 + last)  # the tokens that later steps need
        newest_BMT = jnp.take_along_axis(delayed_BMT, jnp.maximum(step_BT, 0)[:, None], axis=2)
        newest_BMT = jnp.where((step_BT >= 0)[:, None], newest_BMT, ZERO_TOKEN)
        ring = cls.empty(config, lengths_B.size)
        return ring.with_made(newest_BMT, step_BT[:, 0], jnp.full_like(lengths_B, 1 + last))

    def inputs(self, step_BT: jax.Array, config: LMConfig) -> jax.Array:
        """Return the inputs of the steps `step_BT` of each row, int32 [B, M, T]."""
        slot_B1T = (step_BT % self.tokens_BMS.shape[2])[:, None]
        held_BMT = jnp.take_along_axis(self.tokens_BMS, slot_B1T, axis=2)
        initial_M1, delays_M1 = initial_tokens(config)[:, None], jnp.array(config.delays)[:, None]
        return jnp.where(step_BT[:, None] <= delays_M1, initial_M1, held_BMT)

    def with_made(self, tokens_BQT: jax.Array, step_B: jax.Array, lengths_B: jax.Array) -> "TokenRing":
        """Add the tokens that the first `lengths_B` of T steps from `step_B` on generated, text first."""
        streams_Q = jnp.arange(tokens_BQT.shape[1])
        return self._with(tokens_BQT, streams_Q, step_B[:, None], lengths_B)

    def with_frames(
        self, codes_BQT: jax.Array, frame_B: jax.Array, lengths_B: jax.Array, config: LMConfig
    ) -> "TokenRing":
        """Add the first `lengths_B` of T frames from `frame_B` on; each code is an input after its stream's delay."""
        streams_Q = jnp.arange(1, 1 + codes_BQT.shape[1])
        step_BQ = frame_B[:, None] + jnp.array(config.delays[1 : 1 + codes_BQT.shape[1]])
        return self._with(codes_BQT, streams_Q, step_BQ, lengths_B)

    def _with(
        self, tokens_BQT: jax.Array, streams_Q: jax.Array, step_BQ: jax.Array, lengths_B: jax.Array
    ) -> "TokenRing":
        """Write tokens as inputs of the steps after `step_BQ`."""
        B, _, T = tokens_BQT.shape
        slots = self.tokens_BMS.shape[2]
        slot_BQT = (step_BQ[:, :, None] + 1 + jnp.arange(T)) % slots
        slot_BQT = jnp.where(taken_BT(lengths_B, T)[:, None], slot_BQT, slots)  # out of range: nothing is written
        at = jnp.arange(B)[:, None, None], streams_Q[:, None], slot_BQT
        return TokenRing(self.tokens_BMS.at[at].set(tokens_BQT, mode="drop"))

    def newest_frame(self, step_B: jax.Array, config: LMConfig) -> jax.Array:
        """Return the tokens of the newest frame that is complete after step `step_B`, int32 [B, M].

        This is frame `step_B` - (longest delay); while that is negative, the tokens are meaningless.
        """
        made_in_BM = step_B[:, None] - max(config.delays) + jnp.array(config.delays)
        slot_BM1 = ((made_in_BM + 1) % self.tokens_BMS.shape[2])[:, :, None]
        return jnp.take_along_axis(self.tokens_BMS, slot_BM1, axis=2)[:, :, 0]
