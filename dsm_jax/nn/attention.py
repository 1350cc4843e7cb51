"""Attention over a sliding window with a ring of keys and values, attention to a fixed source, and positions.

Shape letters: B batch rows, T steps, D model width, E projected width, N query heads, K key/value heads, G query heads
per key/value head, H head width, S cache slots, U keys of the chunk itself, X steps of the cross-attention source.
Source: kyutai-labs/moshi@e6a55d2 moshi/modules/transformer.py. Differs on purpose: a chunk of several steps sees
exactly what single steps would see, where the reference drops keys once its ring is full (tests/test_transformer.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import TransformerConfig
from dsm_jax.streaming import KVCache, taken_BT


def rope(x_BTNH: jax.Array, position_BT: jax.Array, max_period: float) -> jax.Array:
    """Rotates each pair (x[2i], x[2i+1]) by position * max_period ** (-2i / H), in float32."""
    half = x_BTNH.shape[-1] // 2
    rates = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(max_period) / half))
    angle = position_BT.astype(jnp.float32)[..., None, None] * rates
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], half, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def sinusoids(position_BT: jax.Array, width: int, max_period: float) -> jax.Array:
    """[cos | sin] position embedding [B, T, width], with half_dim - 1 in the exponent as the reference has it."""
    half = width // 2
    rates = max_period ** (jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angle = position_BT.astype(jnp.float32)[..., None] / rates
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _attend(q_BTKGH: jax.Array, sources: list[tuple[jax.Array, jax.Array, jax.Array | None]]) -> jax.Array:
    """Softmax attention over several lots of keys at once, each (k_BKSH, v_BKSH, mask_BTS or None for all).

    Keeping the lots apart means the ring is read where it lies and never copied next to the new keys.
    """
    # float32 softmax: bfloat16 keeps 8 bits, too few to add up hundreds of weights.
    scale = q_BTKGH.shape[-1] ** -0.5
    scores = []
    for k_BKSH, _, mask_BTS in sources:
        s = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) * scale
        scores.append(s if mask_BTS is None else jnp.where(mask_BTS[:, None, None], s, -jnp.inf))
    # What is taken off every score changes nothing, so it needs no gradient.
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores]))
    weights = [jnp.exp(s - top) for s in scores]
    total_BKGT = functools.reduce(jnp.add, [w.sum(-1) for w in weights])
    mixed = [
        jnp.einsum("BKGTS,BKSH->BKGTH", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, sources, strict=True)
    ]
    mixed_BKGTH = functools.reduce(jnp.add, mixed)
    y_BTKGH = jnp.moveaxis(mixed_BKGTH / total_BKGT[..., None], 3, 1)
    return y_BTKGH.reshape(*y_BTKGH.shape[:2], -1).astype(q_BTKGH.dtype)


def self_attention(q_BTNH: jax.Array, k_BUNH: jax.Array, v_BUNH: jax.Array) -> jax.Array:
    """Causal attention of the last T of U steps to all before them, [B, T, N * H]; no window, no positions."""
    B, T, U = *q_BTNH.shape[:2], k_BUNH.shape[1]
    causal_BTU = jnp.broadcast_to(jnp.arange(U - T, U)[:, None] >= jnp.arange(U), (B, T, U))
    return _attend(q_BTNH[:, :, :, None], [(k_BUNH.swapaxes(1, 2), v_BUNH.swapaxes(1, 2), causal_BTU)])


def _write(cache: KVCache, k_BKUH: jax.Array, v_BKUH: jax.Array, slot_BU: jax.Array) -> KVCache:
    """Writes the chunk's keys and values; a slot out of range is not written."""
    # Every index but the last axis is spelt out: with a slice over heads XLA copies the whole cache (4.2 ms a layer
    # against 0.5 ms at the published width, one row, two CPU cores).
    B, K = k_BKUH.shape[:2]
    at = (jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], slot_BU[:, None])

    def put(ring: jax.Array, new: jax.Array) -> jax.Array:
        return ring.at[at].set(new.astype(ring.dtype), mode="drop")

    return KVCache(put(cache.k_BKSH, k_BKUH), put(cache.v_BKSH, v_BKUH))


def _finite(slot_BT: jax.Array, outside: int, *values: jax.Array) -> jax.Array:
    """The slots of rows whose values are all numbers, and `outside` for the others.

    A key that is not a number would count even where it is masked (0 * nan is nan), so its row would be lost for good,
    even after a reset.
    """
    finite = [jnp.isfinite(value).all(tuple(range(1, value.ndim))) for value in values]
    return jnp.where(functools.reduce(jnp.logical_and, finite)[:, None], slot_BT, outside)


class Attention(nnx.Module):
    """Self-attention over the last `context` steps. Queries, keys and values come from one packed projection."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        kv = config.num_kv_heads * config.head_dim
        init = nnx.initializers.lecun_normal()
        self.in_proj_DE = nnx.Param(init(rngs.params(), (config.d_model, config.d_model + 2 * kv)))
        self.out_proj_ED = nnx.Param(init(rngs.params(), (config.d_model, config.d_model)))

    def init_cache(self, batch_size: int) -> KVCache:
        """An empty ring of `context` slots, in the dtype of the weights."""
        c = self.config
        shape = (batch_size, c.num_kv_heads, c.context, c.head_dim)
        dtype = self.in_proj_DE.dtype
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def step(
        self, x_BTD: jax.Array, cache: KVCache | None, position_B: jax.Array, lengths_B: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs a chunk of at most `context` steps, or all of a clip: no cache means that nothing came before it."""
        c = self.config
        B, T, _ = x_BTD.shape
        S = c.context
        q, k, v = jnp.split(x_BTD @ self.in_proj_DE[...], [c.d_model, c.d_model + c.num_kv_heads * c.head_dim], axis=-1)
        q_BTNH = q.reshape(B, T, c.num_heads, c.head_dim)
        k_BUKH = k.reshape(B, T, c.num_kv_heads, c.head_dim)
        v_BKUH = v.reshape(B, T, c.num_kv_heads, c.head_dim).swapaxes(1, 2)
        position_BT = position_B[:, None] + jnp.arange(T)
        if c.positional_embedding in ("rope", "sin_rope"):
            q_BTNH = rope(q_BTNH, position_BT, c.max_period)
            k_BUKH = rope(k_BUKH, position_BT, c.max_period)
        k_BKUH = k_BUKH.swapaxes(1, 2)
        q_BTKGH = q_BTNH.reshape(B, T, c.num_kv_heads, c.kv_repeat, c.head_dim)
        slot_BT = position_BT % S
        step_taken_BT = None if lengths_B is None else taken_BT(lengths_B, T)
        if step_taken_BT is not None:
            slot_BT = jnp.where(step_taken_BT, slot_BT, S)  # out of range: nothing is written
        steps_T = jnp.arange(T)
        causal_BTU = jnp.broadcast_to(steps_T[:, None] >= steps_T, (B, T, T))

        if cache is None:
            near_TU = steps_T[:, None] - steps_T < S
            y_BTE = _attend(q_BTKGH, [(k_BKUH, v_BKUH, causal_BTU & near_TU)])
        elif T == 1:
            # The new key takes the place of the one that just left the window, so after the write the ring is the
            # window, and XLA updates the donated cache in place. An idle row of a fresh stream has no key at all; its
            # empty slot 0 keeps its softmax finite.
            cache = _write(cache, k_BKUH, v_BKUH, _finite(slot_BT, S, k_BKUH, v_BKUH))
            filled_BTS = jnp.arange(S) <= position_BT[..., None]
            y_BTE = _attend(q_BTKGH, [(cache.k_BKSH, cache.v_BKSH, filled_BTS)])
        else:
            # A longer chunk overwrites keys that its first steps still need, so it reads first. Slot s holds the last
            # position before the chunk that is s modulo S, or nothing while that is negative.
            held_BS = position_B[:, None] - 1 - (position_B[:, None] - 1 - jnp.arange(S)) % S
            seen_BTS = (held_BS >= 0)[:, None] & (position_BT[..., None] - held_BS[:, None] < S)
            y_BTE = _attend(q_BTKGH, [(cache.k_BKSH, cache.v_BKSH, seen_BTS), (k_BKUH, v_BKUH, causal_BTU)])
            # The write must depend on the read: XLA would copy the donated cache otherwise.
            kept_BTE = y_BTE if step_taken_BT is None else jnp.where(step_taken_BT[..., None], y_BTE, 0)
            cache = _write(cache, k_BKUH, v_BKUH, _finite(slot_BT, S, kept_BTE))
        return y_BTE @ self.out_proj_ED[...], cache


class CrossAttention(nnx.Module):
    """Attention to a fixed source, all of it; its keys and values are computed once per stream."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.lecun_normal()
        # Apart, as only queries are made in every step: XLA copies a slice of a matrix before it multiplies by it
        # (a step of the 1.6B model's backbone on two CPU cores: 177 ms, in place of 82 ms).
        self.q_proj_DE = nnx.Param(init(rngs.params(), (config.d_model, config.d_model)))
        self.kv_proj_DE = nnx.Param(init(rngs.params(), (config.d_model, 2 * config.d_model)))
        self.out_proj_ED = nnx.Param(init(rngs.params(), (config.d_model, config.d_model)))

    def keys_values(self, source_BXD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, N, X, H] of the source."""
        c = self.config
        kv = source_BXD @ self.kv_proj_DE[...]
        k_BXNH, v_BXNH = jnp.split(kv.reshape(*source_BXD.shape[:2], 2 * c.num_heads, c.head_dim), 2, axis=2)
        return k_BXNH.swapaxes(1, 2), v_BXNH.swapaxes(1, 2)

    def __call__(
        self, x_BTD: jax.Array, k_BNXH: jax.Array, v_BNXH: jax.Array, length_B: jax.Array | None = None
    ) -> jax.Array:
        """Attends from every step to the first `length_B` steps of the source; None for all of them."""
        c = self.config
        q_BTNGH = (x_BTD @ self.q_proj_DE[...]).reshape(*x_BTD.shape[:2], c.num_heads, 1, c.head_dim)
        mask_B1X = None
        if length_B is not None:
            # A row without a source attends to its first, empty step: its result means nothing, and stays finite.
            mask_B1X = taken_BT(jnp.maximum(length_B, 1), k_BNXH.shape[2])[:, None]
        return _attend(q_BTNGH, [(k_BNXH, v_BNXH, mask_B1X)]) @ self.out_proj_ED[...]
