"""Learning to transcribe: the loss of the text stream, teacher-forced.

Shape letters: B batch rows, T frames, K streams (text first), Q audio streams.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3. The dropouts are ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.streams import ZERO_TOKEN


@dataclasses.dataclass(frozen=True, kw_only=True)
class SttObjective:
    """What a language model is trained for, and what is hidden from it meanwhile."""

    padding_weight: float = 0.3  # of frames in which nothing is said; others weigh 1
    text_dropout: float = 0.0  # share of text tokens that the model is fed as padding
    codebook_dropout: float = 0.0  # share of codebooks, row by row, that it does not hear; never the first
    random_codes: float = 0.0  # share of codes that are any other


def disturb(codes_BKT: jax.Array, key: jax.Array, objective: SttObjective, *, card: int, padding: int) -> jax.Array:
    """What the model is fed in training: the codes, less what is hidden from it."""
    text_key, book_key, code_key, value_key = jax.random.split(key, 4)
    text_B1T, audio_BQT = codes_BKT[:, :1], codes_BKT[:, 1:]
    hide_B1T = jax.random.bernoulli(text_key, objective.text_dropout, text_B1T.shape)
    text_B1T = jnp.where(hide_B1T & (text_B1T != ZERO_TOKEN), padding, text_B1T)
    rows, books, _ = audio_BQT.shape
    off_BQ1 = jax.random.bernoulli(book_key, objective.codebook_dropout, (rows, books, 1)).at[:, 0].set(False)
    other_BQT = jax.random.bernoulli(code_key, objective.random_codes, audio_BQT.shape)
    any_BQT = jax.random.randint(value_key, audio_BQT.shape, 0, card)
    audio_BQT = jnp.where(other_BQT & (audio_BQT != ZERO_TOKEN), any_BQT, audio_BQT)
    return jnp.concatenate([text_B1T, jnp.where(off_BQ1, ZERO_TOKEN, audio_BQT)], axis=1)


def stt_loss(
    lm: DelayedStreamsLM, codes_BKT: jax.Array, key: jax.Array, objective: SttObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the text stream, padding weighted down, and what else is worth knowing.

    Args:
      lm: the model.
      codes_BKT: int32, undelayed: text from `text_stream`, then audio codes; text of -1 is left out of the loss.
      key: of this step.
      objective: what counts how much.

    Returns:
      The loss, 0 where no text counts, and the shares of tokens said, and of frames of silence, that come out right.
    """
    config = lm.config
    padding = config.existing_text_padding_id
    fed_BKT = disturb(codes_BKT, key, objective, card=config.card, padding=padding)
    out = lm(codes_BKT, fed_BKT=fed_BKT)
    target_BT, known_BT = codes_BKT[:, 0], out.text_mask_BT
    silent_BT, said_BT = known_BT & (target_BT == padding), known_BT & (target_BT != padding)
    weight_BT = objective.padding_weight * silent_BT.astype(jnp.float32) + said_BT.astype(jnp.float32)
    each_BT = optax.softmax_cross_entropy_with_integer_labels(out.text_logits_BTV, jnp.maximum(target_BT, 0))
    loss = jnp.sum(weight_BT * each_BT) / jnp.maximum(weight_BT.sum(), 1e-6)
    right_BT = out.text_logits_BTV.argmax(-1) == target_BT
    return loss, {
        "said_right": jnp.sum(right_BT & said_BT) / jnp.maximum(said_BT.sum(), 1),
        "silent_right": jnp.sum(right_BT & silent_BT) / jnp.maximum(silent_BT.sum(), 1),
    }
