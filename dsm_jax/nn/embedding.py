"""Token embeddings of the published models: plain, low-rank, or for two tokens folded into one integer.

Shape letters: docs/axes.md.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/lm_utils.py:ScaledEmbedding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.nn.linear import Embedding, Linear


class TokenEmbedding(Embedding):
    """An embedding table whose rows are projected where the model does so; -1 gives exactly zero.

    With `demux` an integer holds two tokens, `(second + 1) * entries + first`, where a second token of -1 is absent.
    Each token has a projection of its own, and the results are added. The published files of such models also hold a
    low-rank matrix that nothing reads; it is kept so that a file written back is complete.

    Args:
      entries: number of rows of the table.
      width: width of the resulting vectors.
      rank: width of the table's rows, if less than `width`.
      demux: whether an integer holds two tokens.
      dtype: dtype of the resulting vectors.
      rngs: random streams for the initial weights.
    """

    def __init__(
        self,
        entries: int,
        width: int,
        *,
        rank: int | None = None,
        demux: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = rank or width
        init = nnx.initializers.normal(width**-0.5)
        super().__init__(entries, stored, dtype=dtype, init=init, rngs=rngs)

        def project(wanted: bool) -> Linear | None:
            return Linear({"W": stored}, {"D": width}, init=init, rngs=rngs) if wanted else None

        self.low_rank, self.first, self.second = project(bool(rank)), project(demux), project(demux)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens of any shape [...] to vectors [..., D]."""
        look_up = super().__call__
        if self.first is None or self.second is None:
            rows = look_up(tokens)
            return rows if self.low_rank is None else self.low_rank(rows)
        absent, present = tokens < 0, jnp.maximum(tokens, 0)
        second = present // self.entries - 1
        first_rows = self.first(look_up(present % self.entries))
        second_rows = self.second(look_up(second))
        zero = jnp.zeros((), first_rows.dtype)
        rows = first_rows + jnp.where((second < 0)[..., None], zero, second_rows)
        return jnp.where(absent[..., None], zero, rows)
