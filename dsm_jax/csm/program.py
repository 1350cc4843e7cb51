"""CSM as a program over slots: conversations in, codes and samples out, one state, nothing leaves the device.

`insert` runs the backbone over a request's conversation (prefill). The prompts of one call share a bucket of positions,
each padded at its end: padded positions are never written to the cache, so a row's result depends on no other row, and
no mask is needed. Every step then generates a frame from the backbone's last output, codebook by codebook, decodes the
frame, and feeds it to the backbone. A frame of zeros ends the speech, and is neither decoded nor fed.

Shape letters: docs/axes.md; here N is the requests of a call, or its steps, and T the positions of a bucket, or the
samples of a frame.
Source: SesameAILabs/csm@2d72082 generator.py:Generator.generate. The speech ends when all codes are 0, as there;
transformers 5.24 ends it when all but the last are. A slot whose speech has ended stops, where transformers lets the
row run on until all rows have ended. Codes that the codec does not have are never chosen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsm_jax.models.csm import CsmLM
from dsm_jax.models.mimi import CodecState, Mimi
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.nn.sampling import sample
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.runtime.slots import write_rows
from dsm_jax.runtime.steps import Array, StepLimits, take_steps
from dsm_jax.streaming import PREFILL_BLOCK, place_rows, reset_rows, step_in_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class CsmSettings:
    """Settings that are fixed when the program is compiled.

    Attributes:
      slots: number of slots.
      positions: room of a slot for a conversation, prompt and answer together.
      steps: room for the frames of one call.
      max_top_k: the largest top-k that a request may choose, see `sample`.
    """

    slots: int
    positions: int
    steps: int = 16
    max_top_k: int = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CsmRequest:
    """The choices of each slot's request.

    Attributes:
      key_B2: PRNG key, on which the slot's noise depends, and on nothing else.
      temperature_B: float32, of the first codebook; 0 takes the most probable code.
      top_k_B: int32, of the first codebook; 0 is all codes.
      depth_temperature_B, depth_top_k_B: the same of the other codebooks.
      max_frames_B: int32, frames after which the slot gives up; 0 for a slot without a request.
    """

    key_B2: Array
    temperature_B: Array
    top_k_B: Array
    depth_temperature_B: Array
    depth_top_k_B: Array
    max_frames_B: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CsmState:
    """Everything that the slots remember.

    Attributes:
      lm: of the backbone.
      hidden_BD: the backbone's output at the last position, from which the next frame is generated.
      frames_B: int32, frames that were generated.
      complete_B: whether the speech has come to its end.
      codec: of Mimi's decoder.
      request: choices of each slot's request.
    """

    lm: TransformerState
    hidden_BD: Array
    frames_B: Array
    complete_B: Array
    codec: CodecState
    request: CsmRequest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CsmOutputs:
    """The outputs of one call. A slot that generated no frame in a step has no valid entry there.

    Attributes:
      count: int32 [], steps that were taken.
      codes_NBQ: int32, the frame.
      pcm_NBT: float32 samples of the frame, in [-1, 1].
      made_NB: whether the slot generated a frame in the step.
      ended_B: whether the slot's speech has come to its end, or the slot has given up.
      complete_B: whether the slot's speech has come to its end.
    """

    count: Array
    codes_NBQ: Array
    pcm_NBT: Array
    made_NB: Array
    ended_B: Array
    complete_B: Array


def init_state(lm: CsmLM, mimi: Mimi, settings: CsmSettings) -> CsmState:
    """Make the state of slots without requests.

    Raises:
      ConfigError: the codec has no decoder.
    """
    decoder = mimi.require_decoder()
    slots = settings.slots

    def zeros(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype)

    request = CsmRequest(
        key_B2=zeros(jnp.uint32, 2),
        temperature_B=zeros(jnp.float32),
        top_k_B=zeros(jnp.int32),
        depth_temperature_B=zeros(jnp.float32),
        depth_top_k_B=zeros(jnp.int32),
        max_frames_B=zeros(jnp.int32),
    )
    return CsmState(
        lm=lm.init_state(slots, settings.positions),
        hidden_BD=zeros(lm.dtype, lm.config.backbone.d_model),
        frames_B=zeros(jnp.int32),
        complete_B=zeros(jnp.bool),
        codec=decoder.init_state(slots),
        request=request,
    )


def insert(
    lm: CsmLM,
    mimi: Mimi,
    state: CsmState,
    slot_N: jax.Array,
    requests: CsmRequest,
    tokens_NMT: jax.Array,
    length_N: jax.Array,
    settings: CsmSettings,
) -> CsmState:
    """Put a request into each of some slots, and run the backbone over its conversation.

    Args:
      lm: the language model.
      mimi: its codec.
      state: any state; donate it.
      slot_N: int32, the slots to fill, all different.
      requests: of N rows.
      tokens_NMT: int32 positions of the conversations, each from the start of its row; T is at most the room of a slot.
      length_N: int32, positions of each conversation, at least 1.
      settings: as for `init_state`.

    Returns:
      The next state; the other slots are as they were.
    """
    rows, _, room = tokens_NMT.shape

    def run(
        tokens_NTM: jax.Array, state: TransformerState, lengths_N: jax.Array | None
    ) -> tuple[jax.Array, TransformerState]:
        assert lengths_N is not None
        hidden_ND, state = lm.prefill(tokens_NTM.swapaxes(1, 2), state, lengths_N)
        return hidden_ND[:, None], state

    tokens_NTM = tokens_NMT.swapaxes(1, 2)
    # One hidden state for each block of a row's positions.
    hidden_NTD, prefilled = step_in_blocks(run, tokens_NTM, lm.init_state(rows, room), length_N, PREFILL_BLOCK)
    last_ND = jnp.take_along_axis(hidden_NTD, (length_N[:, None, None] - 1) // PREFILL_BLOCK, axis=1)[:, 0]
    filled_B = jnp.zeros((settings.slots,), bool).at[slot_N].set(True)
    return CsmState(
        lm=place_rows(state.lm, slot_N, prefilled),
        hidden_BD=state.hidden_BD.at[slot_N].set(last_ND),
        frames_B=jnp.where(filled_B, 0, state.frames_B),
        complete_B=state.complete_B & ~filled_B,
        codec=reset_rows(state.codec, filled_B, mimi.require_decoder().init_state(settings.slots)),
        request=write_rows(state.request, slot_N, requests),
    )


def _ended_B(state: CsmState) -> jax.Array:
    return state.complete_B | (state.frames_B >= state.request.max_frames_B)


def step(
    lm: CsmLM, mimi: Mimi, state: CsmState, limits: StepLimits, settings: CsmSettings
) -> tuple[CsmOutputs, CsmState]:
    """Generate up to `limit` frames in every slot, fewer when no slot has any left to generate.

    Args:
      lm: the language model.
      mimi: its codec.
      state: from `insert`, or from the call before; donate it.
      limits: extent of the call.
      settings: as for `init_state`.

    Returns:
      The frames, and the next state.
    """
    room, slots = settings.steps, settings.slots
    columns = (
        jnp.zeros((room, slots, lm.config.n_q), jnp.int32),
        jnp.zeros((room, slots, mimi.config.frame_size), jnp.float32),
        jnp.zeros((room, slots), bool),
    )
    count, (codes_NBQ, pcm_NBT, made_NB), state = take_steps(
        lambda state, active_B: _take_step(lm, mimi, state, active_B, settings),
        state,
        columns,
        limits,
        ended_B=_ended_B,
    )
    return CsmOutputs(count, codes_NBQ, pcm_NBT, made_NB, _ended_B(state), state.complete_B), state


def _take_step(
    lm: CsmLM, mimi: Mimi, state: CsmState, active_B: jax.Array, settings: CsmSettings
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], CsmState]:
    """Generate one frame in the active slots; return the step's outputs and the next state."""
    request, bins = state.request, mimi.config.quantizer.bins
    fold = jax.random.fold_in

    def choose(q: Any, logits_BV: jax.Array) -> jax.Array:
        known_BV = jnp.where(jnp.arange(lm.config.card) < bins, logits_BV, -jnp.inf)
        keys_B = jax.vmap(lambda key_2, frame: fold(fold(key_2, frame), q))(request.key_B2, state.frames_B)
        temperature_B = jnp.where(q == 0, request.temperature_B, request.depth_temperature_B)
        top_k_B = jnp.where(q == 0, request.top_k_B, request.depth_top_k_B)
        return sample(known_BV, keys_B, temperature_B, top_k_B, max_top_k=settings.max_top_k)

    codes_BQ = lm.walk(state.hidden_BD, choose)
    ends_B = active_B & (codes_BQ == 0).all(1)
    made_B = active_B & ~ends_B

    def decode() -> tuple[jax.Array, CodecState]:
        pcm_BTC, codec = mimi.decode_step(codes_BQ[:, :, None], state.codec, made_B.astype(jnp.int32))
        return jnp.clip(pcm_BTC[:, :, 0], -1.0, 1.0), codec

    silence = jnp.zeros((settings.slots, mimi.config.frame_size), jnp.float32), state.codec
    pcm_BT, codec = jax.lax.cond(made_B.any(), decode, lambda: silence)
    tokens_BM = jnp.pad(codes_BQ, ((0, 0), (1, 0)), constant_values=ZERO_TOKEN)
    hidden_BTD, backbone = lm.step(tokens_BM[:, :, None], state.lm, made_B.astype(jnp.int32))
    after = CsmState(
        lm=backbone,
        hidden_BD=jnp.where(made_B[:, None], hidden_BTD[:, 0], state.hidden_BD),
        frames_B=state.frames_B + made_B.astype(jnp.int32),
        complete_B=state.complete_B | ends_B,
        codec=codec,
        request=request,
    )
    return (codes_BQ, pcm_BT, made_B), after
