"""Speech to text as pure functions: audio in, text tokens out, one state, nothing leaves the device.

`start` makes rows fresh and takes the model's first step, which hears nothing; `advance` then takes a chunk of audio:
Mimi encodes it whole, and a scan over its frames feeds each to the language model and chooses a text token.

Shape letters: B batch rows, T samples, C audio channels, F frames of the chunk, Q codebooks, V vocabulary, P prompt
tokens, H pause horizons.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsm_jax.models import generation
from dsm_jax.models.generation import GenerationState
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import CodecState, Mimi
from dsm_jax.nn.sampling import sample
from dsm_jax.streaming import reset_rows, select_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SttState:
    """Everything that a stream remembers."""

    codec: CodecState
    text: GenerationState
    prompted_B: jax.Array  # tokens of the text prompt that have been said


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrameOutputs:
    """What the model said of each frame."""

    tokens_BF: jax.Array  # int32
    probabilities_BF: jax.Array  # of the token, before temperature and prompt
    pauses_BFH: jax.Array  # of a pause over the next 0.5, 1, 2 and 3 s; H is 0 for models without pause heads


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text tokens are chosen; temperature 0 takes the most probable."""

    temperature: float = 0.0
    top_k: int = 0


def init_state(lm: DelayedStreamsLM, mimi: Mimi, batch_size: int) -> SttState:
    """The state of `batch_size` fresh rows; `start` them before the first `advance`."""
    return SttState(
        mimi.encoder.init_state(batch_size),
        generation.init_state(lm, batch_size),
        jnp.zeros((batch_size,), jnp.int32),
    )


def start(
    lm: DelayedStreamsLM, state: SttState, rows_B: jax.Array, prompt_BP: jax.Array, key: jax.Array, how: Sampling
) -> SttState:
    """Makes rows fresh and takes their first step, on initial tokens alone; the other rows are left as they are.

    Args:
      lm: the language model.
      state: any state of these rows.
      rows_B: bool, the rows to start.
      prompt_BP: int32 text tokens that the rows are to say first, 0 after the last; [B, 0] for none.
      key: PRNG key; each row's noise depends on the key and on its own step only.
      how: how tokens are chosen.

    Returns:
      The state after it.
    """
    batch = rows_B.shape[0]
    fresh = SttState(state.codec, generation.init_state(lm, batch), jnp.zeros((batch,), jnp.int32))
    fresh_codec = jax.tree.map(jnp.zeros_like, state.codec)
    state = reset_rows(state, rows_B, dataclasses.replace(fresh, codec=fresh_codec))
    nothing_BQ = jnp.zeros((rows_B.shape[0], lm.config.user_q), jnp.int32)
    text, prompted_B, _ = _say(lm, nothing_BQ, state.text, state.prompted_B, rows_B, prompt_BP, key, how)
    return SttState(state.codec, text, prompted_B)


def advance(
    lm: DelayedStreamsLM,
    mimi: Mimi,
    state: SttState,
    pcm_BTC: jax.Array,
    frames_B: jax.Array,
    prompt_BP: jax.Array,
    key: jax.Array,
    how: Sampling,
) -> tuple[FrameOutputs, SttState]:
    """Hears a chunk of audio.

    Args:
      lm: the language model.
      mimi: the codec; the first `lm.config.user_q` codebooks are computed.
      state: from `start`, or from the previous call. Donate it.
      pcm_BTC: samples in [-1, 1], a whole number of frames.
      frames_B: int32, how many frames of the chunk each row has; 0 leaves the row untouched. A row with fewer frames
        than the chunk is at its end: what it hears after them is not defined until it is started again.
      prompt_BP: as given to `start`.
      key: as given to `start`.
      how: as given to `start`.

    Returns:
      What was said of each frame (meaningless beyond `frames_B`), and the next state.
    """
    frames = pcm_BTC.shape[1] // mimi.config.frame_size
    samples_B = frames_B * mimi.config.frame_size
    codes_BQF, codec = mimi.encode_step(pcm_BTC, state.codec, samples_B, codebooks=lm.config.user_q)

    def hear(carry: tuple[GenerationState, jax.Array], frame: tuple[jax.Array, jax.Array]):
        codes_BQ, active_B = frame
        text, prompted_B, said = _say(lm, codes_BQ, *carry, active_B, prompt_BP, key, how)
        return (text, prompted_B), said

    active_FB = jnp.arange(frames)[:, None] < frames_B
    carry, said = jax.lax.scan(hear, (state.text, state.prompted_B), (jnp.moveaxis(codes_BQF, 2, 0), active_FB))
    outputs = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), FrameOutputs(*said))
    return outputs, SttState(codec, *carry)


def _say(
    lm: DelayedStreamsLM,
    codes_BQ: jax.Array,
    text: GenerationState,
    prompted_B: jax.Array,
    active_B: jax.Array,
    prompt_BP: jax.Array,
    key: jax.Array,
    how: Sampling,
) -> tuple[GenerationState, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """One step of the language model: its state, the prompt's progress, and token, probability and pauses."""
    config = lm.config
    wanted_B = _next_prompt_token(prompt_BP, prompted_B)

    def choose(logits_BV: jax.Array) -> jax.Array:
        if prompt_BP.shape[1]:
            ids_V = jnp.arange(logits_BV.shape[1])
            silent_V = (ids_V == config.existing_text_padding_id) | (ids_V == config.existing_text_end_padding_id)
            # The first step belongs to no frame, so what it said would be lost.
            sayable_B = jnp.where(text.step_B == 0, -1, wanted_B)
            allowed_BV = silent_V | (ids_V == sayable_B[:, None]) | (wanted_B == 0)[:, None]
            logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
        keys_B = None if how.temperature <= 0 else jax.vmap(lambda step: jax.random.fold_in(key, step))(text.step_B)
        return sample(logits_BV, keys_B, temperature=how.temperature, top_k=how.top_k)

    tokens_B, logits_BV, hidden_BD, after = generation.generate_step(lm, codes_BQ, text, choose, active_B)
    probability_B = jnp.take_along_axis(jax.nn.softmax(logits_BV), tokens_B[:, None], axis=-1)[:, 0]
    pauses_BH = lm.extra_probabilities(hidden_BD[:, None])[:, 0, :, 0]
    said_B = (wanted_B > 0) & (tokens_B == wanted_B)
    prompted_B = select_rows(active_B, prompted_B + said_B.astype(jnp.int32), prompted_B)
    return after, prompted_B, (tokens_B, probability_B, pauses_BH)


def _next_prompt_token(prompt_BP: jax.Array, prompted_B: jax.Array) -> jax.Array:
    """The prompt token each row has yet to say, 0 when there is none left."""
    padded_BP = jnp.pad(prompt_BP, ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded_BP, jnp.minimum(prompted_B, prompt_BP.shape[1])[:, None], axis=1)[:, 0]
