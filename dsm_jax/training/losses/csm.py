"""Compute the loss of conversational speech: cross-entropy of the codes of frames, teacher-forced.

The backbone learns the first code of every frame, and the depth decoder the other codes of a random share of the
frames, as it costs more per frame than the backbone. Both always learn the frame of zeros that ends a recording: else
speech would not end.

Shape letters: B batch rows, M streams (text first), Q codebooks, T positions, D width of the backbone, V codes, N turns
of a row, R frames of a row that the depth decoder learns.
Source: transformers 5.24 models/csm/modeling_csm.py:CsmForConditionalGeneration.forward, and processing_csm.py for the
share of frames. The share of 1/16 is from Sesame's "Crossing the uncanny valley of conversational voice" (2025).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsm_jax.errors import ConfigError
from dsm_jax.models.csm import CsmLM
from dsm_jax.training.losses.checks import check_weights
from dsm_jax.training.losses.cross_entropy import mean_cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class CsmObjective:
    """Weights of the loss, and the frames that count.

    Attributes:
      backbone: weight of the backbone's loss.
      depth: weight of the depth decoder's loss.
      depth_share: share of a row's frames that the depth decoder learns, besides the frames that end a recording; drawn
        anew in every step.
      mask_context: whether the last turn of a row counts alone. In transformers all turns count, whatever its labels
        are.
    """

    backbone: float = 1.0
    depth: float = 1.0
    depth_share: float = 1 / 16
    mask_context: bool = False

    def __post_init__(self) -> None:
        check_weights(self, "backbone", "depth")
        if not 0 < self.depth_share <= 1:
            raise ConfigError(f"depth_share is {self.depth_share}; give a share of the frames, above 0 and at most 1")

    def without_dropout(self) -> "CsmObjective":
        """Return the objective for validation, which draws the same frames each time that the key is the same."""
        return self


def csm_loss(
    lm: CsmLM, batch: Mapping[str, Any], key: jax.Array, objective: CsmObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the mean cross-entropies of the first codes and of the others, and their weighted sum.

    Args:
      lm: the language model.
      batch: `tokens_BMT`, int32, conversations as positions, -1 after the last one; `starts_BN`, int32, the position at
        which each turn starts, -1 for turns that a row does not have. Optional: `depth_BT`, bool, the frames that the
        depth decoder learns, frames that end a recording among them, in place of random ones.
      key: PRNG key of this step.
      objective: weights, and the frames that count.

    Returns:
      The loss, and its parts as metrics: `backbone`, the mean over the frames that count, and `depth`, the mean over
      the chosen frames and their codes after the first.
    """
    tokens_BMT, starts_BN = batch["tokens_BMT"], batch["starts_BN"]
    # Every array of positions is that of the predicted ones from here on: index t is of position t + 1.
    codes_BTQ = tokens_BMT[:, 1:, 1:].swapaxes(1, 2)
    frames_BT = codes_BTQ[..., 0] >= 0
    ends_BT = frames_BT & ~jnp.pad(frames_BT[:, 1:], ((0, 0), (0, 1)))
    counted_BT = frames_BT
    if objective.mask_context:
        counted_BT &= jnp.arange(1, tokens_BMT.shape[2]) >= starts_BN.max(1)[:, None]
    hidden_BTD = lm.hidden(tokens_BMT)[:, :-1]
    backbone = mean_cross_entropy(lm.first_logits(hidden_BTD), codes_BTQ[..., 0], counted_BT)

    if "depth_BT" in batch:
        chosen_BR, index_BR = draw_frames(counted_BT & batch["depth_BT"][:, 1:], ends_BT, key, share=1.0, turns=0)
    else:
        chosen_BR, index_BR = draw_frames(
            counted_BT, ends_BT, key, share=objective.depth_share, turns=starts_BN.shape[1]
        )
    codes_BRQ = jnp.take_along_axis(codes_BTQ, index_BR[..., None], axis=1)
    hidden_BRD = jnp.take_along_axis(hidden_BTD, index_BR[..., None], axis=1)
    codes_NQ, hidden_ND = (a.reshape(-1, a.shape[-1]) for a in (codes_BRQ, hidden_BRD))
    targets_NQ = codes_NQ[:, 1:]
    mask_NQ = jnp.broadcast_to(chosen_BR.reshape(-1, 1), targets_NQ.shape)
    depth = mean_cross_entropy(lm.depth_logits(hidden_ND, codes_NQ), targets_NQ, mask_NQ)
    return objective.backbone * backbone + objective.depth * depth, {"backbone": backbone, "depth": depth}


def draw_frames(
    counted_BT: jax.Array, ends_BT: jax.Array, key: jax.Array, *, share: float, turns: int
) -> tuple[jax.Array, jax.Array]:
    """Choose the frames that the depth decoder learns: in each row all ends, and a share of the others, rounded up.

    Args:
      counted_BT: bool, the frames to choose from.
      ends_BT: bool, the frames that end a recording.
      key: PRNG key of the draw.
      share: share of the frames that end no recording.
      turns: most ends of a row.

    Returns:
      bool [B, R], whether there is a chosen frame, and int32 [B, R], its position. R depends on the shapes alone.
    """
    length = counted_BT.shape[1]
    others_BT = counted_BT & ~ends_BT
    drawn_BT = jnp.where(others_BT, jax.random.uniform(key, counted_BT.shape), -1.0)
    score_BT = jnp.where(counted_BT & ends_BT, 2.0, drawn_BT)
    score_BR, index_BR = jax.lax.top_k(score_BT, min(length, math.ceil(share * length) + turns))
    ends_B1 = (counted_BT & ends_BT).sum(1, keepdims=True)
    others_B1 = jnp.ceil(share * others_BT.sum(1, keepdims=True).astype(jnp.float32)).astype(jnp.int32)
    return (score_BR >= 0) & (jnp.arange(score_BR.shape[1]) < ends_B1 + others_B1), index_BR
