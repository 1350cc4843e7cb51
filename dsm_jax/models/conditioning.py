"""Conditioning: what a stream is told once, before it starts (a voice, a guidance value, a description).

Each conditioner turns its value into vectors of the model's width. Those fused by "sum" are added to every step's
input; those fused by "cross" are laid end to end for the cross-attention. Always float32, as the reference keeps it.

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
    """What the backbone needs at every step.

    Attributes:
      sum_BD: a vector that is added to the input of every step.
      cross: keys and values [B, heads, X, head width] of every layer's cross-attention.
      length_B: int32, how many of the X positions each row has; None for all.
    """

    sum_BD: jax.Array | None
    cross: tuple[tuple[jax.Array, jax.Array], ...] | None
    length_B: jax.Array | None = None


class Conditioner(nnx.Module):
    """Projects values to the model's width; where a value is masked, a learnt vector stands in.

    With `entries` the values are indices into a table (the last entry stands for "not given"), else vectors.
    """

    def __init__(self, width: int, model_width: int, *, entries: int | None, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.table = Embedding(entries, width, init=init, rngs=rngs) if entries else None
        self.output_proj = Linear({"W": width}, {"D": model_width}, rngs=rngs)
        self.learnt_padding_D = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), (model_width,)))

    def __call__(self, value: jax.Array, mask_BX: jax.Array) -> jax.Array:
        """Maps values, indices [B, X] or vectors [B, X, W], to [B, X, D]."""
        y_BXD = self.output_proj(value if self.table is None else self.table(value))
        return jnp.where(mask_BX[..., None], y_BXD, self.learnt_padding_D[...])


class Conditioning(nnx.Module):
    """The conditioners of a config, and how their results are fused."""

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
        """Fuses the conditions of every row.

        Args:
          values: for each conditioner, indices [B, X] or vectors [B, X, W].
          masks: for each, bool [B, X]: whether the value is given.

        Returns:
          What to add to each step's input [B, D], and what to attend to [B, X, D]; None where nothing is fused so.
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
