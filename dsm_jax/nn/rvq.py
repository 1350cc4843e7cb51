"""Residual vector quantisation, split in two: a semantic branch and an acoustic branch beside it.

Both branches quantise the same latents, each through a projection of its own; the decoded branches are added. Within a
branch every codebook quantises what the ones before it left over.

Shape letters: B batch rows, T frames, N = B * T, D latent width, C codebook width, V codebook entries, Q codebooks.
Source: Moshi (Défossez et al. 2024), section 3.3; kyutai-labs/moshi@e6a55d2 moshi/quantization/{vq,core_vq}.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import QuantizerConfig
from dsm_jax.nn.precision import full_precision


class Codebook(nnx.Module):
    """Entries that vectors are rounded to, by Euclidean distance; ties go to the lowest index."""

    def __init__(self, entries: int, width: int, *, rngs: nnx.Rngs):
        self.embedding_VC = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (entries, width)))

    @full_precision
    def nearest(self, x_NC: jax.Array) -> jax.Array:
        """Index of the nearest entry, int32 [N]."""
        embedding_VC = self.embedding_VC[...]
        # |x - e|^2 without |x|^2, which is the same for every entry.
        score_VN = jnp.sum(embedding_VC**2, axis=1)[:, None] - 2.0 * (embedding_VC @ x_NC.T)
        # The first entry at the minimum, by two plain reductions: XLA's argmin takes twice as long on CPU.
        entries_V1 = jnp.arange(embedding_VC.shape[0], dtype=jnp.int32)[:, None]
        last = embedding_VC.shape[0] - 1
        return jnp.min(jnp.where(score_VN == score_VN.min(axis=0), entries_V1, last), axis=0)


class ResidualQuantizer(nnx.Module):
    """One branch: a projection in, a chain of codebooks, a projection out."""

    def __init__(self, codebooks: int, config: QuantizerConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.input_proj_DC = nnx.Param(init(rngs.params(), (config.input_dimension, config.dimension)))
        self.output_proj_CD = nnx.Param(init(rngs.params(), (config.dimension, config.output_dimension)))
        self.codebooks = nnx.List([Codebook(config.bins, config.dimension, rngs=rngs) for _ in range(codebooks)])

    @full_precision
    def encode(self, x_BTD: jax.Array, codebooks: int) -> jax.Array:
        """Codes of the first `codebooks` stages, int32 [B, codebooks, T]."""
        x_NC = (x_BTD @ self.input_proj_DC[...]).reshape(-1, self.input_proj_DC.shape[1])
        codes = []
        for codebook in self.codebooks[:codebooks]:
            codes.append(codebook.nearest(x_NC))
            x_NC = x_NC - codebook.embedding_VC[codes[-1]]
        return jnp.stack(codes).reshape(codebooks, *x_BTD.shape[:2]).swapaxes(0, 1)

    @full_precision
    def decode(self, codes_BQT: jax.Array) -> jax.Array:
        """Returns the latents [B, T, D] that the codes stand for; an absent code (-1) adds nothing."""
        stages = []
        for q, book in enumerate(self.codebooks[: codes_BQT.shape[1]]):
            codes_BT = codes_BQT[:, q]
            entries_BTC = book.embedding_VC[jnp.maximum(codes_BT, 0)]
            stages.append(jnp.where((codes_BT < 0)[..., None], 0.0, entries_BTC))
        return sum(stages) @ self.output_proj_CD[...]


class SplitQuantizer(nnx.Module):
    """The semantic and the acoustic branch. Works with any number of codebooks that includes the semantic ones."""

    def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.semantic = ResidualQuantizer(config.n_q_semantic, config, rngs=rngs)
        self.acoustic = ResidualQuantizer(config.n_q - config.n_q_semantic, config, rngs=rngs)

    def encode(self, x_BTD: jax.Array, codebooks: int) -> jax.Array:
        """Codes [B, codebooks, T], semantic first."""
        semantic = self.config.n_q_semantic
        codes_BQT = self.semantic.encode(x_BTD, min(codebooks, semantic))
        if codebooks <= semantic:
            return codes_BQT
        return jnp.concatenate([codes_BQT, self.acoustic.encode(x_BTD, codebooks - semantic)], axis=1)

    def decode(self, codes_BQT: jax.Array) -> jax.Array:
        """Quantised latents [B, T, D] from however many codebooks are given."""
        semantic = self.config.n_q_semantic
        y_BTD = self.semantic.decode(codes_BQT[:, :semantic])
        if codes_BQT.shape[1] <= semantic:
            return y_BTD
        return y_BTD + self.acoustic.decode(codes_BQT[:, semantic:])
