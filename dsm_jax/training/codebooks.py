"""Train codebooks by moving averages: each entry is the mean of the vectors that were recently rounded to it.

Shape letters: B batch rows, T frames, N = B * T, D latent width, C codebook width, L codebook entries, Q codebooks of
a branch.
Source: van den Oord et al. 2017, appendix A.1 (moving averages); Zeghidour et al. 2021 (residual codebooks, their
dropout, replacement of dead entries); Moshi (Défossez et al. 2024), section 3.3 (the two branches). The decay, the
threshold and the random replacement are ours.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.nn.precision import full_precision
from dsm_jax.nn.rvq import ResidualQuantizer, SplitQuantizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Averages:
    """Moving averages of every codebook of one branch; an entry is sum / usage."""

    usage_QL: jax.Array
    sum_QLC: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookRule:
    """Settings of the moving averages."""

    decay: float = 0.98
    dead: float = 0.02  # an entry with a lower average number of uses per step is reset to a random vector

    def __post_init__(self) -> None:
        if not (0 <= self.decay < 1 and 0 <= self.dead < math.inf):
            raise ConfigError(
                f"decay of the codebooks is {self.decay} and dead {self.dead}; give a decay from 0 to below 1, and a "
                "number of uses of 0 or more"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Result of quantising latents by one branch in training."""

    vectors_BTC: jax.Array  # quantised, with straight-through gradients
    commitment: jax.Array  # mean squared distance to the entries, over the codebooks in use
    perplexity_Q: jax.Array  # effective number of entries in use
    averages: Averages
    entries_QLC: jax.Array  # for the next step


def init_averages(branch: ResidualQuantizer, *, fresh: bool) -> Averages:
    """Start averages at the branch's entries or, if `fresh`, at vectors of the first batch."""
    entries_QLC = jnp.stack([book.embedding_LC[...] for book in branch.codebooks])
    usage = 0.0 if fresh else 1.0
    return Averages(jnp.full(entries_QLC.shape[:2], usage), usage * entries_QLC)


@full_precision
def quantize(
    branch: ResidualQuantizer,
    x_BTD: jax.Array,
    averages: Averages,
    rule: CodebookRule,
    used_B: jax.Array,
    key: jax.Array,
) -> Quantized:
    """Quantise latents as `ResidualQuantizer.encode` does, with straight-through gradients, and update the averages.

    Args:
      branch: the branch, whose projection and entries are used.
      x_BTD: latents.
      averages: the branch's averages before this step.
      rule: settings of the averages.
      used_B: number of codebooks that quantise each row, from 0: codebook dropout.
      key: PRNG key for the vectors that replace dead entries.

    Returns:
      The quantised vectors, the losses and the averages after this step.
    """
    x_BTC = branch.input_proj(x_BTD)
    x_NC = x_BTC.reshape(-1, x_BTC.shape[2])
    used_N = jnp.repeat(used_B, x_BTD.shape[1])
    residual_NC, total_NC = x_NC, jnp.zeros_like(x_NC)
    distance, weight = jnp.zeros(()), jnp.zeros(())
    usage, sums, entries, perplexity = [], [], [], []
    for q, (book, book_key) in enumerate(
        zip(branch.codebooks, jax.random.split(key, len(branch.codebooks)), strict=True)
    ):
        seen_NC = jax.lax.stop_gradient(residual_NC)
        index_N = book.nearest(seen_NC)
        entry_NC = book.look_up(index_N)
        in_use_N1 = (q < used_N)[:, None].astype(x_NC.dtype)
        distance += jnp.sum(in_use_N1 * (residual_NC - entry_NC) ** 2) / x_NC.shape[1]
        weight += in_use_N1.sum()
        one_hot_NL = jax.nn.one_hot(index_N, book.embedding_LC.shape[0]) * in_use_N1
        moved = _move(averages.usage_QL[q], averages.sum_QLC[q], one_hot_NL, seen_NC, rule, book_key)
        usage.append(moved[0])
        sums.append(moved[1])
        entries.append(moved[2])
        share_L = one_hot_NL.sum(0) / jnp.maximum(one_hot_NL.sum(), 1)
        perplexity.append(jnp.exp(-jnp.sum(share_L * jnp.log(share_L + 1e-10))))
        total_NC += in_use_N1 * entry_NC
        residual_NC = residual_NC - entry_NC
    vectors_NC = x_NC + jax.lax.stop_gradient(total_NC - x_NC)
    return Quantized(
        vectors_NC.reshape(*x_BTD.shape[:2], -1),
        distance / jnp.maximum(weight, 1),
        jnp.stack(perplexity),
        Averages(jnp.stack(usage), jnp.stack(sums)),
        jnp.stack(entries),
    )


def _move(
    usage_L: jax.Array, sum_LC: jax.Array, one_hot_NL: jax.Array, x_NC: jax.Array, rule: CodebookRule, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Update the averages of one codebook; return usage, sum and entries after the update."""
    usage_L = rule.decay * usage_L + (1 - rule.decay) * one_hot_NL.sum(0)
    sum_LC = rule.decay * sum_LC + (1 - rule.decay) * (one_hot_NL.T @ x_NC)
    dead_L = usage_L < rule.dead
    fresh_LC = x_NC[jax.random.randint(key, usage_L.shape, 0, x_NC.shape[0])]
    # A reset entry starts well above the threshold, so that it has time to attract vectors.
    usage_L = jnp.where(dead_L, 10 * rule.dead, usage_L)
    sum_LC = jnp.where(dead_L[:, None], fresh_LC * 10 * rule.dead, sum_LC)
    return usage_L, sum_LC, sum_LC / usage_L[:, None]


def set_entries(quantizer: SplitQuantizer, semantic_QLC: jax.Array, acoustic_QLC: jax.Array) -> None:
    """Write the entries of both branches."""
    for branch, entries_QLC in ((quantizer.semantic, semantic_QLC), (quantizer.acoustic, acoustic_QLC)):
        for book, entries_LC in zip(branch.codebooks, entries_QLC, strict=True):
            book.embedding_LC = nnx.Param(entries_LC)
