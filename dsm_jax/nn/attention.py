"""Self-attention over a sliding window with a ring cache, cross-attention to a fixed source, and position encodings.

Shape letters: docs/axes.md; U is the chunk's steps as keys, as T is its steps as queries.
Source: kyutai-labs/moshi@e6a55d2 moshi/modules/transformer.py. Differs on purpose: a chunk of several steps sees
exactly what single steps would see, where the reference drops keys once its ring is full (tests/test_transformer.py).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import RopeScaling, TransformerConfig
from dsm_jax.nn.linear import Linear
from dsm_jax.sharding import Sharding
from dsm_jax.streaming import KVCache, taken_BT


def rope_rates(half: int, max_period: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Compute the rate of each pair in radians a step, max_period ** (-i / half) before scaling: float32 [half].

    Source: the scaling is Llama 3.1's, as transformers 5.24 modeling_rope_utils.py:_compute_llama3_parameters has it.
    """
    rates = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(max_period) / half))
    if scaling is None:
        return rates
    turns = scaling.original_context * rates / (2 * math.pi)
    kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = jnp.clip(kept, 0.0, 1.0)
    return kept * rates + (1 - kept) * rates / scaling.factor


def rope(x: jax.Array, position_BT: jax.Array, max_period: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Rotate each pair (x[2i], x[2i+1]) by position * rate, in float32; see `rope_rates`.

    Args:
      x: [B, T, ..., H], with any number of head axes.
      position_BT: int32, the position of each step.
      max_period: steps in which the slowest pair would turn by one radian.
      scaling: scaling of the rates; None for none.

    Returns:
      The rotated array, of the shape and dtype of `x`.
    """
    half = x.shape[-1] // 2
    rates = rope_rates(half, max_period, scaling)
    angle = position_BT.astype(jnp.float32).reshape(*position_BT.shape, *(1,) * (x.ndim - 2)) * rates
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def sinusoids(position_BT: jax.Array, width: int, max_period: float) -> jax.Array:
    """Compute the position embedding [cos | sin], [B, T, width], with the reference's half_dim - 1 in the exponent."""
    half = width // 2
    rates = max_period ** (jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angle = position_BT.astype(jnp.float32)[..., None] / rates
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _attend(q_BTKGH: jax.Array, sources: Sequence[tuple[jax.Array, jax.Array, jax.Array | None]]) -> jax.Array:
    """Attend to several sets of keys at once, each (k_BKSH, v_BKSH, mask_BTS or None for all): [B, T, K, G, H].

    As the sets are separate arrays, the cache is never copied to join it to the new keys.
    """
    # float32 softmax: bfloat16 keeps 8 bits, too few to add up hundreds of weights.
    scale = q_BTKGH.shape[-1] ** -0.5
    scores = []
    for k_BKSH, _, mask_BTS in sources:
        s = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) * scale
        scores.append(s if mask_BTS is None else jnp.where(mask_BTS[:, None, None], s, -jnp.inf))
    # Subtracting one number from all scores does not change the softmax, so the maximum needs no gradient.
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores]))
    weights = [jnp.exp(s - top) for s in scores]
    total_BKGT = functools.reduce(jnp.add, [w.sum(-1) for w in weights])
    mixed = [
        jnp.einsum("BKGTS,BKSH->BKGTH", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, sources, strict=True)
    ]
    mixed_BKGTH = functools.reduce(jnp.add, mixed)
    return jnp.moveaxis(mixed_BKGTH / total_BKGT[..., None], 3, 1).astype(q_BTKGH.dtype)


def self_attention(q_BTKH: jax.Array, k_BUKH: jax.Array, v_BUKH: jax.Array) -> jax.Array:
    """Attend causally from the last T of U steps, without window or positions: [B, T, K, H]."""
    B, T, U = *q_BTKH.shape[:2], k_BUKH.shape[1]
    causal_BTU = jnp.broadcast_to(jnp.arange(U - T, U)[:, None] >= jnp.arange(U), (B, T, U))
    sources = [(k_BUKH.swapaxes(1, 2), v_BUKH.swapaxes(1, 2), causal_BTU)]
    return _attend(q_BTKH[:, :, :, None], sources)[:, :, :, 0]


def _write(
    cache: KVCache, k_BKUH: jax.Array, v_BKUH: jax.Array, slot_BKU: jax.Array, sharding: Sharding | None
) -> KVCache:
    """Write the chunk's keys and values to their slots; a slot number out of range writes nothing."""

    def write(k_BKSH: jax.Array, v_BKSH: jax.Array, k_BKUH: jax.Array, v_BKUH: jax.Array, slot_BKU: jax.Array):
        # Every index but the last axis is spelt out: with a slice over heads XLA copies the whole cache (4.2 ms a
        # layer against 0.5 ms at the published width, one row, two CPU cores).
        B, K = slot_BKU.shape[:2]
        at = (jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], slot_BKU)
        caches = (k_BKSH, k_BKUH), (v_BKSH, v_BKUH)
        return tuple(cache.at[at].set(new.astype(cache.dtype), mode="drop") for cache, new in caches)

    if sharding is not None:
        # XLA would gather the cache for an index over heads that are split; each device can write its own heads alone.
        write = sharding.each_part(write, ("BKSH", "BKSH", "BKUH", "BKUH", "BKU"), ("BKSH", "BKSH"))
    return KVCache(*write(cache.k_BKSH, cache.v_BKSH, k_BKUH, v_BKUH, slot_BKU))


def _slots(position_BT: jax.Array, step_taken_BT: jax.Array | None, slots: int) -> jax.Array:
    """Return the slot of each step; out of range, so that nothing is written, for steps that are not taken."""
    slot_BT = position_BT % slots
    return slot_BT if step_taken_BT is None else jnp.where(step_taken_BT, slot_BT, slots)


def _finite_slots(slot_BU: jax.Array, outside: int, *values: jax.Array) -> jax.Array:
    """Return the slots [B, K, U], with `outside` for heads in which any of `values` [B, K, ...] is NaN or infinite.

    A NaN in the cache spoils its row even where it is masked (0 * nan is nan), and would outlive a reset of the row.
    """
    finite = [jnp.isfinite(value).all(tuple(range(2, value.ndim)), keepdims=True) for value in values]
    finite_BK1 = functools.reduce(jnp.logical_and, [one.reshape(*one.shape[:2], 1) for one in finite])
    return jnp.where(finite_BK1, slot_BU[:, None], outside)


class Attention(nnx.Module):
    """Self-attention over the last `context` steps.

    Queries, keys and values come from one product. The parts (axis P) of each key/value head are its queries, its key
    and its value, so a split over heads (axis K) keeps each head whole.

    Args:
      config: sizes, positions and window.
      dtype: dtype of the cache.
      rngs: random streams for the initial weights.
    """

    def __init__(self, config: TransformerConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.sharding: Sharding | None = None  # written by `set_sharding`
        heads, width = config.num_kv_heads, config.head_dim
        self.in_proj = Linear({"D": config.d_model}, {"P": config.kv_repeat + 2, "K": heads, "H": width}, rngs=rngs)
        self.out_proj = Linear({"K": heads, "G": config.kv_repeat, "H": width}, {"D": config.d_model}, rngs=rngs)

    def init_cache(self, batch_size: int, slots: int | None = None) -> KVCache:
        """Make an empty cache of `slots` slots; None means `context`, beyond which no stream needs any."""
        c = self.config
        shape = (batch_size, c.num_kv_heads, c.context if slots is None else slots, c.head_dim)
        if self.sharding is not None:
            zeros = functools.partial(self.sharding.zeros, shape=shape, dtype=self.dtype)
            return KVCache(zeros("k_BKSH"), zeros("v_BKSH"))
        return KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def step(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        position_B: jax.Array,
        lengths_B: jax.Array | None,
        *,
        write: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """Run a chunk of at most as many steps as the cache has slots, or a whole clip without a cache.

        With `write` False the cache is only read, and the chunk's own keys and values [B, K, T, H] are returned in its
        place, for `commit`.
        """
        c = self.config
        B, T, _ = x_BTD.shape
        S = c.context if cache is None else cache.k_BKSH.shape[2]
        parts_BTPKH = self.in_proj(x_BTD)
        turned_BTPKH, v_BKUH = parts_BTPKH[:, :, :-1], parts_BTPKH[:, :, -1].swapaxes(1, 2)
        position_BT = position_B[:, None] + jnp.arange(T)
        if c.positional_embedding in ("rope", "sin_rope"):
            turned_BTPKH = rope(turned_BTPKH, position_BT, c.max_period, c.rope_scaling)
        q_BTKGH, k_BKUH = turned_BTPKH[:, :, :-1].swapaxes(2, 3), turned_BTPKH[:, :, -1].swapaxes(1, 2)
        step_taken_BT = None if lengths_B is None else taken_BT(lengths_B, T)
        slot_BT = _slots(position_BT, step_taken_BT, S)
        steps_T = jnp.arange(T)
        causal_BTU = jnp.broadcast_to(steps_T[:, None] >= steps_T, (B, T, T))

        if cache is None:
            near_TU = steps_T[:, None] - steps_T < S
            y_BTKGH = _attend(q_BTKGH, [(k_BKUH, v_BKUH, causal_BTU & near_TU)])
        elif T == 1 and write:
            # The new key replaces the key that just left the window, so after the write the ring is the window, and
            # XLA updates the donated cache in place. An idle row of a fresh stream has no key at all; attending to its
            # empty slot 0 keeps its softmax finite.
            cache = _write(cache, k_BKUH, v_BKUH, _finite_slots(slot_BT, S, k_BKUH, v_BKUH), self.sharding)
            filled_BTS = jnp.arange(S) <= position_BT[..., None]
            y_BTKGH = _attend(q_BTKGH, [(cache.k_BKSH, cache.v_BKSH, filled_BTS)])
        else:
            # A longer chunk overwrites keys that its first steps still need, so it reads before it writes. Slot s holds
            # the last position before the chunk that is s modulo S; while that is negative, the slot is empty.
            held_BS = position_B[:, None] - 1 - (position_B[:, None] - 1 - jnp.arange(S)) % S
            seen_BTS = (held_BS >= 0)[:, None] & (position_BT[..., None] - held_BS[:, None] < S)
            y_BTKGH = _attend(q_BTKGH, [(cache.k_BKSH, cache.v_BKSH, seen_BTS), (k_BKUH, v_BKUH, causal_BTU)])
            if not write:
                return self.out_proj(y_BTKGH), KVCache(k_BKUH, v_BKUH)
            # The write depends on the read, as XLA would copy the donated cache otherwise.
            kept_BTKGH = y_BTKGH
            if step_taken_BT is not None:
                kept_BTKGH = jnp.where(step_taken_BT[:, :, None, None, None], y_BTKGH, 0)
            slot_BKT = _finite_slots(slot_BT, S, kept_BTKGH.swapaxes(1, 2))
            cache = _write(cache, k_BKUH, v_BKUH, slot_BKT, self.sharding)
        return self.out_proj(y_BTKGH), cache

    def commit(self, cache: KVCache, chunk: KVCache, position_B: jax.Array, lengths_B: jax.Array) -> KVCache:
        """Write the first `lengths_B` steps of a chunk that `step` ran without writing it."""
        T, S = chunk.k_BKSH.shape[2], cache.k_BKSH.shape[2]
        slot_BT = _slots(position_B[:, None] + jnp.arange(T), taken_BT(lengths_B, T), S)
        slot_BKT = _finite_slots(slot_BT, S, chunk.k_BKSH, chunk.v_BKSH)
        return _write(cache, chunk.k_BKSH, chunk.v_BKSH, slot_BKT, self.sharding)


class CrossAttention(nnx.Module):
    """Attention to a fixed source without a window; the source's keys and values are computed once per stream."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, heads = {"D": config.d_model}, {"K": config.num_heads, "H": config.head_dim}
        # Queries have a weight of their own, as only they are computed in every step: from a packed weight, XLA copies
        # the slice first (a step of the 1.6B model's backbone on two CPU cores takes 177 ms, in place of 82 ms).
        self.q_proj = Linear(width, heads, rngs=rngs)
        self.kv_proj = Linear(width, {"P": 2, **heads}, rngs=rngs)
        self.out_proj = Linear(heads, width, rngs=rngs)

    def keys_values(self, source_BXD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute keys and values [B, K, X, H] of the source."""
        kv_BXPKH = self.kv_proj(source_BXD)
        return kv_BXPKH[:, :, 0].swapaxes(1, 2), kv_BXPKH[:, :, 1].swapaxes(1, 2)

    def __call__(
        self, x_BTD: jax.Array, k_BKXH: jax.Array, v_BKXH: jax.Array, length_B: jax.Array | None = None
    ) -> jax.Array:
        """Attend from every step to the first `length_B` steps of the source; None for all of them."""
        q_BTKGH, mask_B1X = self.q_proj(x_BTD)[:, :, :, None], None
        if length_B is not None:
            # A row without a source attends to the source's first, empty step, so that its output is finite.
            mask_B1X = taken_BT(jnp.maximum(length_B, 1), k_BKXH.shape[2])[:, None]
        return self.out_proj(_attend(q_BTKGH, [(k_BKXH, v_BKXH, mask_B1X)])[:, :, :, 0])
