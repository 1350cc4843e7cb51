"""Text to speech as pure functions: a script in, tokens and samples out, one state, nothing leaves the device.

Every step feeds the tokens of the step before to the backbone, which chooses a text token; the word machine turns that
into the token to be fed; the depformer generates the audio tokens of the step; and once the audio has begun, Mimi
decodes the frame that has become whole. All of it is one loop on the device, with a state per row.

The audio is `delay_steps` behind the text, and each codebook its own delay behind that, so the first steps of a row
have no audio: streams are fed -1 there, and while no row is further the depformer and the codec are not run.

Shape letters: B batch rows, R rows of the backbone (2 B under guidance, the second half without what guides), K streams
(text first), Q generated codebooks, P frames of a prefix, S ring slots, N steps of a call, T samples of a frame,
V vocabulary.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling); kyutai-labs/moshi@e6a55d2 moshi/models/tts.py:TTSModel
and moshi/models/lm.py:LMGen. A row that has come to its end stops, where the reference lets it run on until all have.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsm_jax.errors import ConfigError
from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.lm import ZERO_TOKEN, DelayedStreamsLM
from dsm_jax.models.mimi import CodecState, Mimi
from dsm_jax.nn.sampling import sample
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.streaming import select_rows
from dsm_jax.tts import words
from dsm_jax.tts.script import PAD, Script
from dsm_jax.tts.words import WordMachine, WordState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
    """How a model speaks, the same for all rows and fixed when the loop is compiled.

    Attributes:
      machine: the rules of the word machine.
      delay_steps: how far the audio is behind the text.
      codebooks: how many are generated.
      final_padding: steps that follow the end of the script, for the last word to sound in full.
      temperature: of text and audio tokens; 0 takes the most probable.
      top_k_text, top_k_audio: how many of the most probable tokens are drawn from; 0 is all.
      guidance: weight of classifier-free guidance; 1 is none. Models trained with distilled guidance take theirs as a
        condition instead.
      hide_text: what guides is the text: the second half of the rows is not fed it, and text is chosen by the first.
      hide_prefix: the second half is not fed the prefix either.
    """

    machine: WordMachine
    delay_steps: int
    codebooks: int
    final_padding: int = 4
    temperature: float = 0.6
    top_k_text: int = 25
    top_k_audio: int = 250
    guidance: float = 1.0
    hide_text: bool = True
    hide_prefix: bool = True

    @property
    def halves(self) -> int:
        """Rows of the backbone for each row."""
        return 1 if self.guidance == 1.0 else 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Told:
    """What every row is told before it starts; of the script, more may be added while it speaks.

    Attributes:
      script: what to say.
      conditions: from `lm.condition`, of R rows; None for models without conditioners.
      prefix_BQP: int32 codes of a recording to go on from; P may be 0.
      prefix_B: int32, how many of its frames each row has.
      bonus_B: float32, added to the score of padding: above 0 speaks slower.
      keys_B: a PRNG key per row, on which its noise depends, and on nothing else.
    """

    script: Script
    conditions: Conditions | None
    prefix_BQP: jax.Array
    prefix_B: jax.Array
    bonus_B: jax.Array
    keys_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TtsState:
    """Everything that a row remembers; the ring holds the tokens fed at the coming step and those before it."""

    lm: TransformerState
    words: WordState
    ring_BKS: jax.Array
    codec: CodecState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """What a call of `advance` made; rows did not run in every one of its steps, and have nothing there.

    Attributes:
      count: steps that were taken.
      frames_NBK: int32, the newest whole frame: the text as fed to the model, then the codes, delays undone.
      framed_NB: whether there is one: the row ran, and is as many steps in as the longest delay.
      taken_NB: whether the row began its next entry in this step.
      pcm_NBT: float32 samples of the frame, in [-1, 1].
      audible_NB: whether there are any: the frame is not before the audio's beginning.
    """

    count: jax.Array
    frames_NBK: jax.Array
    framed_NB: jax.Array
    taken_NB: jax.Array
    pcm_NBT: jax.Array
    audible_NB: jax.Array


def init_state(lm: DelayedStreamsLM, mimi: Mimi, how: Manner, batch_size: int) -> TtsState:
    """The state of `batch_size` rows before their first step.

    Raises:
      ConfigError: the model or its codec cannot make so many codebooks, or the codec has no decoder.
    """
    if mimi.decoder is None:
        raise ConfigError("the codec was made without its decoder; make it, or load it, with one to speak")
    most = min(lm.config.dep_q, mimi.config.quantizer.n_q)
    if not 1 <= how.codebooks <= most:
        raise ConfigError(f"{how.codebooks} codebooks are to be generated; the model and its codec make 1 to {most}")
    slots = max(lm.config.delays) + 2
    return TtsState(
        lm.init_state(batch_size * how.halves),
        words.init_state(how.machine, batch_size),
        jnp.full((batch_size, lm.config.n_q + 1, slots), ZERO_TOKEN, jnp.int32),
        mimi.decoder.init_state(batch_size),
    )


def running_B(how: Manner, told: Told, state: TtsState) -> jax.Array:
    """Which rows have a step to take: not at their end, and not waiting for more of their script."""
    step_B, end_B = _step_B(state), state.words.end_step_B
    ended_B = (end_B >= 0) & (step_B >= end_B + how.delay_steps + how.final_padding)
    waits_B = (step_B >= told.prefix_B) & ~words.ready_B(how.machine, told.script, state.words)
    return ~ended_B & ~waits_B


def advance(
    lm: DelayedStreamsLM, mimi: Mimi, told: Told, state: TtsState, limit: jax.Array, how: Manner, *, most: int
) -> tuple[Steps, TtsState]:
    """Takes up to `limit` steps, fewer when no row has any left to take.

    Args:
      lm: a model with a depformer.
      mimi: its codec.
      told: what the rows are told; the same as before but for what was added to the script.
      state: from `init_state`, or from the previous call. Donate it.
      limit: int32 [].
      how: the same as before.
      most: steps that there is room for, whatever the limit is.

    Returns:
      What was made, and the next state.
    """
    batch, streams, _ = state.ring_BKS.shape
    made = Steps(
        jnp.zeros((), jnp.int32),
        jnp.zeros((most, batch, streams), jnp.int32),
        jnp.zeros((most, batch), bool),
        jnp.zeros((most, batch), bool),
        jnp.zeros((most, batch, mimi.config.frame_size), jnp.float32),
        jnp.zeros((most, batch), bool),
    )

    def goes_on(carry: tuple[Steps, TtsState]) -> jax.Array:
        return (carry[0].count < jnp.minimum(limit, most)) & running_B(how, told, carry[1]).any()

    def take(carry: tuple[Steps, TtsState]) -> tuple[Steps, TtsState]:
        made, state = carry
        new, state = _take_step(lm, mimi, told, state, how)
        columns = [old.at[made.count].set(value) for old, value in zip(_columns(made), new, strict=True)]
        return Steps(made.count + 1, *columns), state

    return jax.lax.while_loop(goes_on, take, (made, state))


def _columns(made: Steps) -> tuple[jax.Array, ...]:
    return made.frames_NBK, made.framed_NB, made.taken_NB, made.pcm_NBT, made.audible_NB


def _step_B(state: TtsState) -> jax.Array:
    """Steps that each row has taken."""
    return state.lm.position_B[: state.ring_BKS.shape[0]]


def _take_step(
    lm: DelayedStreamsLM, mimi: Mimi, told: Told, state: TtsState, how: Manner
) -> tuple[tuple[jax.Array, ...], TtsState]:
    """One step of the rows that run; what it made, in the order of `Steps`."""
    config = lm.config
    active_B, step_B = running_B(how, told, state), _step_B(state)
    delays_K, slots = jnp.array(config.delays), state.ring_BKS.shape[2]
    rows_B, last = jnp.arange(step_B.size), max(config.delays)

    fed_RK = _fed(lm, told, state, how)
    lengths_R = jnp.tile(active_B.astype(jnp.int32), how.halves)
    hidden_RTD, backbone = lm.step(fed_RK[:, :, None], state.lm, lengths_R, told.conditions)
    hidden_RD = hidden_RTD[:, 0]

    scores_BV = _guided(lm.text_logits(hidden_RTD)[:, 0], how, choose_by_first=how.hide_text)
    scores_BV = scores_BV.at[:, PAD].add(told.bonus_B)
    sampled_B = _choose(scores_BV, told, step_B, 0, how.temperature, how.top_k_text)
    in_prefix_B = step_B < told.prefix_B
    text_B, taken_B, after = words.process(how.machine, told.script, state.words, sampled_B, step_B)
    text_B = jnp.where(in_prefix_B, ZERO_TOKEN, text_B)
    scripted = select_rows(active_B & ~in_prefix_B, after, state.words)

    def walk() -> jax.Array:
        def choose(q: int, logits_RV: jax.Array) -> jax.Array:
            tokens_B = _choose(_guided(logits_RV, how), told, step_B, 1 + q, how.temperature, how.top_k_audio)
            return jnp.tile(tokens_B, how.halves)

        assert lm.depformer is not None
        tokens_RQ = lm.depformer.walk(hidden_RD, jnp.tile(text_B, how.halves), choose, codebooks=how.codebooks)
        return tokens_RQ[: step_B.size]

    silent_BQ = jnp.full((step_B.size, how.codebooks), ZERO_TOKEN, jnp.int32)
    late_Q = delays_K[1 : 1 + how.codebooks] + how.delay_steps
    codes_BQ = jax.lax.cond((active_B & (step_B >= how.delay_steps)).any(), walk, lambda: silent_BQ)
    codes_BQ = jnp.where(step_B[:, None] < late_Q, ZERO_TOKEN, codes_BQ)
    codes_BQ = _with_prefix(codes_BQ, told, step_B[:, None] - late_Q)

    others = jnp.full((step_B.size, config.n_q - how.codebooks), ZERO_TOKEN, jnp.int32)
    made_BK = jnp.concatenate([text_B[:, None], codes_BQ, others], axis=1)
    ring_BKS = state.ring_BKS.at[rows_B, :, (step_B + 1) % slots].set(made_BK)
    ring_BKS = select_rows(active_B, ring_BKS, state.ring_BKS)

    # The token of frame f of a stream was made in step f + its delay, and lies in the slot of the step after.
    made_in_BK = step_B[:, None] - last + delays_K
    frame_BK = jnp.take_along_axis(ring_BKS, ((made_in_BK + 1) % slots)[:, :, None], axis=2)[:, :, 0]
    framed_B = active_B & (step_B >= last)
    audible_B = active_B & (step_B >= last + how.delay_steps)

    def decode() -> tuple[jax.Array, CodecState]:
        codes_BQ1 = jnp.maximum(frame_BK[:, 1 : 1 + how.codebooks, None], 0)
        pcm_BTC, codec = mimi.decode_step(codes_BQ1, state.codec, audible_B.astype(jnp.int32))
        return jnp.clip(pcm_BTC[:, :, 0], -1.0, 1.0), codec

    rest = jnp.zeros((step_B.size, mimi.config.frame_size), jnp.float32), state.codec
    pcm_BT, codec = jax.lax.cond(audible_B.any(), decode, lambda: rest)
    taken_B = taken_B & active_B & ~in_prefix_B
    return (frame_BK, framed_B, taken_B, pcm_BT, audible_B), TtsState(backbone, scripted, ring_BKS, codec)


def _fed(lm: DelayedStreamsLM, told: Told, state: TtsState, how: Manner) -> jax.Array:
    """The tokens that the backbone is fed in this step, [R, K]."""
    step_B1, delays_K = _step_B(state)[:, None], jnp.array(lm.config.delays)
    slot_B11 = (step_B1 % state.ring_BKS.shape[2])[:, :, None]
    initial_BK = step_B1 <= delays_K
    ring_BK = jnp.take_along_axis(state.ring_BKS, slot_B11, axis=2)[:, :, 0]
    fed_BK = jnp.where(initial_BK, lm.initial_K, ring_BK)
    if how.halves == 1:
        return fed_BK
    hidden_BK = jnp.zeros_like(initial_BK)
    if how.hide_prefix and told.prefix_BQP.shape[2]:
        until_BK = delays_K + told.prefix_B[:, None] + how.delay_steps
        hidden_BK = (step_B1 <= until_BK) & (told.prefix_B > 0)[:, None]
    if how.hide_text:
        hidden_BK = hidden_BK.at[:, 0].set(True)
    return jnp.concatenate([fed_BK, jnp.where(hidden_BK & ~initial_BK, ZERO_TOKEN, fed_BK)])


def _guided(logits_RV: jax.Array, how: Manner, *, choose_by_first: bool = False) -> jax.Array:
    """The scores of B rows from those of R."""
    if how.halves == 1:
        return logits_RV
    with_BV, without_BV = jnp.split(logits_RV, 2)
    return with_BV if choose_by_first else without_BV + (with_BV - without_BV) * how.guidance


def _choose(
    logits_BV: jax.Array, told: Told, step_B: jax.Array, stream: int, temperature: float, top_k: int
) -> jax.Array:
    """A token per row, by noise that is the row's own in this step and stream."""
    if temperature <= 0:
        return sample(logits_BV)
    keys_B = jax.vmap(lambda key, step: jax.random.fold_in(jax.random.fold_in(key, step), stream))(told.keys_B, step_B)
    return sample(logits_BV, keys_B, temperature=temperature, top_k=top_k)


def _with_prefix(codes_BQ: jax.Array, told: Told, frame_BQ: jax.Array) -> jax.Array:
    """The prefix's codes in place of those generated, for the frames that it has."""
    if not told.prefix_BQP.shape[2]:
        return codes_BQ
    at_BQ1 = jnp.clip(frame_BQ, 0, told.prefix_BQP.shape[2] - 1)[:, :, None]
    given_BQ = jnp.take_along_axis(told.prefix_BQP[:, : codes_BQ.shape[1]], at_BQ1, axis=2)[:, :, 0]
    return jnp.where((frame_BQ >= 0) & (frame_BQ < told.prefix_B[:, None]), given_BQ, codes_BQ)
