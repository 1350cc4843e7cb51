"""Split residual vector quantisation: a semantic branch and an acoustic branch.

Both branches quantise the same latents, each through a projection of its own; the decoded branches are added. Within a
branch, every codebook quantises the residual of the codebooks before it.

Shape letters: docs/axes.md; here N = B * T.
Source: Moshi (Défossez et al. 2024), section 3.3; kyutai-labs/moshi@e6a55d2 moshi/quantization/{vq,core_vq}.py.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import QuantizerConfig
from dsm_jax.nn.linear import Linear
from dsm_jax.nn.precision import full_precision
from dsm_jax.nn.quant import take


class Codebook(nnx.Module):
    """A codebook: vectors are rounded to the entry at the least Euclidean distance, of equal ones to the first."""

    def __init__(self, entries: int, width: int, *, rngs: nnx.Rngs):
        self.embedding_LC = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (entries, width)))

    @full_precision
    def nearest(self, x_NC: jax.Array) -> jax.Array:
        """Find the nearest entry of each vector, int32 [N]."""
        embedding_LC = self.embedding_LC[...]
        # |x - e|^2 without |x|^2, which is the same for every entry. The entries are no layer's weight: no `Linear`.
        score_LN = jnp.sum(embedding_LC**2, axis=1)[:, None] - 2.0 * (embedding_LC @ x_NC.T)
        # Two plain reductions find the first entry at the minimum: XLA's argmin takes twice as long on CPU.
        entries_L1 = jnp.arange(embedding_LC.shape[0], dtype=jnp.int32)[:, None]
        last = embedding_LC.shape[0] - 1
        return jnp.min(jnp.where(score_LN == score_LN.min(axis=0), entries_L1, last), axis=0)

    def look_up(self, index: jax.Array) -> jax.Array:
        """Read entries [..., C] by their index [...]."""
        return take(self.embedding_LC.get_value(), index)


class ResidualQuantizer(nnx.Module):
    """One branch: an input projection, a chain of codebooks, an output projection."""

    def __init__(self, codebooks: int, config: QuantizerConfig, *, rngs: nnx.Rngs):
        self.input_proj = Linear({"D": config.input_dimension}, {"C": config.dimension}, rngs=rngs)
        self.output_proj = Linear({"C": config.dimension}, {"D": config.output_dimension}, rngs=rngs)
        self.codebooks = nnx.List([Codebook(config.bins, config.dimension, rngs=rngs) for _ in range(codebooks)])

    @full_precision
    def encode(self, x_BTD: jax.Array, codebooks: int) -> jax.Array:
        """Compute the codes of the first `codebooks` stages, int32 [B, codebooks, T]."""
        x_BTC = self.input_proj(x_BTD)
        x_NC = x_BTC.reshape(-1, x_BTC.shape[2])
        codes = []
        for codebook in self.codebooks[:codebooks]:
            codes.append(codebook.nearest(x_NC))
            x_NC = x_NC - codebook.look_up(codes[-1])
        return jnp.stack(codes).reshape(codebooks, *x_BTD.shape[:2]).swapaxes(0, 1)

    @full_precision
    def decode(self, codes_BQT: jax.Array) -> jax.Array:
        """Return the quantised latents [B, T, D]; an absent code (-1) adds nothing."""
        stages = []
        for q, book in enumerate(self.codebooks[: codes_BQT.shape[1]]):
            codes_BT = codes_BQT[:, q]
            entries_BTC = book.look_up(jnp.maximum(codes_BT, 0))
            stages.append(jnp.where((codes_BT < 0)[..., None], 0.0, entries_BTC))
        return self.output_proj(functools.reduce(jnp.add, stages))


class SplitQuantizer(nnx.Module):
    """The semantic and the acoustic branch."""

    def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.semantic = ResidualQuantizer(config.n_q_semantic, config, rngs=rngs)
        self.acoustic = ResidualQuantizer(config.n_q - config.n_q_semantic, config, rngs=rngs)

    def encode(self, x_BTD: jax.Array, codebooks: int) -> jax.Array:
        """Compute the codes [B, codebooks, T], semantic first."""
        semantic = self.config.n_q_semantic
        codes_BQT = self.semantic.encode(x_BTD, min(codebooks, semantic))
        if codebooks <= semantic:
            return codes_BQT
        return jnp.concatenate([codes_BQT, self.acoustic.encode(x_BTD, codebooks - semantic)], axis=1)

    def decode(self, codes_BQT: jax.Array) -> jax.Array:
        """Return the quantised latents [B, T, D] from the codes of any number of codebooks, semantic first."""
        semantic = self.config.n_q_semantic
        y_BTD = self.semantic.decode(codes_BQT[:, :semantic])
        if codes_BQT.shape[1] <= semantic:
            return y_BTD
        return y_BTD + self.acoustic.decode(codes_BQT[:, semantic:])
