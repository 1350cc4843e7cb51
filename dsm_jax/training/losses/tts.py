"""Compute the loss of text-to-speech: cross-entropy of the text and audio streams, teacher-forced.

The text stream of a text-to-speech model predicts only when the next word starts; the script decides which word. The
text loss therefore covers only steps in which inference samples that decision: not while a word's tokens are the input,
and not after the last word. For a model with a second text stream, an integer holds two tokens; the second one is
`NEW_WORD` where a word starts, and where the script ends.

Shape letters: B batch rows, T frames, M streams (text first), Q audio streams.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3. The larger weight of the first codebook is from
Moshi (Défossez et al. 2024), where it is larger still. The dropouts are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.training.losses.checks import check_shares, check_weights
from dsm_jax.training.losses.cross_entropy import mean_cross_entropy
from dsm_jax.training.losses.stt import SttObjective, augment_codes
from dsm_jax.tts.script import NEW_WORD, PAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class TtsObjective:
    """Weights and dropouts of the loss.

    Attributes:
      text: weight of the text stream's loss; the audio streams' loss weighs 1.
      semantic: weight of the first codebook, which holds most of the content; other codebooks weigh 1.
      unconditional: share of rows without text and voice, as classifier-free guidance requires.
      random_codes: share of the backbone's input codes that random codes replace, to imitate errors at inference.
    """

    text: float = 1.0
    semantic: float = 7.0
    unconditional: float = 0.15
    random_codes: float = 0.05

    def __post_init__(self) -> None:
        check_weights(self, "text", "semantic")
        check_shares(self, "unconditional", "random_codes")

    def without_dropout(self) -> "TtsObjective":
        """Return the objective for validation."""
        return dataclasses.replace(self, unconditional=0.0, random_codes=0.0)


def decisions(text_BT: jax.Array, card: int, *, second_stream: bool) -> jax.Array:
    """Return the targets of the text stream, int32 [B, T]: `NEW_WORD`, `PAD`, or a token of a word.

    Args:
      text_BT: int32, input tokens, two per integer with a second stream; -1 for none.
      card: number of text tokens with the initial token, `text_card + 1`.
      second_stream: whether the model has a second text stream.
    """
    if not second_stream:
        return text_BT
    starts_BT = text_BT // card == NEW_WORD + 1
    return jnp.where(text_BT < 0, ZERO_TOKEN, jnp.where(starts_BT, NEW_WORD, text_BT % card))


def sampled_steps(decision_BT: jax.Array) -> jax.Array:
    """Mark the steps in which the model decides whether a word starts: bool [B, T]."""
    last_BT = jax.lax.cummax(jnp.where(decision_BT == NEW_WORD, 1, 0), axis=1, reverse=True) > 0
    return ((decision_BT == NEW_WORD) | (decision_BT == PAD)) & last_BT


def tts_loss(
    lm: DelayedStreamsLM,
    codes_BMT: jax.Array,
    conditions: Conditions | None,
    unconditional_B: jax.Array,
    key: jax.Array,
    objective: TtsObjective,
    context_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the mean cross-entropies of the text stream and of the audio streams, and their weighted sum.

    Args:
      lm: a model with a depformer.
      codes_BMT: int32: text as in inference; audio codes shifted by the model's `audio_delay`, with -1 before them,
        without the delays of the codebooks.
      conditions: from `lm.condition`, masked in unconditional rows; None for a model without conditioners.
      unconditional_B: bool, rows without text in the backbone's input.
      key: PRNG key of this step.
      objective: weights and dropouts.
      context_B: int32, number of prefix frames at the start of the audio streams: they do not count in the loss, and
        are absent in the input of unconditional rows. None if no row has a prefix.

    Returns:
      The loss, and metrics: the parts `text`, `semantic` (the first codebook) and `acoustic` (the others).
    """
    config = lm.config
    dropouts = SttObjective(random_codes=objective.random_codes)
    inputs_BMT = augment_codes(codes_BMT, key, dropouts, card=config.card, padding=PAD)
    inputs_BMT = inputs_BMT.at[:, 0].set(jnp.where(unconditional_B[:, None], ZERO_TOKEN, inputs_BMT[:, 0]))
    counted_BT = None
    if context_B is not None:
        counted_BT = jnp.arange(codes_BMT.shape[2]) >= context_B[:, None]
        fed_B1T = (counted_BT | ~unconditional_B[:, None])[:, None]
        inputs_BMT = inputs_BMT.at[:, 1:].set(jnp.where(fed_B1T, inputs_BMT[:, 1:], ZERO_TOKEN))
    out = lm(codes_BMT, conditions, inputs_BMT=inputs_BMT)
    assert out.audio_logits_BQTV is not None
    assert out.audio_mask_BQT is not None
    decision_BT = decisions(codes_BMT[:, 0], config.text_card + 1, second_stream=config.demux_second_stream)
    text = mean_cross_entropy(out.text_logits_BTV, decision_BT, out.text_mask_BT & sampled_steps(decision_BT))
    audio_BQT, mask_BQT = codes_BMT[:, 1 : 1 + config.dep_q], out.audio_mask_BQT
    if counted_BT is not None:
        mask_BQT = mask_BQT & counted_BT[:, None]
    parts = [
        mean_cross_entropy(out.audio_logits_BQTV[:, part], audio_BQT[:, part], mask_BQT[:, part])
        for part in (slice(1), slice(1, None))
    ]
    weights = objective.semantic, audio_BQT.shape[1] - 1.0
    audio = sum(weight * part for weight, part in zip(weights, parts, strict=True)) / sum(weights)
    return objective.text * text + audio, {"text": text, "semantic": parts[0], "acoustic": parts[1]}


def tts_batch_loss(
    lm: DelayedStreamsLM, batch: Mapping[str, Any], key: jax.Array, objective: TtsObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of a batch, in which a random share of the rows is unconditional.

    Args:
      lm: a model with a depformer.
      batch: `codes_BMT` as for `tts_loss`; for a model with conditioners `values` and `masks` as for `lm.condition`;
        for rows with a prefix `context_B`.
      key: PRNG key of this step.
      objective: weights and dropouts.
    """
    codes_BMT = batch["codes_BMT"]
    drop_key, key = jax.random.split(key)
    unconditional_B = jax.random.bernoulli(drop_key, objective.unconditional, codes_BMT.shape[:1])
    conditions = None
    if lm.conditioning is not None:
        masks = {name: mask_BX & ~unconditional_B[:, None] for name, mask_BX in batch["masks"].items()}
        conditions = lm.condition(dict(batch["values"]), masks)
    return tts_loss(lm, codes_BMT, conditions, unconditional_B, key, objective, batch.get("context_B"))
