"""A causal transformer with a sliding window: layers in a Python loop under jit, each with a cache of its own.

Shape letters: docs/axes.md.
Source: kyutai-labs/moshi@e6a55d2 moshi/modules/transformer.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import TransformerConfig
from dsm_jax.nn.attention import Attention, CrossAttention, sinusoids
from dsm_jax.nn.linear import Linear
from dsm_jax.nn.norms import LayerNorm, make_norm
from dsm_jax.nn.precision import full_precision
from dsm_jax.streaming import KVCache, step_in_blocks

# Clips up to this many windows use one full attention; longer ones would waste most of it on masked scores.
_WINDOWS_AT_ONCE = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransformerState:
    """Each layer's cache (None for clips that run in one step) and the number of steps that each row has taken."""

    caches: tuple[KVCache | None, ...]
    position_B: jax.Array


class FeedForward(nnx.Module):
    """linear2(gelu(linear1(x))) with the exact GELU, no biases."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.linear1 = Linear({"D": width}, {"F": inner}, rngs=rngs)
        self.linear2 = Linear({"F": inner}, {"D": width}, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Apply the feed-forward to every step."""
        return self.linear2(jax.nn.gelu(self.linear1(x_BTD), approximate=False))


class GatedFeedForward(nnx.Module):
    """linear_out(silu(gate) * up), where linear_in computes gate and up together; no biases."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.linear_in = Linear({"D": width}, {"P": 2, "F": inner}, rngs=rngs)
        self.linear_out = Linear({"F": inner}, {"D": width}, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the feed-forward to the last axis."""
        gate_up = self.linear_in(x)
        return self.linear_out(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :])


class TransformerLayer(nnx.Module):
    """Pre-norm self-attention, cross-attention if the config has it, and feed-forward."""

    def __init__(self, config: TransformerConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.d_model
        self.norm1 = make_norm(config.norm, width)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = make_norm(config.norm, width)
        self.feedforward = (
            FeedForward(width, config.inner_width, rngs=rngs)
            if config.gating == "none"
            else GatedFeedForward(width, config.inner_width, rngs=rngs)
        )
        self.norm_cross = LayerNorm(width, epsilon=1e-5) if config.cross_attention else None
        self.cross_attention = CrossAttention(config, rngs=rngs) if config.cross_attention else None
        scale = config.layer_scale
        self.layer_scale_1_D = None if scale is None else nnx.Param(jnp.full((width,), scale))
        self.layer_scale_2_D = None if scale is None else nnx.Param(jnp.full((width,), scale))

    def step(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        position_B: jax.Array,
        lengths_B: jax.Array | None,
        cross: tuple[jax.Array, jax.Array] | None,
        cross_length_B: jax.Array | None,
        *,
        write: bool = True,
        wanted_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Run one chunk; see `Attention.step`. With `wanted_B`, return that step of each row alone, [B, 1, D]."""
        y_BTD, cache = self.self_attn.step(self.norm1(x_BTD), cache, position_B, lengths_B, write=write)
        x_BTD = x_BTD + _scaled(y_BTD, self.layer_scale_1_D)
        if wanted_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, wanted_B[:, None, None], axis=1)
        if self.cross_attention is not None and self.norm_cross is not None and cross is not None:
            x_BTD = x_BTD + self.cross_attention(self.norm_cross(x_BTD), *cross, cross_length_B)
        return x_BTD + _scaled(self.feedforward(self.norm2(x_BTD)), self.layer_scale_2_D), cache


def _scaled(y_BTD: jax.Array, scale_D: nnx.Param | None) -> jax.Array:
    return y_BTD if scale_D is None else scale_D[...].astype(y_BTD.dtype) * y_BTD


class Transformer(nnx.Module):
    """A stack of layers. Chunks longer than the window run as a scan over windows; short clips run in one step.

    Args:
      config: sizes and kinds of layers.
      dtype: dtype of the activations and the caches, whatever the weights are stored in.
      rngs: random streams for the initial weights.
    """

    def __init__(self, config: TransformerConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.layers = nnx.List([TransformerLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])

    def init_state(self, batch_size: int, slots: int | None = None) -> TransformerState:
        """Make the state of fresh streams.

        Args:
          batch_size: number of streams.
          slots: slots of each cache; None means `context`. With fewer, no stream may take more steps than there are
            slots.
        """
        caches = tuple(layer.self_attn.init_cache(batch_size, slots) for layer in self.layers)
        return TransformerState(caches, jnp.zeros((batch_size,), jnp.int32))

    def init_clip(self, batch_size: int, length: int) -> TransformerState:
        """Make the state for clips of `length` steps that run in one step; short clips get no caches.

        Attending to an empty cache would double the time of attention in training.
        """
        if length > _WINDOWS_AT_ONCE * self.config.context:
            return self.init_state(batch_size)
        return TransformerState((None,) * len(self.layers), jnp.zeros((batch_size,), jnp.int32))

    @full_precision
    def cross_keys_values(self, source_BXD: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Compute every layer's keys and values of the cross-attention source, to pass to each `step`."""
        attentions = [layer.cross_attention for layer in self.layers]
        return tuple(attention.keys_values(source_BXD) for attention in attentions if attention is not None)

    @full_precision
    def step(
        self,
        x_BTD: jax.Array,
        state: TransformerState,
        lengths_B: jax.Array | None = None,
        cross: tuple[tuple[jax.Array, jax.Array], ...] | None = None,
        cross_length_B: jax.Array | None = None,
    ) -> tuple[jax.Array, TransformerState]:
        """Run T steps and return as many.

        Args:
          x_BTD: the chunk.
          state: from `init_state`, or from the step before.
          lengths_B: int32, steps of the chunk that each row takes; None for all.
          cross: from `cross_keys_values`, for a config with cross-attention.
          cross_length_B: int32, number of source positions that each row has; None for all.
        """

        def block(
            x_BTD: jax.Array, state: TransformerState, lengths_B: jax.Array | None
        ) -> tuple[jax.Array, TransformerState]:
            x_BTD, caches = self._layers(x_BTD, state, lengths_B, cross, cross_length_B)
            taken = x_BTD.shape[1] if lengths_B is None else lengths_B
            return x_BTD, TransformerState(caches, state.position_B + taken)

        first = state.caches[0]
        longest = x_BTD.shape[1] if first is None else first.k_BKSH.shape[2]
        return step_in_blocks(block, x_BTD, state, lengths_B, longest)

    def _layers(
        self,
        x_BTD: jax.Array,
        state: TransformerState,
        lengths_B: jax.Array | None,
        cross: tuple[tuple[jax.Array, jax.Array], ...] | None,
        cross_length_B: jax.Array | None,
        *,
        write: bool = True,
        wanted_B: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KVCache | None, ...]]:
        """Run a chunk of at most a window through all layers; `wanted_B` is for the last. See `TransformerLayer`."""
        if self.config.positional_embedding in ("sin", "sin_rope"):
            position_BT = state.position_B[:, None] + jnp.arange(x_BTD.shape[1])
            x_BTD = x_BTD + sinusoids(position_BT, x_BTD.shape[2], self.config.max_period).astype(x_BTD.dtype)
        caches = []
        for i, (layer, cache) in enumerate(zip(self.layers, state.caches, strict=True)):
            source, last = None if cross is None else cross[i], i == len(self.layers) - 1
            x_BTD, cache = layer.step(
                x_BTD,
                cache,
                state.position_B,
                lengths_B,
                source,
                cross_length_B,
                write=write,
                wanted_B=wanted_B if last else None,
            )
            caches.append(cache)
        return x_BTD, tuple(caches)

    @full_precision
    def prefill(
        self, x_BTD: jax.Array, state: TransformerState, lengths_B: jax.Array
    ) -> tuple[jax.Array, TransformerState]:
        """Run T steps and return the output of each row's last one; the last feed-forward runs for that step alone.

        Args:
          x_BTD: the chunk, at most as many steps as a cache has slots.
          state: from `init_state`, or from the step before.
          lengths_B: int32, steps of the chunk that each row takes.

        Returns:
          The outputs [B, D], without meaning for rows that take no step, and the new state.
        """
        wanted_B = jnp.maximum(lengths_B - 1, 0)
        y_BTD, caches = self._layers(x_BTD, state, lengths_B, None, None, wanted_B=wanted_B)
        return y_BTD[:, 0], TransformerState(caches, state.position_B + lengths_B)

    @full_precision
    def peek(self, x_BTD: jax.Array, state: TransformerState) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Run T steps without taking them.

        A caller that guessed some of the inputs keeps the steps whose guesses were right with `commit`, and drops the
        others: a ring cannot give back the keys that it has overwritten.

        Args:
          x_BTD: the chunk, at most as many steps as a cache has slots.
          state: from `init_state`, or from the step before.

        Returns:
          The outputs of all T steps, and each layer's keys and values [B, K, T, H] of the chunk.
        """
        y_BTD, chunk = self._layers(x_BTD, state, None, None, None, write=False)
        return y_BTD, tuple(layer for layer in chunk if layer is not None)

    def commit(self, state: TransformerState, chunk: tuple[KVCache, ...], lengths_B: jax.Array) -> TransformerState:
        """Take the first `lengths_B` steps that `peek` ran from this state; return the state after them."""
        caches = tuple(
            layer.self_attn.commit(cache, new, state.position_B, lengths_B)
            for layer, cache, new in zip(self.layers, state.caches, chunk, strict=True)
            if cache is not None
        )
        return TransformerState(caches, state.position_B + lengths_B)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Run one step over the whole clip."""
        return self.step(x_BTD, self.init_clip(*x_BTD.shape[:2]))[0]
