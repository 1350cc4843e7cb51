"""The depformer: a small transformer that generates the codebooks of a frame one after another.

Step k takes the backbone's hidden state and the token of step k - 1 (the text token at step 0), and scores codebook k.
Each step has weights of its own, or shares a set by the config's schedule. The depformer never attends beyond its
frame, so teacher-forced training treats every frame as a row.

Shape letters: docs/axes.md; here N = B * T, Q is the generated codebooks (the depformer's steps), D the depformer's
width and E the backbone's.
Source: Moshi (Défossez et al. 2024), section 3.4; kyutai-labs/moshi@e6a55d2 moshi/models/lm.py
forward_depformer_training and depformer_step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import LMConfig, gating_dim
from dsm_jax.errors import ConfigError
from dsm_jax.nn.attention import self_attention
from dsm_jax.nn.embedding import TokenEmbedding
from dsm_jax.nn.linear import Linear
from dsm_jax.nn.norms import make_norm
from dsm_jax.nn.precision import full_precision
from dsm_jax.nn.transformer import GatedFeedForward

KeysValues = tuple[jax.Array, jax.Array]
WALK_GROUP = 4  # codebooks per conditional of `walk`; on a GPU, every conditional waits for the device


class DepformerLayer(nnx.Module):
    """Pre-norm attention and gated feed-forward; all steps share the norms, each set of steps has its weights."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        width, sets = config.depformer.dim, max(config.depformer_schedule) + 1
        inner = gating_dim(width, config.depformer_feedforward)
        heads = {"K": config.depformer.num_heads, "H": width // config.depformer.num_heads}
        self.schedule = config.depformer_schedule
        self.norm1 = make_norm(config.norm, width)
        self.in_projs = nnx.List([Linear({"D": width}, {"P": 3, **heads}, rngs=rngs) for _ in range(sets)])
        self.out_projs = nnx.List([Linear(heads, {"D": width}, rngs=rngs) for _ in range(sets)])
        self.norm2 = make_norm(config.norm, width)
        self.gating = nnx.List([GatedFeedForward(width, inner, rngs=rngs) for _ in range(sets)])

    def _per_step(self, modules: nnx.List, x_NQ: jax.Array) -> jax.Array:
        return jnp.stack([modules[s](x_NQ[:, q]) for q, s in enumerate(self.schedule)], axis=1)

    def __call__(self, x_NQD: jax.Array) -> jax.Array:
        """Run all steps of every frame at once."""
        parts_NQPKH = self._per_step(self.in_projs, self.norm1(x_NQD))
        y_NQKH = self_attention(parts_NQPKH[:, :, 0], parts_NQPKH[:, :, 1], parts_NQPKH[:, :, 2])
        x_NQD = x_NQD + self._per_step(self.out_projs, y_NQKH)
        return x_NQD + self._per_step(self.gating, self.norm2(x_NQD))

    def step(self, x_BD: jax.Array, q: int, past: KeysValues | None) -> tuple[jax.Array, KeysValues]:
        """Run step `q` of every row; `past` holds the keys and values [B, q, K, H] of the steps before it."""
        s = self.schedule[q]
        parts_B1PKH = self.in_projs[s](self.norm1(x_BD))[:, None]
        seen = parts_B1PKH[:, :, 1], parts_B1PKH[:, :, 2]
        if past is not None:
            seen = jnp.concatenate([past[0], seen[0]], axis=1), jnp.concatenate([past[1], seen[1]], axis=1)
        y_BKH = self_attention(parts_B1PKH[:, :, 0], *seen)[:, 0]
        x_BD = x_BD + self.out_projs[s](y_BKH)
        return x_BD + self.gating[s](self.norm2(x_BD)), seen


class Depformer(nnx.Module):
    """The depformer, with its embeddings and one head per generated codebook.

    Args:
      config: config of the language model.
      dtype: dtype of the activations, the same as the backbone's.
      rngs: random streams for the initial weights.
    """

    def __init__(self, config: LMConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        fixed = {
            "multi_linear": True,
            "weights_per_step": True,
            "pos_emb": "none",
            "gating": "silu",
            "layer_scale": None,
            "norm": None,
        }
        settings = {f"depformer_{name}": (getattr(config.depformer, name), value) for name, value in fixed.items()}
        for name, (found, value) in (settings | {"bias_proj": (config.bias_proj, False)}).items():
            if found != value:
                raise ConfigError(f"{name} is {found!r}; every published depformer has {value!r}")
        if (context := config.depformer.context) is not None and context < config.dep_q:
            raise ConfigError(
                f"depformer_context is {context}; the depformer attends to all of a frame's {config.dep_q} codebooks: "
                f"give {config.dep_q} or leave it out"
            )
        width, rank = config.depformer.dim, config.depformer.low_rank_embeddings
        self.config = config
        sets = max(config.depformer_schedule) + 1
        self.inputs = nnx.List([Linear({"E": config.dim}, {"D": width}, rngs=rngs) for _ in range(sets)])
        self.text_emb = TokenEmbedding(
            config.text_card + 1, width, rank=rank, demux=config.demux_second_stream, dtype=dtype, rngs=rngs
        )
        self.audio_embs = nnx.List(
            [TokenEmbedding(config.card + 1, width, rank=rank, dtype=dtype, rngs=rngs) for _ in range(config.dep_q - 1)]
        )
        self.layers = nnx.List([DepformerLayer(config, rngs=rngs) for _ in range(config.depformer.num_layers)])
        self.linears = nnx.List([Linear({"D": width}, {"V": config.card}, rngs=rngs) for _ in range(config.dep_q)])

    def __call__(self, hidden_BTE: jax.Array, target_BMT: jax.Array) -> jax.Array:
        """Compute teacher-forced logits.

        Args:
          hidden_BTE: the backbone's output.
          target_BMT: the tokens to predict at each step, text first, in delayed time.

        Returns:
          Logits [B, Q, T, V], float32.
        """
        B, T, _ = hidden_BTE.shape
        inputs = []
        for q, s in enumerate(self.config.depformer_schedule):
            token = self.text_emb(target_BMT[:, 0]) if q == 0 else self.audio_embs[q - 1](target_BMT[:, q])
            inputs.append(self.inputs[s](hidden_BTE) + token)
        x_NQD = jnp.stack(inputs, axis=2).reshape(B * T, self.config.dep_q, -1)
        for layer in self.layers:
            x_NQD = layer(x_NQD)
        logits_NQV = jnp.stack([linear(x_NQD[:, q]) for q, linear in enumerate(self.linears)], axis=1)
        return logits_NQV.reshape(B, T, self.config.dep_q, -1).swapaxes(1, 2).astype(jnp.float32)

    @full_precision
    def walk(
        self,
        hidden_BE: jax.Array,
        text_B: jax.Array,
        choose: Callable[[int, jax.Array], jax.Array],
        *,
        codebooks: int,
        wanted: jax.Array | None = None,
    ) -> jax.Array:
        """Generate one frame, codebook by codebook.

        Args:
          hidden_BE: the backbone's output for the frame.
          text_B: int32, the text token of the frame.
          choose: samples: maps a codebook's index and its logits [B, V], float32, to int32 tokens [B].
          codebooks: number of codebooks of the result, from 1 to Q.
          wanted: int32 [], number of codebooks to generate, rounded up to a multiple of `WALK_GROUP`. None means
            `codebooks`.

        Returns:
          int32 tokens [B, codebooks], 0 for codebooks that were not generated.
        """
        past: list[KeysValues | None] = [None] * len(self.layers)
        token_B, tokens_BQ = text_B, jnp.zeros((text_B.shape[0], 0), jnp.int32)
        for first in range(0, codebooks, WALK_GROUP):
            group = range(first, min(first + WALK_GROUP, codebooks))
            generate = functools.partial(self._generate, hidden_BE, choose, group)
            if wanted is None or first == 0:
                made = generate(token_B, past)
            else:
                nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(generate, token_B, past))
                made = jax.lax.cond(first < wanted, generate, lambda *_, nothing=nothing: nothing, token_B, past)
            group_BQ, past = made
            tokens_BQ, token_B = jnp.concatenate([tokens_BQ, group_BQ], axis=1), group_BQ[:, -1]
        return tokens_BQ

    def _generate(
        self,
        hidden_BE: jax.Array,
        choose: Callable[[int, jax.Array], jax.Array],
        group: range,
        token_B: jax.Array,
        past: list[KeysValues | None],
    ) -> tuple[jax.Array, list[KeysValues | None]]:
        """Generate a group of codebooks after `token_B`; return their tokens, and all keys and values so far."""
        past, tokens = list(past), []
        for q in group:
            embedding = self.text_emb if q == 0 else self.audio_embs[q - 1]
            x_BD = self.inputs[self.config.depformer_schedule[q]](hidden_BE) + embedding(token_B)
            for i, layer in enumerate(self.layers):
                x_BD, past[i] = layer.step(x_BD, q, past[i])
            token_B = choose(q, self.linears[q](x_BD).astype(jnp.float32))
            tokens.append(token_B)
        return jnp.stack(tokens, axis=1), past
