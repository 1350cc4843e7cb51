"""The language model of CSM: a backbone over frames, and a depth decoder over the codebooks of the next frame.

A position of the backbone holds a token of text, or a frame of audio: the sum of the embeddings of its codes. The
backbone's output predicts the first codebook of the next frame. The depth decoder takes that output as its first step
and the codes before as the others, and predicts codebook k at step k; its cache begins anew with every frame. Both
embed a code by the same table. A frame of zeros ends a recording.

Tokens are [B, M, T], text first, as in `models.lm`; -1 is absent, so a text position has -1 in all codebooks and a
frame of audio has -1 in its text.

Shape letters: docs/axes.md; here N is the frames of all rows, D the width
of the backbone and, inside the depth decoder, of the depth decoder.
Source: SesameAILabs/csm@2d72082 models.py; transformers 5.24 models/csm/modeling_csm.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import CsmConfig
from dsm_jax.errors import StreamError
from dsm_jax.nn.linear import Embedding, Linear, LinearPerStream
from dsm_jax.nn.norms import make_norm
from dsm_jax.nn.precision import full_precision
from dsm_jax.nn.transformer import Transformer, TransformerState
from dsm_jax.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CsmOutput:
    """Teacher-forced logits, float32.

    Attributes:
      first_logits_BTV: logits at t predict the first code of frame t + 1.
      depth_logits_BTQV: logits at t predict the codes of frame t after its first, so one codebook fewer than a frame
        has; meaningless at positions without audio.
    """

    first_logits_BTV: jax.Array
    depth_logits_BTQV: jax.Array


class CsmLM(nnx.Module):
    """The backbone and the depth decoder, with their embeddings and heads.

    Args:
      config: sizes and kinds of layers.
      dtype: dtype of the activations and the caches, whatever the weights are stored in.
      rngs: random streams for the initial weights.
    """

    def __init__(self, config: CsmConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.sharding: Sharding | None = None  # written by `set_sharding`
        width, depth = config.backbone.d_model, config.depth.d_model
        init = nnx.initializers.normal(width**-0.5)
        self.text_emb = Embedding(config.text_card, width, dtype=dtype, rngs=rngs)
        self.audio_emb = Embedding(config.card, width, streams=config.n_q, dtype=dtype, rngs=rngs)
        self.backbone = Transformer(config.backbone, dtype=dtype, rngs=rngs)
        self.backbone_norm = make_norm(config.backbone.norm, width)
        self.first_linear = Linear({"D": width}, {"V": config.card}, init=init, rngs=rngs)
        self.projection = Linear({"E": width}, {"D": depth}, rngs=rngs)
        self.depth = Transformer(config.depth, dtype=dtype, rngs=rngs)
        self.depth_norm = make_norm(config.depth.norm, depth)
        self.depth_linears = LinearPerStream(config.n_q - 1, depth, config.card, rngs=rngs)

    @full_precision
    def embed(self, tokens_BMT: jax.Array) -> jax.Array:
        """Sum the embeddings of all streams; a token of -1 adds exactly nothing.

        Raises:
          StreamError: the number of streams is not `n_q` + 1.
        """
        if tokens_BMT.shape[1] != self.config.n_q + 1:
            raise StreamError(
                f"the model got {tokens_BMT.shape[1]} streams; it has {self.config.n_q + 1}: text, then "
                f"{self.config.n_q} of audio, [batch, streams, positions]"
            )
        audio_BTD = self.audio_emb(tokens_BMT[:, 1:].swapaxes(1, 2)).sum(2)
        return audio_BTD + self.text_emb(tokens_BMT[:, 0])

    def init_state(self, batch_size: int, slots: int | None = None) -> TransformerState:
        """Make the state of fresh conversations, for `slots` positions at most; None means the whole context."""
        return self.backbone.init_state(batch_size, slots)

    def step(
        self, tokens_BMT: jax.Array, state: TransformerState, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, TransformerState]:
        """Feed T positions to the backbone; return the normalised hidden states [B, T, D] and the new state.

        Raises:
          StreamError: the number of streams is not `n_q` + 1.
        """
        x_BTD, state = self.backbone.step(self.embed(tokens_BMT), state, lengths_B)
        return self.backbone_norm(x_BTD), state

    def prefill(
        self, tokens_BMT: jax.Array, state: TransformerState, lengths_B: jax.Array
    ) -> tuple[jax.Array, TransformerState]:
        """Feed T positions to the backbone; return each row's last hidden state [B, D] and the new state.

        See `Transformer.prefill`.

        Raises:
          StreamError: the number of streams is not `n_q` + 1.
        """
        x_BD, state = self.backbone.prefill(self.embed(tokens_BMT), state, lengths_B)
        return self.backbone_norm(x_BD), state

    @full_precision
    def first_logits(self, hidden: jax.Array) -> jax.Array:
        """Score the first code of the next frame: [..., D] to float32 [..., V]."""
        return self.first_linear(hidden).astype(jnp.float32)

    @full_precision
    def walk(self, hidden_BE: jax.Array, choose: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
        """Generate one frame, codebook by codebook.

        Args:
          hidden_BE: the backbone's output at the position before the frame.
          choose: function from a codebook's index, possibly traced, and its float32 logits [B, V] to int32 codes [B].

        Returns:
          int32 codes [B, Q].
        """
        rows, codebooks = hidden_BE.shape[0], self.config.n_q
        first_B = choose(0, self.first_logits(hidden_BE))

        def chosen(q: Any, x_BTD: jax.Array) -> jax.Array:
            logits_BV = self.depth_linears.of_stream(q - 1, self.depth_norm(x_BTD[:, -1]))
            return choose(q, logits_BV.astype(jnp.float32))

        def later(carry: tuple[jax.Array, TransformerState], q: jax.Array):
            code_B, state = carry
            x_BTD = self.projection(self.audio_emb.of_stream(q - 1, code_B))[:, None]
            x_BTD, state = self.depth.step(x_BTD, state)
            code_B = chosen(q, x_BTD)
            return (code_B, state), code_B

        # The hidden state and the first code are one step of two positions: one reading of the weights fewer.
        pair_BTE = jnp.stack([hidden_BE.astype(self.dtype), self.audio_emb.of_stream(0, first_B)], axis=1)
        x_BTD, state = self.depth.step(self.projection(pair_BTE), self.depth.init_state(rows, codebooks))
        second_B = chosen(1, x_BTD)
        _, others_QB = jax.lax.scan(later, (second_B, state), jnp.arange(2, codebooks))
        return jnp.concatenate([first_B[:, None], second_B[:, None], others_QB.T], axis=1)

    @full_precision
    def depth_logits(self, hidden_NE: jax.Array, codes_NQ: jax.Array) -> jax.Array:
        """Compute teacher-forced logits of the depth decoder.

        Args:
          hidden_NE: the backbone's output at the position before each frame.
          codes_NQ: int32 codes of the frames; -1 adds nothing.

        Returns:
          float32 [N, Q - 1, V]: the logits with index q predict code q + 1.
        """
        embedded_NQE = self.audio_emb(codes_NQ)[:, :-1]
        x_NQE = jnp.concatenate([hidden_NE[:, None].astype(self.dtype), embedded_NQE], axis=1)
        x_NQD = self.depth_norm(self.depth(self.projection(x_NQE)))
        return self.depth_linears(x_NQD[:, 1:]).astype(jnp.float32)

    @full_precision
    def hidden(self, tokens_BMT: jax.Array) -> jax.Array:
        """Run the backbone over whole conversations: normalised hidden states [B, T, D]."""
        clip = self.backbone.init_clip(tokens_BMT.shape[0], tokens_BMT.shape[2])
        return self.step(tokens_BMT, clip)[0]

    def __call__(self, tokens_BMT: jax.Array) -> CsmOutput:
        """Compute teacher-forced logits of whole conversations: every code is predicted from what is before it."""
        hidden_BTD = self.hidden(tokens_BMT)
        before_BTD = jnp.pad(hidden_BTD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        batch, length, width = hidden_BTD.shape
        codes_NQ = tokens_BMT[:, 1:].swapaxes(1, 2).reshape(batch * length, -1)
        depth_NQV = self.depth_logits(before_BTD.reshape(batch * length, width), codes_NQ)
        return CsmOutput(self.first_logits(hidden_BTD), depth_NQV.reshape(batch, length, *depth_NQV.shape[1:]))
