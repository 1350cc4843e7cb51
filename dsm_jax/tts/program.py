"""Text to speech as a program over slots: scripts in, tokens and samples out, one state, nothing leaves the device.

Every step feeds the tokens of the step before to the backbone, which chooses a text token; the word machine turns it
into the text token to be fed; the depformer generates the audio tokens of the step; and once the audio has begun, Mimi
decodes the frame that has become whole. All of it is one loop on the device, in which every slot is where it is.

The audio is `delay_steps` behind the text, and each codebook its own delay behind that, so the first steps of a slot
have no audio: its streams are fed -1 there, and while no slot is further the depformer and the codec do not run.

A prefix, the codes of a recording to go on from, comes before the script: a step for each of its frames, without text.
All tokens of these steps are known, so `insert` runs them at once (prefill).

Shape letters: B slots, N requests or steps of a call, R rows of the backbone (2 B under guidance, the second half
unconditional), K streams (text first; M in states and outputs), Q generated codebooks, T frames of a prefix or samples
of a frame, V vocabulary, L entries of a script, X positions of the voices.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling); kyutai-labs/moshi@e6a55d2 moshi/models/tts.py:TTSModel
and moshi/models/lm.py:LMGen. A slot that has come to its end stops, where the reference lets it run on until all have.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsm_jax.configs import LMConfig
from dsm_jax.errors import ConfigError
from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import CodecState, Mimi
from dsm_jax.models.streams import ZERO_TOKEN, TokenRing, behind_text, delay, inputs_of
from dsm_jax.nn.sampling import sample
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.runtime.slots import write_rows
from dsm_jax.runtime.steps import StepLimits, take_steps
from dsm_jax.streaming import PREFILL_BLOCK, place_rows, reset_rows, select_rows, step_in_blocks
from dsm_jax.tts import voices, words
from dsm_jax.tts.script import PAD, Script
from dsm_jax.tts.state import ConditionValues, StepOutputs, TtsRequest, TtsSettings, TtsState


def init_state(lm: DelayedStreamsLM, mimi: Mimi, settings: TtsSettings) -> TtsState:
    """Make the state of slots without requests.

    Raises:
      ConfigError: the codec has no decoder, or fewer codebooks than the model generates.
    """
    decoder = mimi.require_decoder()
    config, slots, rows = lm.config, settings.slots, settings.slots * settings.halves
    if not 1 <= config.dep_q <= mimi.config.quantizer.n_q:
        raise ConfigError(f"the model generates {config.dep_q} codebooks; its codec has {mimi.config.quantizer.n_q}")

    def zeros(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype)

    script = Script(
        tokens_BT=zeros(jnp.int32, settings.tokens),
        start_BL=zeros(jnp.int32, settings.entries),
        end_BL=zeros(jnp.int32, settings.entries),
        padding_BL=zeros(jnp.int32, settings.entries),
        words_before_BL=zeros(jnp.int32, settings.entries),
        word_BL=zeros(jnp.int32, settings.entries),
        count_B=zeros(jnp.int32),
        words_B=zeros(jnp.int32),
        complete_B=zeros(jnp.bool),
    )
    request = TtsRequest(
        key_B2=zeros(jnp.uint32, 2),
        temperature_B=zeros(jnp.float32),
        top_k_text_B=zeros(jnp.int32),
        top_k_audio_B=zeros(jnp.int32),
        guidance_B=zeros(jnp.float32),
        padding_bonus_B=zeros(jnp.float32),
        codebooks_B=zeros(jnp.int32),
        max_padding_B=zeros(jnp.int32),
        initial_padding_B=zeros(jnp.int32),
        final_padding_B=zeros(jnp.int32),
        max_steps_B=zeros(jnp.int32),
        prefix_BQT=zeros(jnp.int32, config.n_q, settings.prefix_frames),
        prefix_B=zeros(jnp.int32),
        script=script,
    )
    return TtsState(
        lm.init_state(rows),
        words.init_state(request.max_padding_B, request.initial_padding_B),
        TokenRing.empty(config, slots),
        decoder.init_state(slots),
        _no_conditions(lm, rows, settings.voice_steps),
        request,
    )


def _no_conditions(lm: DelayedStreamsLM, rows: int, voice_steps: int) -> Conditions | None:
    """Make the conditions of rows without requests: zeros."""
    if lm.conditioning is None:
        return None
    values, masks = voices.absent(lm.config, rows, voice_steps)
    shapes = jax.eval_shape(lm.condition, values, masks)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return dataclasses.replace(zeros, length_B=jnp.zeros((rows,), jnp.int32))


def insert(
    lm: DelayedStreamsLM,
    mimi: Mimi,
    state: TtsState,
    slot_N: jax.Array,
    requests: TtsRequest,
    conditions: ConditionValues,
    settings: TtsSettings,
) -> TtsState:
    """Make slots fresh, put a request into each, and take the steps of its prefix.

    Args:
      lm: a model with a depformer.
      mimi: its codec.
      state: any state; donate it.
      slot_N: int32, the slots to fill.
      requests: of N rows.
      conditions: of N requests.
      settings: as for `init_state`.

    Returns:
      The next state; the other slots are as they were.
    """
    filled_B = jnp.zeros((settings.slots,), bool).at[slot_N].set(True)
    fresh = init_state(lm, mimi, settings)
    request = write_rows(state.request, slot_N, requests)
    fresh_words = words.init_state(request.max_padding_B, request.initial_padding_B)
    after = TtsState(
        lm=reset_rows(state.lm, jnp.tile(filled_B, settings.halves), fresh.lm),
        words=reset_rows(state.words, filled_B, fresh_words),
        ring=reset_rows(state.ring, filled_B, fresh.ring),
        codec=reset_rows(state.codec, filled_B, fresh.codec),
        conditions=state.conditions,
        request=request,
    )
    row_N, made = jnp.concatenate([slot_N + half * settings.slots for half in range(settings.halves)]), None
    if lm.conditioning is not None and state.conditions is not None:
        values, masks, length_N = conditions.values, conditions.masks, conditions.length_N
        if settings.guided:
            values, masks = voices.with_unconditional(values, masks, lm.config)
            length_N = jnp.concatenate([length_N, length_N])
        made = dataclasses.replace(lm.condition(values, masks), length_B=length_N)
        after = dataclasses.replace(after, conditions=write_rows(state.conditions, row_N, made))
    if not settings.prefix_frames:
        return after

    def prefill() -> tuple[TransformerState, TokenRing, CodecState]:
        return _prefill(lm, mimi, requests, made, settings)

    fresh = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(prefill))
    backbone, ring, codec = jax.lax.cond((requests.prefix_B > 0).any(), prefill, lambda: fresh)
    return dataclasses.replace(
        after,
        lm=place_rows(after.lm, row_N, backbone),
        ring=place_rows(after.ring, slot_N, ring),
        codec=place_rows(after.codec, slot_N, codec),
    )


def _prefill(
    lm: DelayedStreamsLM, mimi: Mimi, requests: TtsRequest, conditions: Conditions | None, settings: TtsSettings
) -> tuple[TransformerState, TokenRing, CodecState]:
    """Take a step for each frame of the prefixes of N requests, in fresh rows.

    Returns:
      The state of the backbone, the tokens still to be fed, and the state of the codec after these steps.
    """
    config, length_N, (count, _, room) = lm.config, requests.prefix_B, requests.prefix_BQT.shape
    made_NQ = jnp.arange(config.n_q) < jnp.minimum(requests.codebooks_B, config.dep_q)[:, None]
    codes_NQT = jnp.where(made_NQ[:, :, None], requests.prefix_BQT, ZERO_TOKEN)
    behind_NQT = behind_text(codes_NQT, settings.delay_steps)
    frames_NKT = jnp.pad(behind_NQT, ((0, 0), (1, 0), (0, 0)), constant_values=ZERO_TOKEN)  # no text
    made_NKT = delay(frames_NKT, lm.initial_M, config.delays)
    step_NT = jnp.broadcast_to(jnp.arange(room), (count, room))
    inputs_RKT = _with_unconditional(inputs_of(made_NKT, lm.initial_M), step_NT, requests, config, settings)

    def run(
        inputs_RTK: jax.Array, state: TransformerState, lengths_R: jax.Array | None
    ) -> tuple[tuple[()], TransformerState]:
        return (), lm.step(inputs_RTK.swapaxes(1, 2), state, lengths_R, conditions)[1]

    rows, lengths_R = count * settings.halves, jnp.tile(length_N, settings.halves)
    fresh = lm.init_state(rows, min(room, config.context))
    _, backbone = step_in_blocks(run, inputs_RKT.swapaxes(1, 2), fresh, lengths_R, PREFILL_BLOCK)

    codec = mimi.require_decoder().init_state(count)
    late = max(config.delays) + settings.delay_steps  # steps before the first frame of sound
    if room > late:
        heard_NQT, heard_N = codes_NQT[:, : config.dep_q, : room - late], jnp.maximum(length_N - late, 0)
        _, codec = mimi.decode_step(heard_NQT, codec, heard_N)
    return backbone, TokenRing.after(made_NKT, length_N, config), codec


def extend(
    lm: DelayedStreamsLM, mimi: Mimi, state: TtsState, slot_N: jax.Array, scripts: Script, settings: TtsSettings
) -> TtsState:
    """Give slots their scripts again, with more at the end of each; donate the state."""
    request = dataclasses.replace(state.request, script=write_rows(state.request.script, slot_N, scripts))
    return dataclasses.replace(state, request=request)


def _step_B(state: TtsState) -> jax.Array:
    """Return the steps that each slot has taken."""
    return state.lm.position_B[: state.request.prefix_B.shape[0]]


def _ends(settings: TtsSettings, state: TtsState) -> tuple[jax.Array, jax.Array]:
    """Return which slots have come to the end of their script, and which have ended or given up."""
    step_B, end_B, request = _step_B(state), state.words.end_step_B, state.request
    complete_B = (end_B >= 0) & (step_B >= end_B + settings.delay_steps + request.final_padding_B)
    return complete_B, complete_B | (step_B >= request.max_steps_B)


def _waits_B(settings: TtsSettings, state: TtsState) -> jax.Array:
    """Return which slots can take no step until more of their script is there."""
    return ~words.ready_B(settings.machine, state.request.script, state.words)


def step(
    lm: DelayedStreamsLM, mimi: Mimi, state: TtsState, limits: StepLimits, settings: TtsSettings
) -> tuple[StepOutputs, TtsState]:
    """Take up to `limit` steps, fewer when no slot has any left to take.

    Args:
      lm: a model with a depformer.
      mimi: its codec.
      state: from `insert`, or from the call before; donate it.
      limits: extent of the call.
      settings: as for `init_state`.

    Returns:
      What was made, and the next state.
    """
    batch, streams, room = settings.slots, lm.config.n_q + 1, settings.steps
    columns = (
        jnp.zeros((room, batch), jnp.int32),
        jnp.zeros((room, batch, streams), jnp.int32),
        jnp.zeros((room, batch), bool),
        jnp.zeros((room, batch), bool),
        jnp.zeros((room, batch, mimi.config.frame_size), jnp.float32),
        jnp.zeros((room, batch), bool),
    )
    count, columns, state = take_steps(
        lambda state, active_B: _take_step(lm, mimi, state, active_B, settings),
        state,
        columns,
        limits,
        waits_B=lambda state: _waits_B(settings, state),
        ended_B=lambda state: _ends(settings, state)[1],
    )
    complete_B, ended_B = _ends(settings, state)
    step_NB, frames_NBM, framed_NB, taken_NB, pcm_NBT, audible_NB = columns
    outputs = StepOutputs(
        count=count,
        step_NB=step_NB,
        frames_NBM=frames_NBM,
        framed_NB=framed_NB,
        taken_NB=taken_NB,
        pcm_NBT=pcm_NBT,
        audible_NB=audible_NB,
        ended_B=ended_B,
        complete_B=complete_B,
        waits_B=_waits_B(settings, state),
    )
    return outputs, state


def _take_step(
    lm: DelayedStreamsLM, mimi: Mimi, state: TtsState, active_B: jax.Array, settings: TtsSettings
) -> tuple[tuple[jax.Array, ...], TtsState]:
    """Take one step of the active slots; return the step's column of every output, and the next state."""
    config, request, step_B = lm.config, state.request, _step_B(state)
    delays_K, last, dep_q = jnp.array(config.delays), max(config.delays), config.dep_q

    step_B1 = step_B[:, None]
    inputs_RK1 = _with_unconditional(state.ring.inputs(step_B1, config), step_B1, request, config, settings)
    lengths_R = jnp.tile(active_B.astype(jnp.int32), settings.halves)
    hidden_RTD, backbone = lm.step(inputs_RK1, state.lm, lengths_R, state.conditions)

    scores_RV = lm.text_logits(hidden_RTD)[:, 0]
    scores_BV = scores_RV[: step_B.size] if settings.uncond_drops_text else _guided(scores_RV, request, settings)
    scores_BV = scores_BV.at[:, PAD].add(request.padding_bonus_B)
    sampled_B = _sample(scores_BV, request, step_B, 0, request.top_k_text_B, settings.max_top_k_text)
    text_B, taken_B, after = words.process(settings.machine, request.script, state.words, sampled_B, step_B)
    scripted = select_rows(active_B, after, state.words)

    late_Q = delays_K[1 : 1 + dep_q] + settings.delay_steps
    # Before these steps all codes are known: absent, or the prefix's.
    walks_B = active_B & (step_B >= request.prefix_B + settings.delay_steps)

    def walk() -> jax.Array:
        def choose(q: int, logits_RV: jax.Array) -> jax.Array:
            scores_BV = _guided(logits_RV, request, settings)
            tokens_B = _sample(scores_BV, request, step_B, 1 + q, request.top_k_audio_B, settings.max_top_k_audio)
            return jnp.tile(tokens_B, settings.halves)

        assert lm.depformer is not None
        wanted = jnp.max(jnp.where(walks_B, request.codebooks_B, 0))
        text_R = jnp.tile(text_B, settings.halves)
        tokens_RQ = lm.depformer.walk(hidden_RTD[:, 0], text_R, choose, codebooks=dep_q, wanted=wanted)
        return tokens_RQ[: step_B.size]

    absent_BQ = jnp.full((step_B.size, dep_q), ZERO_TOKEN, jnp.int32)
    codes_BQ = jax.lax.cond(walks_B.any(), walk, lambda: absent_BQ)
    codes_BQ = jnp.where(step_B[:, None] < late_Q, ZERO_TOKEN, codes_BQ)
    codes_BQ = _with_prefix(codes_BQ, request, step_B[:, None] - late_Q)
    codes_BQ = jnp.where(jnp.arange(dep_q) < request.codebooks_B[:, None], codes_BQ, ZERO_TOKEN)

    others_BQ = jnp.full((step_B.size, config.n_q - dep_q), ZERO_TOKEN, jnp.int32)
    made_BK = jnp.concatenate([text_B[:, None], codes_BQ, others_BQ], axis=1)
    ring = state.ring.with_made(made_BK[:, :, None], step_B, active_B.astype(jnp.int32))
    frame_BK = ring.newest_frame(step_B, config)
    framed_B = active_B & (step_B >= last)
    audible_B = active_B & (step_B >= last + settings.delay_steps)

    def decode() -> tuple[jax.Array, CodecState]:
        codes_BQ1 = frame_BK[:, 1 : 1 + dep_q, None]
        pcm_BTC, codec = mimi.decode_step(codes_BQ1, state.codec, audible_B.astype(jnp.int32))
        return jnp.clip(pcm_BTC[:, :, 0], -1.0, 1.0), codec

    silence = jnp.zeros((step_B.size, mimi.config.frame_size), jnp.float32), state.codec
    pcm_BT, codec = jax.lax.cond(audible_B.any(), decode, lambda: silence)
    columns = step_B, frame_BK, framed_B, taken_B & active_B, pcm_BT, audible_B
    return columns, TtsState(backbone, scripted, ring, codec, state.conditions, request)


def _with_unconditional(
    inputs_BKT: jax.Array, step_BT: jax.Array, request: TtsRequest, config: LMConfig, settings: TtsSettings
) -> jax.Array:
    """Return the tokens that the backbone is fed in the steps `step_BT` of each slot, [R, K, T]."""
    if not settings.guided:
        return inputs_BKT
    delays_K1, step_B1T = jnp.array(config.delays)[:, None], step_BT[:, None]
    initial_BKT = step_B1T <= delays_K1
    dropped_BKT = jnp.zeros_like(initial_BKT)
    if settings.uncond_drops_prefix and settings.prefix_frames:
        prefix_B11 = request.prefix_B[:, None, None]
        dropped_BKT = (step_B1T <= delays_K1 + prefix_B11 + settings.delay_steps) & (prefix_B11 > 0)
    if settings.uncond_drops_text:
        dropped_BKT = dropped_BKT.at[:, 0].set(True)
    return jnp.concatenate([inputs_BKT, jnp.where(dropped_BKT & ~initial_BKT, ZERO_TOKEN, inputs_BKT)])


def _guided(logits_RV: jax.Array, request: TtsRequest, settings: TtsSettings) -> jax.Array:
    """Return the scores of B slots from those of R rows; without guidance a slot takes the conditional ones."""
    if not settings.guided:
        return logits_RV
    with_BV, without_BV = jnp.split(logits_RV, 2)
    guidance_B1 = request.guidance_B[:, None]
    return jnp.where(guidance_B1 == 1.0, with_BV, without_BV + (with_BV - without_BV) * guidance_B1)


def _sample(
    logits_BV: jax.Array, request: TtsRequest, step_B: jax.Array, stream: int, top_k_B: jax.Array, max_top_k: int
) -> jax.Array:
    """Choose a token per slot, by noise that is the slot's own in this step and stream."""
    fold = jax.random.fold_in
    keys_B = jax.vmap(lambda key_2, step: fold(fold(key_2, step), stream))(request.key_B2, step_B)
    return sample(logits_BV, keys_B, request.temperature_B, top_k_B, max_top_k=max_top_k)


def _with_prefix(codes_BQ: jax.Array, request: TtsRequest, frame_BQ: jax.Array) -> jax.Array:
    """Replace generated codes by the prefix's, for the frames that it has."""
    room = request.prefix_BQT.shape[2]
    if not room:
        return codes_BQ
    at_BQ1 = jnp.clip(frame_BQ, 0, room - 1)[:, :, None]
    given_BQ = jnp.take_along_axis(request.prefix_BQT[:, : codes_BQ.shape[1]], at_BQ1, axis=2)[:, :, 0]
    return jnp.where((frame_BQ >= 0) & (frame_BQ < request.prefix_B[:, None]), given_BQ, codes_BQ)
