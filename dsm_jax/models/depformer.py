"""The depformer: a small transformer that walks over the codebooks of one frame.

Step k of the walk is fed the backbone's hidden state and the token of step k - 1 (the text token first), and scores
codebook k. Each step has weights of its own, or shares a set by the config's schedule. A walk never looks beyond its
frame, so teacher-forced training treats every frame as a row.

Shape letters: B batch rows, T frames, N = B * T, Q generated codebooks = steps of the walk, K streams, D model width,
W depformer width, E projected width, F inner width, V vocabulary, A heads, H head width.
Source: Moshi (Défossez et al. 2024), section 3.4; kyutai-labs/moshi@e6a55d2 moshi/models/lm.py
forward_depformer_training and depformer_step.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import LMConfig, gating_dim
from dsm_jax.errors import ConfigError
from dsm_jax.nn.attention import self_attention
from dsm_jax.nn.embedding import Embedding
from dsm_jax.nn.precision import full_precision
from dsm_jax.nn.transformer import GatedFeedForward, make_norm

KeysValues = tuple[jax.Array, jax.Array]
WALK_GROUP = 4  # codebooks between two looks at whether more are wanted, each of which waits for the device on a GPU


class Linear(nnx.Module):
    """A matrix product without bias."""

    def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs):
        self.weight_DE = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (width_in, width_out)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies to the last axis."""
        return x @ self.weight_DE[...]


class DepformerLayer(nnx.Module):
    """Pre-norm attention and gated feed-forward; the norms are shared by all steps, the weights are per set."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        width, sets = config.depformer.dim, max(config.depformer_schedule) + 1
        inner = gating_dim(width, config.depformer_feedforward)
        self.heads = config.depformer.num_heads
        self.schedule = config.depformer_schedule
        self.norm1 = make_norm(config.norm, width)
        self.in_projs = nnx.List([Linear(width, 3 * width, rngs=rngs) for _ in range(sets)])
        self.out_projs = nnx.List([Linear(width, width, rngs=rngs) for _ in range(sets)])
        self.norm2 = make_norm(config.norm, width)
        self.gating = nnx.List([GatedFeedForward(width, inner, rngs=rngs) for _ in range(sets)])

    def _per_step(self, modules: nnx.List, x_NQW: jax.Array) -> jax.Array:
        return jnp.stack([modules[s](x_NQW[:, q]) for q, s in enumerate(self.schedule)], axis=1)

    def __call__(self, x_NQW: jax.Array) -> jax.Array:
        """All steps of every walk at once."""
        N, Q, W = x_NQW.shape
        packed = self._per_step(self.in_projs, self.norm1(x_NQW)).reshape(N, Q, 3, self.heads, W // self.heads)
        y_NQW = self_attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2])
        x_NQW = x_NQW + self._per_step(self.out_projs, y_NQW)
        return x_NQW + self._per_step(self.gating, self.norm2(x_NQW))

    def step(self, x_BW: jax.Array, q: int, past: KeysValues | None) -> tuple[jax.Array, KeysValues]:
        """Step `q` of every walk, after those whose keys and values [B, q, A, H] are given."""
        B, W = x_BW.shape
        packed = self.in_projs[self.schedule[q]](self.norm1(x_BW)).reshape(B, 1, 3, self.heads, W // self.heads)
        seen = packed[:, :, 1], packed[:, :, 2]
        if past is not None:
            seen = jnp.concatenate([past[0], seen[0]], axis=1), jnp.concatenate([past[1], seen[1]], axis=1)
        y_BW = self_attention(packed[:, :, 0], *seen)[:, 0]
        x_BW = x_BW + self.out_projs[self.schedule[q]](y_BW)
        return x_BW + self.gating[self.schedule[q]](self.norm2(x_BW)), seen


class Depformer(nnx.Module):
    """Scores the codebooks of each frame in turn."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
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
        width, rank = config.depformer.dim, config.depformer.low_rank_embeddings
        self.config = config
        self.inputs = nnx.List(
            [Linear(config.dim, width, rngs=rngs) for _ in range(max(config.depformer_schedule) + 1)]
        )
        self.text_emb = Embedding(config.text_card + 1, width, rank=rank, demux=config.demux_second_stream, rngs=rngs)
        self.audio_embs = nnx.List(
            [Embedding(config.card + 1, width, rank=rank, rngs=rngs) for _ in range(config.dep_q - 1)]
        )
        self.layers = nnx.List([DepformerLayer(config, rngs=rngs) for _ in range(config.depformer.num_layers)])
        self.linears = nnx.List([Linear(width, config.card, rngs=rngs) for _ in range(config.dep_q)])

    def __call__(self, hidden_BTD: jax.Array, target_BKT: jax.Array) -> jax.Array:
        """Teacher-forced scores.

        Args:
          hidden_BTD: the backbone's output.
          target_BKT: the tokens of the frame being predicted, text first, in delayed time.

        Returns:
          Logits [B, Q, T, V], float32.
        """
        B, T, _ = hidden_BTD.shape
        inputs = []
        for q, s in enumerate(self.config.depformer_schedule):
            token = self.text_emb(target_BKT[:, 0]) if q == 0 else self.audio_embs[q - 1](target_BKT[:, q])
            inputs.append(self.inputs[s](hidden_BTD) + token)
        x_NQW = jnp.stack(inputs, axis=2).reshape(B * T, self.config.dep_q, -1)
        for layer in self.layers:
            x_NQW = layer(x_NQW)
        logits_NQV = jnp.stack([linear(x_NQW[:, q]) for q, linear in enumerate(self.linears)], axis=1)
        return logits_NQV.reshape(B, T, self.config.dep_q, -1).swapaxes(1, 2).astype(jnp.float32)

    @full_precision
    def walk(
        self,
        hidden_BD: jax.Array,
        text_B: jax.Array,
        choose: Callable[[int, jax.Array], jax.Array],
        *,
        codebooks: int,
        wanted: jax.Array | None = None,
    ) -> jax.Array:
        """Generates one frame, codebook after codebook.

        Args:
          hidden_BD: the backbone's output for the frame.
          text_B: int32, the text token of the frame.
          choose: maps a codebook's number and its logits [B, V], float32, to int32 tokens [B].
          codebooks: how many to generate at most, from 1 to Q.
          wanted: int32 [], how many codebooks are used of the result: the walk ends with the group of `WALK_GROUP`
            codebooks that holds the last of them. None stands for `codebooks`.

        Returns:
          int32 tokens [B, codebooks], 0 for codebooks that were not generated.
        """
        past: list[KeysValues | None] = [None] * len(self.layers)
        token_B, tokens_BQ = text_B, jnp.zeros((text_B.shape[0], 0), jnp.int32)
        for first in range(0, codebooks, WALK_GROUP):
            group = range(first, min(first + WALK_GROUP, codebooks))
            generate = functools.partial(self._generate, hidden_BD, choose, group)
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
        hidden_BD: jax.Array,
        choose: Callable[[int, jax.Array], jax.Array],
        group: range,
        token_B: jax.Array,
        past: list[KeysValues | None],
    ) -> tuple[jax.Array, list[KeysValues | None]]:
        """Generates a group of codebooks after `token_B`: their tokens, and the keys and values so far."""
        past, tokens = list(past), []
        for q in group:
            embedding = self.text_emb if q == 0 else self.audio_embs[q - 1]
            x_BW = self.inputs[self.config.depformer_schedule[q]](hidden_BD) + embedding(token_B)
            for i, layer in enumerate(self.layers):
                x_BW, past[i] = layer.step(x_BW, q, past[i])
            token_B = choose(q, self.linears[q](x_BW).astype(jnp.float32))
            tokens.append(token_B)
        return jnp.stack(tokens, axis=1), past
