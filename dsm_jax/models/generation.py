"""One step of generation with delayed streams: what each stream is fed, and where new tokens go.

Step t of a row feeds, for a stream of delay d, the token of frame t - 1 - d, or the initial token while there is none:
step 0 feeds initial tokens only, and step t sees the audio of frame t - 1 and the text of step t - 1. That is how the
models were trained. The reference's `LMGen` reaches the same by being given frame 0 twice, as `moshi.run_inference`
does.

Shape letters: B batch rows, K streams (text first), Q audio streams that are given, S ring slots, V vocabulary, D model
width.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/lm.py:LMGen.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.streaming import select_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerationState:
    """The backbone's state, and the tokens that are still to be fed, each in the slot of the step that feeds it."""

    lm: TransformerState
    ring_BKS: jax.Array

    @property
    def step_B(self) -> jax.Array:
        """Steps that each row has taken, int32."""
        return self.lm.position_B


def init_state(lm: DelayedStreamsLM, batch_size: int) -> GenerationState:
    """The state of `batch_size` fresh streams."""
    slots = max(lm.config.delays) + 2
    return GenerationState(lm.init_state(batch_size), jnp.zeros((batch_size, lm.config.n_q + 1, slots), jnp.int32))


def generate_step(
    lm: DelayedStreamsLM,
    given_BQ: jax.Array,
    state: GenerationState,
    choose_text: Callable[[jax.Array], jax.Array],
    active_B: jax.Array | None = None,
    conditions: Conditions | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, GenerationState]:
    """Feeds one frame of the given audio streams and chooses the next text token.

    Args:
      lm: a model without generated audio streams.
      given_BQ: int32 codes of the frame before this step; the first step of a row ignores them.
      state: from `init_state`, or from the previous step.
      choose_text: maps float32 logits [B, V] to int32 tokens [B].
      active_B: rows that run; None means all.
      conditions: for models that have conditioners.

    Returns:
      The chosen text tokens [B], the logits [B, V] and the hidden state [B, D] behind them, and the next state.
    """
    delays_K = jnp.array(lm.config.delays)
    slots = state.ring_BKS.shape[2]
    rows_B1 = jnp.arange(given_BQ.shape[0])[:, None]
    streams_K = jnp.arange(delays_K.size)
    step_B1 = state.step_B[:, None]

    ring_BKS = state.ring_BKS.at[rows_B1, streams_K[1:], (step_B1 + delays_K[1:]) % slots].set(given_BQ)
    fed_BK = jnp.where(step_B1 <= delays_K, lm.initial_K, ring_BKS[rows_B1, streams_K, step_B1 % slots])
    lengths_B = None if active_B is None else active_B.astype(jnp.int32)
    hidden_BTD, after = lm.step(fed_BK[:, :, None], state.lm, lengths_B, conditions)
    logits_BV = lm.text_logits(hidden_BTD)[:, 0]
    text_B = choose_text(logits_BV)
    ring_BKS = ring_BKS.at[rows_B1[:, 0], 0, (state.step_B + 1) % slots].set(text_B)
    ring_BKS = select_rows(active_B, ring_BKS, state.ring_BKS)
    return text_B, logits_BV, hidden_BTD[:, 0], GenerationState(after, ring_BKS)
