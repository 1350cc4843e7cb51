"""Speech to text as a program over slots: audio in, text tokens out, one state, nothing leaves the device.

`insert` makes slots fresh and writes their requests into the state. `step` takes a chunk of audio: Mimi encodes all of
it, and a loop feeds its frames to the language model, which chooses a text token for each. The model's first step, on
initial tokens alone, precedes the first frame: `insert` takes it for chunks of one frame, and the loop for longer ones
(docs/decisions/0010-memory-of-transcription.md).

Most of these tokens are padding. The loop therefore runs several steps at once, as if all of their tokens but the last
were padding, and keeps those up to the first that is not: the same tokens as one step at a time gives, as each step
that is kept had its own inputs, from fewer passes over the weights (docs/decisions/0025-steps-ahead.md).

Shape letters: B slots, N requests, T samples, prompt tokens or frames of outputs, C audio channels, F frames of the
chunk, A steps of a pass, and in outputs the extra heads, one for each pause horizon, H hops of a frame, M streams,
Q codebooks, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsm_jax.configs import LMConfig
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import CodecState, Mimi
from dsm_jax.models.streams import TokenRing
from dsm_jax.nn.sampling import sample_or_greedy
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.runtime.slots import write_rows
from dsm_jax.streaming import reset_rows, taken_BT
from dsm_jax.stt.levels import levels_of

Array = Any  # of jax or numpy: the host fills requests and inputs, the device holds them


@dataclasses.dataclass(frozen=True)
class SttSettings:
    """Settings that are fixed when the program is compiled.

    Attributes:
      slots: number of slots.
      prompt_tokens: room for the tokens of a text prompt.
      max_top_k: the largest top-k that a request may choose, see `sample`.
      ahead: the most steps that one pass of the language model runs.
      insert_steps: whether `insert` takes the first step, so that chunks of one frame need no loop; the loop takes it
        otherwise, and the language model is in one program in place of two.
    """

    slots: int
    prompt_tokens: int = 0
    max_top_k: int = 0
    ahead: int = 1
    insert_steps: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SttRequest:
    """The choices of each slot's request.

    Attributes:
      key_B2: PRNG key; the noise of a slot depends on it and on the slot's own step only.
      temperature_B: float32; 0 is greedy.
      top_k_B: int32; 0 is the whole vocabulary.
      prompt_BT: int32, one more than each text token that comes first; 0 after the last.
      deadline_B: int32, the frame by which the prompt's tokens have been produced; they are forced where the model has
        not chosen them by itself.
    """

    key_B2: Array
    temperature_B: Array
    top_k_B: Array
    prompt_BT: Array
    deadline_B: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """The language model's part of what the slots remember.

    Attributes:
      lm: state of the language model.
      ring: tokens still to be fed.
      prompted_B: int32, tokens of the text prompt that the model has produced.
    """

    lm: TransformerState
    ring: TokenRing
    prompted_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SttState:
    """Everything that the slots remember.

    Attributes:
      codec: state of Mimi's encoder.
      decoder: state of the language model, and its tokens.
      request: choices of each slot's request.
    """

    codec: CodecState
    decoder: DecoderState
    request: SttRequest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SttInputs:
    """A chunk of audio: samples in [-1, 1], whole frames, and the number of frames of each slot."""

    pcm_BTC: Array
    frames_B: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextOutputs:
    """The language model's outputs for every frame of a chunk; meaningless beyond a slot's `frames_B`."""

    tokens_BT: jax.Array  # int32
    probabilities_BT: jax.Array  # of the token, before temperature and prompt
    pauses_BTA: jax.Array  # of a pause over the next 0.5, 1, 2 and 3 s; A is 0 for models without pause heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrameOutputs(TextOutputs):
    """All outputs for every frame of a chunk: the language model's, and the sound level of each hop in decibels."""

    levels_BTH: jax.Array


def init_state(lm: DelayedStreamsLM, mimi: Mimi, settings: SttSettings) -> SttState:
    """Make the state of slots without requests."""
    slots = settings.slots
    request = SttRequest(
        jnp.zeros((slots, 2), jnp.uint32),
        jnp.zeros((slots,), jnp.float32),
        jnp.zeros((slots,), jnp.int32),
        jnp.zeros((slots, settings.prompt_tokens), jnp.int32),
        jnp.zeros((slots,), jnp.int32),
    )
    ring = TokenRing.empty(lm.config, slots, ahead=settings.ahead)
    decoder = DecoderState(lm.init_state(slots), ring, jnp.zeros((slots,), jnp.int32))
    return SttState(mimi.encoder.init_state(slots), decoder, request)


def insert(
    lm: DelayedStreamsLM, mimi: Mimi, state: SttState, slot_N: jax.Array, requests: SttRequest, settings: SttSettings
) -> SttState:
    """Make slots fresh and put a request into each; take their first step if the settings say so.

    Args:
      lm: the language model.
      mimi: the codec.
      state: any state; donate it.
      slot_N: int32, the slots to fill; a number out of range is no slot.
      requests: of N rows.
      settings: as for `init_state`.

    Returns:
      The next state; the other slots are as they were.
    """
    filled_B = jnp.zeros((settings.slots,), bool).at[slot_N].set(True, mode="drop")
    state = reset_rows(state, filled_B, init_state(lm, mimi, settings))
    state = dataclasses.replace(state, request=write_rows(state.request, slot_N, requests))
    if not settings.insert_steps:
        return state
    _, _, decoder = _text_steps(lm, state.decoder, state.request, filled_B.astype(jnp.int32), settings, 1)
    return dataclasses.replace(state, decoder=decoder)


def step(
    lm: DelayedStreamsLM, mimi: Mimi, state: SttState, inputs: SttInputs, settings: SttSettings
) -> tuple[FrameOutputs, SttState]:
    """Transcribe a chunk of audio.

    Args:
      lm: the language model.
      mimi: the codec; the first `lm.config.user_q` codebooks are computed.
      state: from `insert`, or from the step before; donate it.
      inputs: the chunk.
      settings: as for `init_state`.

    Returns:
      The outputs of each frame, and the next state.
    """
    frame_size = mimi.config.frame_size
    samples_B = inputs.frames_B * frame_size
    codes_BQF, codec = mimi.encode_step(inputs.pcm_BTC, state.codec, samples_B, codebooks=lm.config.user_q)
    state = dataclasses.replace(state, codec=codec)
    frames, most = codes_BQF.shape[2], min(settings.ahead, codes_BQF.shape[2])

    def take_pass(carry: tuple[jax.Array, DecoderState, TextOutputs]) -> tuple[jax.Array, DecoderState, TextOutputs]:
        frame_B, decoder, outputs = carry
        frame_BA = frame_B[:, None] + jnp.arange(most)
        codes_BQA = jnp.take_along_axis(codes_BQF, jnp.clip(frame_BA, 0, frames - 1)[:, None], axis=2)
        left_B = jnp.clip(inputs.frames_B - frame_B, 0, most)
        # The frame before step t is number t - 1. Step 0 has none before it: what is written there is never an input.
        ring = decoder.ring.with_frames(codes_BQA, decoder.lm.position_B - 1, left_B, lm.config)
        decoder = dataclasses.replace(decoder, ring=ring)
        made, taken_B, decoder = _text_steps(lm, decoder, state.request, left_B, settings, most)
        has_frame_BA = taken_BT(taken_B, most) & (frame_BA >= 0)
        place_BA = jnp.where(has_frame_BA, frame_BA, frames)  # out of range: nothing is written
        rows_B1 = jnp.arange(settings.slots)[:, None]
        outputs = jax.tree.map(lambda all, new: all.at[rows_B1, place_BA].set(new, mode="drop"), outputs, made)
        return frame_B + taken_B, decoder, outputs

    shape = (settings.slots, frames)
    outputs = TextOutputs(
        jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros((*shape, lm.config.extra_heads_num_heads))
    )
    fresh_B = (state.decoder.lm.position_B == 0) & (inputs.frames_B > 0)
    carry = -fresh_B.astype(jnp.int32), state.decoder, outputs
    if frames == 1 and settings.insert_steps:  # no loop, in which a GPU would copy the caches of int8 models
        carry = take_pass(carry)
    else:
        carry = jax.lax.while_loop(lambda carry: (carry[0] < inputs.frames_B).any(), take_pass, carry)
    _, decoder, text = carry
    outputs = FrameOutputs(**vars(text), levels_BTH=levels_of(inputs.pcm_BTC, mimi.config))
    return outputs, dataclasses.replace(state, decoder=decoder)


def _text_steps(
    lm: DelayedStreamsLM,
    decoder: DecoderState,
    request: SttRequest,
    left_B: jax.Array,
    settings: SttSettings,
    most: int,
) -> tuple[TextOutputs, jax.Array, DecoderState]:
    """Take up to `left_B` steps of the language model, as far as all tokens but the last are padding.

    Returns:
      The outputs of `most` steps, the number of them that each slot has taken, and the next state.
    """
    config, slots, first_B = lm.config, settings.slots, decoder.lm.position_B
    step_BA = first_B[:, None] + jnp.arange(most)
    if most == 1:  # nothing is guessed, and a single step reads what it has written
        hidden_BAD, after = lm.step(decoder.ring.inputs(step_BA, config), decoder.lm, left_B)
        chunk = ()
    else:
        padding_B1A = jnp.full((slots, 1, most), config.existing_text_padding_id, jnp.int32)
        guessed = decoder.ring.with_made(padding_B1A, first_B, jnp.full((slots,), most - 1))
        after = decoder.lm
        hidden_BAD, chunk = lm.peek(guessed.inputs(step_BA, config), after)
    logits_BAV = lm.text_logits(hidden_BAD)
    wanted_B = _next_prompt_token(request.prompt_BT, decoder.prompted_B)
    allowed_BAV = logits_BAV
    if settings.prompt_tokens:
        allowed_BAV = _as_prompted(logits_BAV, step_BA, wanted_B, decoder.prompted_B, request, config)
    keys_BA2 = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(request.key_B2, step_BA)
    tokens_BA = sample_or_greedy(
        allowed_BAV.reshape(slots * most, -1),
        keys_BA2.reshape(slots * most, 2),
        jnp.repeat(request.temperature_B, most),
        jnp.repeat(request.top_k_B, most),
        max_top_k=settings.max_top_k,
    ).reshape(slots, most)
    matched_BA = (wanted_B[:, None] >= 0) & (tokens_BA == wanted_B[:, None]) & (step_BA > 0)
    # After a token of the prompt the next one is wanted, even if that token was padding.
    right_BA = (tokens_BA == config.existing_text_padding_id) & ~matched_BA
    taken_B = jnp.minimum(left_B, 1 + jnp.cumprod(right_BA[:, :-1].astype(jnp.int32), axis=1).sum(axis=1))
    if most > 1:
        after = lm.commit(after, chunk, taken_B)
    ring = decoder.ring.with_made(tokens_BA[:, None], first_B, taken_B)
    prompted_B = decoder.prompted_B + (matched_BA & taken_BT(taken_B, most)).any(axis=1).astype(jnp.int32)
    probability_BA = jnp.take_along_axis(jax.nn.softmax(logits_BAV), tokens_BA[:, :, None], axis=-1)[:, :, 0]
    made = TextOutputs(tokens_BA, probability_BA, lm.extra_probabilities(hidden_BAD)[..., 0])
    return made, taken_B, DecoderState(after, ring, prompted_B)


def _as_prompted(
    logits_BAV: jax.Array,
    step_BA: jax.Array,
    wanted_B: jax.Array,
    prompted_B: jax.Array,
    request: SttRequest,
    config: LMConfig,
) -> jax.Array:
    """Leave each slot with a prompt its next token, and silence for as long as the prompt can still be in time."""
    ids_V = jnp.arange(logits_BAV.shape[-1])
    silent_V = (ids_V == config.existing_text_padding_id) | (ids_V == config.existing_text_end_padding_id)
    # The first step belongs to no frame, so a token made in it would be lost.
    next_BA = jnp.where(step_BA == 0, -1, wanted_B[:, None])
    left_B = (request.prompt_BT > 0).sum(axis=1) - prompted_B
    free_BA = left_B[:, None] < request.deadline_B[:, None] - step_BA + 1
    allowed_BAV = (silent_V & free_BA[..., None]) | (ids_V == next_BA[..., None]) | (wanted_B < 0)[:, None, None]
    return jnp.where(allowed_BAV, logits_BAV, -jnp.inf)


def _next_prompt_token(prompt_BT: jax.Array, prompted_B: jax.Array) -> jax.Array:
    """Return the prompt token that each slot has yet to produce, -1 when none is left."""
    padded_BT = jnp.pad(prompt_BT, ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded_BT, jnp.minimum(prompted_B, prompt_BT.shape[1])[:, None], axis=1)[:, 0] - 1
