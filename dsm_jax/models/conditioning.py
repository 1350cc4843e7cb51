"""Conditioning on values that are fixed for a whole stream: a voice, a guidance value, a description.

Each conditioner projects its value to vectors of the model's width. Vectors fused by "sum" are added to every step's
input; vectors fused by "cross" are concatenated for the cross-attention. Always float32, as in the reference.

Shape letters: docs/axes.md.
Source: kyutai-labs/moshi@e6a55d2 moshi/conditioners.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import Fuser, LMConfig, LutConditioner
from dsm_jax.nn.attention import sinusoids
from dsm_jax.nn.linear import Embedding, Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """The conditioning that the backbone takes at every step.

    Attributes:
      sum_BD: vector that is added to the input of every step.
      cross: keys and values [B, heads, X, head width] of every layer's cross-attention.
      length_B: int32, number of the X positions that each row has; None for all.
    """

    sum_BD: jax.Array | None
    cross: tuple[tuple[jax.Array, jax.Array], ...] | None
    length_B: jax.Array | None = None


class Conditioner(nnx.Module):
    """A projection of values to the model's width; a learnt vector replaces masked values.

    With `entries` the values are indices into a table, whose last entry means "not given"; otherwise they are vectors.
    """

    def __init__(self, width: int, model_width: int, *, entries: int | None, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.table = Embedding(entries, width, init=init, rngs=rngs) if entries else None
        self.output_proj = Linear({"W": width}, {"D": model_width}, rngs=rngs)
        self.learnt_padding_D = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), (model_width,)))

    def __call__(self, value: jax.Array, mask_BX: jax.Array) -> jax.Array:
        """Map values, indices [B, X] or vectors [B, X, W], to [B, X, D]."""
        y_BXD = self.output_proj(value if self.table is None else self.table(value))
        return jnp.where(mask_BX[..., None], y_BXD, self.learnt_padding_D[...])


class Conditioning(nnx.Module):
    """The conditioners of a config, and the fusion of their results."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        fuser = config.fuser or Fuser()
        self.summed, self.crossed = fuser.sum, fuser.cross
        self.positions, self.position_scale = fuser.cross_attention_pos_emb, fuser.cross_attention_pos_emb_scale
        conditioners = {}
        for spec in config.conditioners:
            entries = spec.n_bins + 1 if isinstance(spec, LutConditioner) else None
            conditioners[spec.name] = Conditioner(spec.dim, config.dim, entries=entries, rngs=rngs)
        self.conditioners = nnx.Dict(conditioners)

    def __call__(
        self, values: dict[str, jax.Array], masks: dict[str, jax.Array]
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Fuse the conditions of every row.

        Args:
          values: for each conditioner, indices [B, X] or vectors [B, X, W].
          masks: for each conditioner, bool [B, X], True where a value is given.

        Returns:
          The vector to add to each step's input [B, D], and the source of cross-attention [B, X, D]; None for a kind of
          fusion that the model does not use.
        """
        made = {name: conditioner(values[name], masks[name]) for name, conditioner in self.conditioners.items()}
        sum_BD = functools.reduce(jnp.add, [made[name][:, 0] for name in self.summed]) if self.summed else None
        if not self.crossed:
            return sum_BD, None
        cross_BXD = jnp.concatenate([made[name] for name in self.crossed], axis=1)
        if self.positions:
            position_1X = jnp.arange(cross_BXD.shape[1])[None]
            cross_BXD = cross_BXD + self.position_scale * sinusoids(position_1X, cross_BXD.shape[2], 10_000.0)
        return sum_BD, cross_BXD
