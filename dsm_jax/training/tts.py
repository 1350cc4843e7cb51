"""Learning to speak: the losses of the text stream and of the audio streams, teacher-forced.

The text stream of a model that speaks says only when a word begins; which word that is, the script knows. So in
training it is asked in the steps in which it is asked when it speaks: not while a word is fed, and not after the last.

Shape letters: B batch rows, T frames, K streams (text first), Q audio streams.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3; a first codebook that weighs more is from Moshi
(Défossez et al. 2024), where it weighs more still; what is hidden and disturbed is ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.training.stt import SttObjective, disturb
from dsm_jax.tts.script import NEW_WORD, PAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class TtsObjective:
    """What a language model is trained for, and what is hidden from it meanwhile."""

    text: float = 1.0  # weight of the text stream's loss; the audio streams' is 1
    semantic: float = 7.0  # weight of the first codebook, which says what is said, among the others, which weigh 1
    untold: float = 0.15  # share of rows that are told neither text nor voice: what guidance is measured against
    random_codes: float = 0.05  # share of codes fed to the backbone that are any other, as when it errs itself


def asked(text_BT: jax.Array) -> jax.Array:
    """The steps in which the model decides whether a word begins: bool [B, T]."""
    last_BT = jax.lax.cummax(jnp.where(text_BT == NEW_WORD, 1, 0), axis=1, reverse=True) > 0
    return ((text_BT == NEW_WORD) | (text_BT == PAD)) & last_BT


def tts_loss(
    lm: DelayedStreamsLM,
    codes_BKT: jax.Array,
    conditions: Conditions | None,
    untold_B: jax.Array,
    key: jax.Array,
    objective: TtsObjective,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the text stream where it is asked and of the audio streams, and each of them alone.

    Args:
      lm: a model with a depformer.
      codes_BKT: int32: text from `text_stream`; audio codes behind it by the model's `audio_delay`, before which they
        are -1, but not by the delays of the codebooks.
      conditions: from `lm.condition`, masked in the rows that are untold; None for a model without conditioners.
      untold_B: bool, rows whose text is not fed to the backbone.
      key: of this step.
      objective: what counts how much.
    """
    others = SttObjective(random_codes=objective.random_codes)
    fed_BKT = disturb(codes_BKT, key, others, card=lm.config.card, padding=PAD)
    fed_BKT = fed_BKT.at[:, 0].set(jnp.where(untold_B[:, None], ZERO_TOKEN, fed_BKT[:, 0]))
    out = lm(codes_BKT, conditions, fed_BKT=fed_BKT)
    assert out.audio_logits_BQTV is not None
    assert out.audio_mask_BQT is not None
    text_BT, audio_BQT = codes_BKT[:, 0], codes_BKT[:, 1 : 1 + lm.config.dep_q]
    text = _mean(out.text_logits_BTV, text_BT, out.text_mask_BT & asked(text_BT))
    parts = [
        _mean(out.audio_logits_BQTV[:, part], audio_BQT[:, part], out.audio_mask_BQT[:, part])
        for part in (slice(1), slice(1, None))
    ]
    weights = objective.semantic, audio_BQT.shape[1] - 1.0
    audio = sum(weight * part for weight, part in zip(weights, parts, strict=True)) / sum(weights)
    return objective.text * text + audio, {"text": text, "semantic": parts[0], "acoustic": parts[1]}


def _mean(logits: jax.Array, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """Mean cross-entropy where it counts; 0 where nothing does."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tokens, 0))
    return jnp.sum(jnp.where(counts, each, 0.0)) / jnp.maximum(counts.sum(), 1).astype(jnp.float32)
