"""Token embeddings: plain, low-rank, or of two tokens folded into one integer.

Shape letters: L entries, W stored width (the rank where there is one), D width out.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/lm_utils.py:ScaledEmbedding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def look_up(table: jax.Array, index: Any) -> jax.Array:
    """Rows of a table of embeddings.

    A table of uint16 holds the bits of bfloat16 numbers, and its rows come as float32: to read one row of a bfloat16
    table into a float32 program, XLA on CPU would widen the whole table first.
    """
    rows = table[index]
    if rows.dtype != jnp.uint16:
        return rows
    return jax.lax.bitcast_convert_type(rows.astype(jnp.uint32) << 16, jnp.float32)


class Embedding(nnx.Module):
    """Looks tokens up; -1 gives exactly zero.

    With `demux` a token carries two, `(second + 1) * entries + first`, where a second of -1 is none; each goes through
    a matrix of its own and the results are added. The published files then hold a low-rank matrix too, which nothing
    reads: it is kept so that a file written back is complete.
    """

    def __init__(self, entries: int, width: int, *, rank: int | None = None, demux: bool = False, rngs: nnx.Rngs):
        stored = rank or width
        init = nnx.initializers.normal(width**-0.5)
        self.entries = entries
        self.table_LW = nnx.Param(init(rngs.params(), (entries, stored)))
        self.low_rank_WD = nnx.Param(init(rngs.params(), (stored, width))) if rank else None
        self.first_WD = nnx.Param(init(rngs.params(), (stored, width))) if demux else None
        self.second_WD = nnx.Param(init(rngs.params(), (stored, width))) if demux else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens of any shape [...] to vectors [..., D]."""
        absent = (tokens < 0)[..., None]
        tokens = jnp.maximum(tokens, 0)
        if self.first_WD is None or self.second_WD is None:
            rows = look_up(self.table_LW[...], tokens)
            rows = jnp.where(absent, jnp.zeros((), rows.dtype), rows)
            return rows if self.low_rank_WD is None else rows @ self.low_rank_WD[...]
        second = tokens // self.entries - 1
        first_rows = look_up(self.table_LW[...], tokens % self.entries) @ self.first_WD[...]
        second_rows = look_up(self.table_LW[...], jnp.maximum(second, 0)) @ self.second_WD[...]
        zero = jnp.zeros((), first_rows.dtype)
        rows = first_rows + jnp.where((second < 0)[..., None], zero, second_rows)
        return jnp.where(absent, zero, rows)
