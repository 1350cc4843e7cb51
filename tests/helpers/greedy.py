"""Run a speech-to-text language model on codes greedily: the loop of `dsm_jax.stt.program` alone.

Shape letters: B batch rows, M streams (text first), Q codebooks, T frames.
"""

import jax
import jax.numpy as jnp

from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.streams import TokenRing


def greedy_tokens(lm: DelayedStreamsLM, codes_BQT: jax.Array) -> jax.Array:
    """Return the text token of every frame, int32 [B, T], in the frames of `transcribe`."""

    def step(carry, codes_BQ):
        state, ring = carry
        step_B = state.position_B
        one_B = jnp.ones_like(step_B)
        ring = ring.with_frames(codes_BQ[:, :, None], step_B - 1, one_B, lm.config)
        hidden_BTD, state = lm.step(ring.inputs(step_B[:, None], lm.config), state)
        tokens_B = lm.text_logits(hidden_BTD)[:, 0].argmax(-1).astype(jnp.int32)
        return (state, ring.with_made(tokens_B[:, None, None], step_B, one_B)), tokens_B

    # The first step precedes the first frame.
    first_BQ1 = jnp.zeros_like(codes_BQT[:, :, :1])
    codes_TBQ = jnp.moveaxis(jnp.concatenate([first_BQ1, codes_BQT], axis=2), 2, 0)
    fresh = lm.init_state(codes_BQT.shape[0]), TokenRing.empty(lm.config, codes_BQT.shape[0])
    return jax.lax.scan(step, fresh, codes_TBQ)[1][1:].T
