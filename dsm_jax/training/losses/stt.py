"""Compute the loss of speech-to-text: cross-entropy of the text stream, teacher-forced.

Shape letters: B batch rows, T frames, M streams (text first), Q audio streams.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3. The dropouts are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.training.losses.checks import check_shares, check_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class SttObjective:
    """Weights and dropouts of the loss.

    Attributes:
      padding_weight: weight of frames whose text is padding; other frames weigh 1.
      text_dropout: share of the input text tokens that padding replaces.
      codebook_dropout: share of the codebooks, drawn for each row, that are absent in the input; never the first.
      random_codes: share of the input codes that random codes replace.
    """

    padding_weight: float = 0.3
    text_dropout: float = 0.0
    codebook_dropout: float = 0.0
    random_codes: float = 0.0

    def __post_init__(self) -> None:
        check_weights(self, "padding_weight")
        check_shares(self, "text_dropout", "codebook_dropout", "random_codes")

    def without_dropout(self) -> "SttObjective":
        """Return the objective for validation."""
        return SttObjective(padding_weight=self.padding_weight)


def augment_codes(
    codes_BMT: jax.Array, key: jax.Array, objective: SttObjective, *, card: int, padding: int
) -> jax.Array:
    """Apply the dropouts of an objective to the inputs of a model in training."""
    text_key, book_key, code_key, value_key = jax.random.split(key, 4)
    text_B1T, audio_BQT = codes_BMT[:, :1], codes_BMT[:, 1:]
    drop_B1T = jax.random.bernoulli(text_key, objective.text_dropout, text_B1T.shape)
    text_B1T = jnp.where(drop_B1T & (text_B1T != ZERO_TOKEN), padding, text_B1T)
    rows, books, _ = audio_BQT.shape
    off_BQ1 = jax.random.bernoulli(book_key, objective.codebook_dropout, (rows, books, 1)).at[:, 0].set(False)
    replace_BQT = jax.random.bernoulli(code_key, objective.random_codes, audio_BQT.shape)
    random_BQT = jax.random.randint(value_key, audio_BQT.shape, 0, card)
    audio_BQT = jnp.where(replace_BQT & (audio_BQT != ZERO_TOKEN), random_BQT, audio_BQT)
    return jnp.concatenate([text_B1T, jnp.where(off_BQ1, ZERO_TOKEN, audio_BQT)], axis=1)


def stt_loss(
    lm: DelayedStreamsLM, codes_BMT: jax.Array, key: jax.Array, objective: SttObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the mean cross-entropy of the text stream, with a separate weight for padding, and accuracies.

    Args:
      lm: a speech-to-text model.
      codes_BMT: int32, undelayed: text from `alignment.text_stream`, then audio codes; text of -1 does not count.
      key: PRNG key of this step.
      objective: weights and dropouts.

    Returns:
      The loss, 0 if no text counts, and metrics: the shares of correct predictions among word tokens (`words_right`)
      and among padding (`padding_right`).
    """
    config = lm.config
    padding = config.existing_text_padding_id
    inputs_BMT = augment_codes(codes_BMT, key, objective, card=config.card, padding=padding)
    out = lm(codes_BMT, inputs_BMT=inputs_BMT)
    target_BT, known_BT = codes_BMT[:, 0], out.text_mask_BT
    padding_BT, word_BT = known_BT & (target_BT == padding), known_BT & (target_BT != padding)
    weight_BT = objective.padding_weight * padding_BT.astype(jnp.float32) + word_BT.astype(jnp.float32)
    each_BT = optax.softmax_cross_entropy_with_integer_labels(out.text_logits_BTV, jnp.maximum(target_BT, 0))
    loss = jnp.sum(weight_BT * each_BT) / jnp.maximum(weight_BT.sum(), 1e-6)
    right_BT = out.text_logits_BTV.argmax(-1) == target_BT
    return loss, {
        "words_right": jnp.sum(right_BT & word_BT) / jnp.maximum(word_BT.sum(), 1),
        "padding_right": jnp.sum(right_BT & padding_BT) / jnp.maximum(padding_BT.sum(), 1),
    }


def stt_batch_loss(
    lm: DelayedStreamsLM, batch: Mapping[str, Any], key: jax.Array, objective: SttObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute `stt_loss` of a batch of `training.rows.SttRows.rows`, which holds `codes_BMT`."""
    return stt_loss(lm, batch["codes_BMT"], key, objective)
