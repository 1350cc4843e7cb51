"""Speech to text as a program over slots: audio in, text tokens out, one state, nothing leaves the device.

`insert` makes slots fresh, writes their requests into the state, and takes the model's first step, which precedes the
first frame. `step` takes a chunk of audio: Mimi encodes all of it, and a scan over its frames feeds each to the
language model and chooses a text token.

Shape letters: B slots, N requests, T samples or prompt tokens, C audio channels, F frames of the chunk, Q codebooks, V
vocabulary, H pause horizons.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.checkpoints import Model
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import CodecState, Mimi
from dsm_jax.models.streams import TokenRing
from dsm_jax.nn.sampling import sample_or_greedy
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.runtime.compile import compiled, plain
from dsm_jax.runtime.slots import grow, write_rows
from dsm_jax.streaming import reset_rows, select_rows

Array = Any  # of jax or numpy: the host fills requests and inputs, the device holds them

_PROMPT_STEP = 64  # the room for prompts grows by so many tokens, so that few sizes are ever compiled


@dataclasses.dataclass(frozen=True)
class SttSettings:
    """Settings that are fixed when the program is compiled.

    Attributes:
      slots: number of slots.
      prompt_tokens: room for the tokens of a text prompt.
      max_top_k: the largest top-k that a request may choose, see `sample`.
    """

    slots: int
    prompt_tokens: int = 0
    max_top_k: int = 0


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
class SttState:
    """Everything that the slots remember.

    Attributes:
      codec: state of Mimi's encoder.
      lm: state of the language model.
      ring: tokens still to be fed.
      prompted_B: int32, tokens of the text prompt that the model has produced.
      request: choices of each slot's request.
    """

    codec: CodecState
    lm: TransformerState
    ring: TokenRing
    prompted_B: jax.Array
    request: SttRequest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SttInputs:
    """A chunk of audio: samples in [-1, 1], whole frames, and the number of frames of each slot."""

    pcm_BTC: Array
    frames_B: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrameOutputs:
    """The model's outputs for every frame of a chunk; meaningless beyond a slot's `frames_B`."""

    tokens_BF: jax.Array  # int32
    probabilities_BF: jax.Array  # of the token, before temperature and prompt
    pauses_BFH: jax.Array  # of a pause over the next 0.5, 1, 2 and 3 s; H is 0 for models without pause heads


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
    return SttState(
        mimi.encoder.init_state(slots),
        lm.init_state(slots),
        TokenRing.empty(lm.config, slots),
        jnp.zeros((slots,), jnp.int32),
        request,
    )


def insert(
    lm: DelayedStreamsLM, mimi: Mimi, state: SttState, slot_N: jax.Array, requests: SttRequest, settings: SttSettings
) -> SttState:
    """Make slots fresh, put a request into each, and take their first step, on initial tokens alone.

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
    return _text_step(lm, state, filled_B, settings)[1]


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

    def frame_step(carry: tuple[TransformerState, TokenRing, jax.Array], frame: tuple[jax.Array, jax.Array]):
        codes_BQ, active_B = frame
        before = dataclasses.replace(state, lm=carry[0], ring=carry[1], prompted_B=carry[2])
        # The frame before step t is number t - 1.
        ring = before.ring.with_frame(codes_BQ, before.lm.position_B - 1, lm.config).kept(active_B, before.ring)
        made, after = _text_step(lm, dataclasses.replace(before, ring=ring), active_B, settings)
        return (after.lm, after.ring, after.prompted_B), made

    frames = inputs.pcm_BTC.shape[1] // frame_size
    active_FB = jnp.arange(frames)[:, None] < inputs.frames_B
    carry = state.lm, state.ring, state.prompted_B
    carry, made = jax.lax.scan(frame_step, carry, (jnp.moveaxis(codes_BQF, 2, 0), active_FB))
    outputs = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), FrameOutputs(*made))
    return outputs, dataclasses.replace(state, lm=carry[0], ring=carry[1], prompted_B=carry[2])


def _text_step(
    lm: DelayedStreamsLM, state: SttState, active_B: jax.Array, settings: SttSettings
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], SttState]:
    """Take one step of the language model: token, its probability and pauses, and the next state."""
    config, request, step_B = lm.config, state.request, state.lm.position_B
    wanted_B = _next_prompt_token(request.prompt_BT, state.prompted_B)
    inputs_BM = state.ring.inputs(step_B, config)
    hidden_BTD, after = lm.step(inputs_BM[:, :, None], state.lm, active_B.astype(jnp.int32))
    logits_BV = lm.text_logits(hidden_BTD)[:, 0]
    allowed_BV = logits_BV
    if settings.prompt_tokens:
        ids_V = jnp.arange(logits_BV.shape[1])
        silent_V = (ids_V == config.existing_text_padding_id) | (ids_V == config.existing_text_end_padding_id)
        # The first step belongs to no frame, so a token made in it would be lost.
        next_B1 = jnp.where(step_B == 0, -1, wanted_B)[:, None]
        left_B = (request.prompt_BT > 0).sum(axis=1) - state.prompted_B
        free_B1 = (left_B < request.deadline_B - step_B + 1)[:, None]
        allowed = (silent_V & free_B1) | (ids_V == next_B1) | (wanted_B < 0)[:, None]
        allowed_BV = jnp.where(allowed, logits_BV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in)(request.key_B2, step_B)
    tokens_B = sample_or_greedy(
        allowed_BV, keys_B, request.temperature_B, request.top_k_B, max_top_k=settings.max_top_k
    )
    probability_B = jnp.take_along_axis(jax.nn.softmax(logits_BV), tokens_B[:, None], axis=-1)[:, 0]
    pauses_BH = lm.extra_probabilities(hidden_BTD)[:, 0, :, 0]
    matched_B = (wanted_B >= 0) & (tokens_B == wanted_B) & (step_B > 0)
    prompted_B = select_rows(active_B, state.prompted_B + matched_B.astype(jnp.int32), state.prompted_B)
    ring = state.ring.with_made(tokens_B[:, None], step_B).kept(active_B, state.ring)
    after = dataclasses.replace(state, lm=after, ring=ring, prompted_B=prompted_B)
    return (tokens_B, probability_B, pauses_BH), after


def _next_prompt_token(prompt_BT: jax.Array, prompted_B: jax.Array) -> jax.Array:
    """Return the prompt token that each slot has yet to produce, -1 when none is left."""
    padded_BT = jnp.pad(prompt_BT, ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded_BT, jnp.minimum(prompted_B, prompt_BT.shape[1])[:, None], axis=1)[:, 0] - 1


class SttProgram:
    """The program for one model, compiled, with its parameters.

    Args:
      model: a speech-to-text model.
      slots: number of slots.
      chunks: frames of a chunk, in ascending order; each call takes the least that holds the inputs of its slots.
      max_top_k: the largest top-k that any request will choose.
      prompt_tokens: room for text prompts; longer ones make the program grow, which compiles it anew.
    """

    def __init__(self, model: Model, slots: int, chunks: Sequence[int], *, max_top_k: int = 0, prompt_tokens: int = 0):
        assert model.lm_def is not None
        assert model.lm_params is not None
        self.slots, self.inserts, self.chunks = slots, slots, tuple(chunks)
        self._graphs: tuple[nnx.GraphDef, nnx.GraphDef] = model.lm_def, model.mimi_def
        self._params = plain(model.lm_params, model.mimi_params)
        self._frame_size = model.config.mimi.frame_size
        self._compile(SttSettings(slots, _rounded_up(prompt_tokens), max_top_k))

    def _compile(self, settings: SttSettings) -> None:
        """Compile before any state is allocated, so that the two peaks of memory do not add up."""
        self.settings = settings
        self._init, self._insert, self._step = (
            compiled(function, self._graphs, settings, donate)
            for function, donate in ((init_state, ()), (insert, (0,)), (step, (0,)))
        )
        state = self._init.shapes(self._params)
        requests = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state.request)
        self._insert.compile(self._params, state, np.zeros(self.slots, np.int32), requests)
        for frames in self.chunks:
            self._step.compile(self._params, state, self._inputs([None] * self.slots, frames))

    def add_chunk(self, frames: int) -> None:
        """Compile for chunks of one more size, larger than those before."""
        self.chunks = (*self.chunks, frames)
        self._step.compile(self._params, self._init.shapes(self._params), self._inputs([None] * self.slots, frames))

    def init(self) -> SttState:
        """Make the state of slots without requests."""
        return self._init(self._params)

    def insert(self, state: SttState, slot_N: Sequence[int], requests: Sequence[SttRequest]) -> SttState:
        """Put requests into slots."""
        longest = max(request.prompt_BT.shape[0] for request in requests)
        if longest > self.settings.prompt_tokens:
            self._compile(dataclasses.replace(self.settings, prompt_tokens=_rounded_up(longest)))
            state = grow(state, self._init.shapes(self._params))
        room, spare = self.settings.prompt_tokens, self.slots - len(requests)
        rows = [_with_room(request, room) for request in [*requests, *[requests[0]] * spare]]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        numbers = np.array([*slot_N, *[self.slots] * spare], np.int32)
        return self._insert(self._params, state, numbers, stacked)

    def step(
        self, state: SttState, parts: Sequence["Samples | None"], *, waiting: bool = False
    ) -> tuple[FrameOutputs, SttState]:
        """Transcribe a chunk; returns at once, with outputs that may still be computed."""
        longest = max((part.pcm_T.size // self._frame_size for part in parts if part is not None), default=0)
        frames = next(chunk for chunk in self.chunks if chunk >= longest)
        return self._step(self._params, state, self._inputs(parts, frames))

    def _inputs(self, parts: Sequence["Samples | None"], frames: int) -> SttInputs:
        pcm_BT = np.zeros((self.slots, frames * self._frame_size), np.float32)
        frames_B = np.zeros(self.slots, np.int32)
        for slot, part in enumerate(parts):
            if part is not None:
                pcm_BT[slot, : part.pcm_T.size] = part.pcm_T
                frames_B[slot] = part.pcm_T.size // self._frame_size
        return SttInputs(pcm_BT[:, :, None], frames_B)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The input of one slot: whole frames of samples [T], and whether no more will come."""

    pcm_T: np.ndarray
    last: bool


def _rounded_up(tokens: int) -> int:
    return -(-tokens // _PROMPT_STEP) * _PROMPT_STEP


def _with_room(request: SttRequest, tokens: int) -> SttRequest:
    padded = np.zeros(tokens, np.int32)
    padded[: request.prompt_BT.shape[0]] = request.prompt_BT
    return dataclasses.replace(request, prompt_BT=padded)
