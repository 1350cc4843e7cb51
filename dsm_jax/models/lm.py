"""The delayed-streams language model: one text stream and many streams of audio codes, in steps of 80 ms.

At each step the model takes one token of every stream and predicts the next text token; in models that also generate
audio, a depformer then generates the codebooks. Token ids: `card` and `text_card` start a stream; -1 is absent, so it
adds nothing to the input and losses leave it out.

Shape letters: docs/axes.md.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling); kyutai-labs/moshi@e6a55d2 moshi/models/lm.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import LMConfig
from dsm_jax.errors import StreamError
from dsm_jax.models.conditioning import Conditioning, Conditions
from dsm_jax.models.depformer import Depformer
from dsm_jax.models.streams import ZERO_TOKEN, delay, initial_tokens, inputs_of, undelay
from dsm_jax.nn.embedding import TokenEmbedding
from dsm_jax.nn.linear import Embedding, Linear
from dsm_jax.nn.norms import make_norm
from dsm_jax.nn.precision import full_precision
from dsm_jax.nn.transformer import Transformer, TransformerState
from dsm_jax.sharding import Sharding
from dsm_jax.streaming import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LMOutput:
    """Logits aligned with the tokens that they predict, and masks of the tokens that are predicted."""

    text_logits_BTV: jax.Array
    text_mask_BT: jax.Array
    audio_logits_BQTV: jax.Array | None
    audio_mask_BQT: jax.Array | None


class DelayedStreamsLM(nnx.Module):
    """The backbone with its embeddings and heads, and the conditioning and the depformer if the config has them.

    Args:
      config: sizes and kinds of layers.
      dtype: dtype of the activations and the caches, whatever the weights are stored in. Conditioning is always
        float32.
      rngs: random streams for the initial weights.
    """

    def __init__(self, config: LMConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.sharding: Sharding | None = None  # written by `set_sharding`
        width, init = {"D": config.dim}, nnx.initializers.normal(config.dim**-0.5)
        self.audio_emb = Embedding(config.card + 1, config.dim, streams=config.n_q, dtype=dtype, rngs=rngs)
        self.text_emb = TokenEmbedding(
            config.text_card + 1, config.dim, demux=config.demux_second_stream, dtype=dtype, rngs=rngs
        )
        self.transformer = Transformer(config.transformer, dtype=dtype, rngs=rngs)
        self.out_norm = make_norm(config.norm, config.dim)
        self.text_linear = Linear(width, {"V": config.text_logits}, bias=config.bias_proj, init=init, rngs=rngs)
        heads = {"A": config.extra_heads_num_heads, "O": config.extra_heads_dim}
        self.extra_heads = Linear(width, heads, init=init, rngs=rngs) if heads["A"] else None
        self.conditioning = Conditioning(config, rngs=rngs) if config.conditioners else None
        self.depformer = Depformer(config, dtype=dtype, rngs=rngs) if config.dep_q else None

    @property
    def initial_M(self) -> jax.Array:
        """The initial token of every stream, int32 [M]."""
        return initial_tokens(self.config)

    @full_precision
    def embed(self, tokens_BMT: jax.Array) -> jax.Array:
        """Sum the embeddings of all streams; a token of -1 adds exactly nothing."""
        audio_BTD = self.audio_emb(tokens_BMT[:, 1:].swapaxes(1, 2)).sum(2)
        return audio_BTD + self.text_emb(tokens_BMT[:, 0])

    def init_state(self, batch_size: int, slots: int | None = None) -> TransformerState:
        """Make the state of `batch_size` fresh streams; see `Transformer.init_state` for `slots`."""
        return self.transformer.init_state(batch_size, slots)

    def step(
        self,
        tokens_BMT: jax.Array,
        state: TransformerState,
        lengths_B: jax.Array | None = None,
        conditions: Conditions | None = None,
    ) -> tuple[jax.Array, TransformerState]:
        """Feed T steps of tokens, already delayed; return the normalised hidden states [B, T, D] and the new state.

        Raises:
          StreamError: the number of streams is not `n_q` + 1, or the model has cross-attention and got no conditions.
        """
        x_BTD = self._inputs(tokens_BMT, conditions)
        x_BTD, state = self.transformer.step(x_BTD, state, lengths_B, *_cross_of(conditions))
        return self.out_norm(x_BTD), state

    def peek(self, tokens_BMT: jax.Array, state: TransformerState) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Feed T steps of tokens, some of them guessed, to a model without conditions; see `Transformer.peek`."""
        x_BTD, chunk = self.transformer.peek(self._inputs(tokens_BMT, None), state)
        return self.out_norm(x_BTD), chunk

    def commit(self, state: TransformerState, chunk: tuple[KVCache, ...], lengths_B: jax.Array) -> TransformerState:
        """Take the first `lengths_B` steps that `peek` ran from this state; return the state after them."""
        return self.transformer.commit(state, chunk, lengths_B)

    def _inputs(self, tokens_BMT: jax.Array, conditions: Conditions | None) -> jax.Array:
        """Compute the backbone's input of each step."""
        if self.config.cross_attention and (conditions is None or conditions.cross is None):
            raise StreamError("the model has cross-attention and got no conditions; make them with `condition`")
        if tokens_BMT.shape[1] != self.config.n_q + 1:
            raise StreamError(
                f"the model got {tokens_BMT.shape[1]} streams; it has {self.config.n_q + 1}: text, then "
                f"{self.config.n_q} of audio, [batch, streams, steps]"
            )
        x_BTD = self.embed(tokens_BMT)
        if conditions is not None and conditions.sum_BD is not None:
            x_BTD = x_BTD + conditions.sum_BD[:, None].astype(x_BTD.dtype)
        return x_BTD

    @full_precision
    def condition(self, values: dict[str, jax.Array], masks: dict[str, jax.Array]) -> Conditions:
        """Compute the conditioning of `step` from condition values, once per stream.

        Raises:
          StreamError: the model has no conditioners.
        """
        if self.conditioning is None:
            raise StreamError(f"the model takes no conditions, and was given {sorted(values)}; leave them out")
        sum_BD, cross_BXD = self.conditioning(values, masks)
        if cross_BXD is None:
            return Conditions(sum_BD, None)
        return Conditions(sum_BD, self.transformer.cross_keys_values(cross_BXD.astype(self.dtype)))

    @full_precision
    def text_logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Score the next text token, float32 [B, T, V]."""
        return self.text_linear(hidden_BTD).astype(jnp.float32)

    @full_precision
    def extra_probabilities(self, hidden_BTD: jax.Array) -> jax.Array:
        """Compute the softmax of every extra head, float32 [B, T, A, O]; in STT models, class 0 is a pause to come."""
        if self.extra_heads is None:
            return jnp.zeros((*hidden_BTD.shape[:2], 0, self.config.extra_heads_dim), jnp.float32)
        return jax.nn.softmax(self.extra_heads(hidden_BTD).astype(jnp.float32), axis=-1)

    @full_precision
    def __call__(
        self, codes_BMT: jax.Array, conditions: Conditions | None = None, *, inputs_BMT: jax.Array | None = None
    ) -> LMOutput:
        """Compute teacher-forced logits of a whole clip: every token is predicted from the tokens before it.

        Args:
          codes_BMT: int32 tokens of every stream, text first, undelayed: column t is frame t. -1 adds nothing to the
            input and is masked out.
          conditions: from `condition`, for models that have conditioners.
          inputs_BMT: input of the backbone in place of `codes_BMT`, for training that drops part of the input; the
            masks and the depformer still use `codes_BMT`.

        Returns:
          Logits aligned with `codes_BMT`: logits at t predict codes[..., t]. Frames that a stream's delay moves past
          the end have zero logits and are masked out.
        """
        config = self.config
        target_BMT = delay(codes_BMT, self.initial_M, config.delays)
        delayed_BMT = target_BMT if inputs_BMT is None else delay(inputs_BMT, self.initial_M, config.delays)
        clip = self.transformer.init_clip(codes_BMT.shape[0], codes_BMT.shape[2])
        hidden_BTD, _ = self.step(inputs_of(delayed_BMT, self.initial_M), clip, conditions=conditions)

        text_BTV, valid_1T = undelay(self.text_logits(hidden_BTD)[:, None], config.delays[:1])
        text_mask_BT = valid_1T & (codes_BMT[:, 0] != ZERO_TOKEN)
        if self.depformer is None:
            return LMOutput(text_BTV[:, 0], text_mask_BT, None, None)
        logits_BQTV = self.depformer(hidden_BTD, target_BMT)
        generated = slice(1, 1 + config.dep_q)
        logits_BQTV, valid_QT = undelay(logits_BQTV, config.delays[generated])
        return LMOutput(text_BTV[:, 0], text_mask_BT, logits_BQTV, valid_QT & (codes_BMT[:, generated] != ZERO_TOKEN))


def _cross_of(conditions: Conditions | None) -> tuple[tuple[tuple[jax.Array, jax.Array], ...] | None, jax.Array | None]:
    return (None, None) if conditions is None else (conditions.cross, conditions.length_B)
