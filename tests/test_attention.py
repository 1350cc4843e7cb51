"""Attention and position encodings against their formulas in numpy.

Shape letters: B batch rows, T steps, D model width, N query heads, K key/value heads, H head width, X source steps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.configs import RopeScaling, TransformerConfig
from dsm_jax.nn.attention import Attention, CrossAttention, rope, rope_rates, self_attention, sinusoids
from dsm_jax.nn.transformer import Transformer
from dsm_jax.streaming import reset_rows
from tests.helpers import small

CONFIG = TransformerConfig(d_model=16, num_heads=4, num_layers=1, dim_feedforward=24, context=5, kv_repeat=2)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def softmax_attention(q_TH: np.ndarray, k_XH: np.ndarray, v_XH: np.ndarray, seen_TX: np.ndarray) -> np.ndarray:
    score_TX = np.where(seen_TX, q_TH @ k_XH.T / np.sqrt(q_TH.shape[1]), -np.inf)
    weight_TX = np.exp(score_TX - score_TX.max(1, keepdims=True))
    return weight_TX / weight_TX.sum(1, keepdims=True) @ v_XH


def test_rope_multiplies_complex_numbers():
    x_BTNH, position_BT = noise(2, 3, 4, 6), np.array([[0, 1, 2], [700, 701, 702]])
    z = x_BTNH[..., 0::2] + 1j * x_BTNH[..., 1::2]
    angle = position_BT[..., None, None] * 100.0 ** (-2 * np.arange(3) / 6)
    z = z * np.exp(1j * angle)
    found = np.array(rope(jnp.asarray(x_BTNH), jnp.asarray(position_BT), 100.0))
    np.testing.assert_allclose(found[..., 0::2], z.real, atol=2e-4)  # the angle, up to 700, is itself rounded
    np.testing.assert_allclose(found[..., 1::2], z.imag, atol=2e-4)
    np.testing.assert_array_equal(found[0, 0], x_BTNH[0, 0])


def test_rope_computes_in_float32_for_inputs_of_any_dtype():
    # At position 2001, bfloat16 has multiples of 8 only.
    x_BTNH, position_BT = jnp.ones((1, 1, 1, 2), jnp.bfloat16), jnp.array([[2001]])
    y = np.array(rope(x_BTNH, position_BT, 10_000.0), np.float32).ravel()
    wanted = [np.cos(2001) - np.sin(2001), np.sin(2001) + np.cos(2001)]
    np.testing.assert_allclose(y, wanted, atol=0.01)


def test_scaled_rates_keep_fast_pairs_and_divide_slow_ones():
    scaling = RopeScaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_context=64)
    rates = np.asarray(rope_rates(16, 10_000.0), np.float64)
    turns = 64 * rates / (2 * np.pi)  # in the original context
    fast, slow = turns > 4, turns < 1
    assert min(fast.sum(), slow.sum(), (~fast & ~slow).sum()) > 1
    between = (turns - 1) / 3
    wanted = np.where(fast, rates, np.where(slow, rates / 8, between * rates + (1 - between) * rates / 8))
    np.testing.assert_allclose(rope_rates(16, 10_000.0, scaling), wanted, rtol=1e-5)


def test_sinusoids_are_cosines_then_sines():
    position_BT = np.array([[0, 3], [5, 1000]])
    rate = 10_000.0 ** (np.arange(4) / 3)  # 3, not 4: the slowest turns once in max_period * 2 pi
    angle = position_BT[..., None] / rate
    wanted = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    np.testing.assert_allclose(sinusoids(jnp.asarray(position_BT), 8, 10_000.0), wanted, atol=2e-4)


@pytest.mark.slow
def test_self_attention_is_causal_softmax_attention():
    q, k, v = noise(3, 2, 6, 2, 4)
    y_BTKH = np.array(self_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)))
    for b in range(2):
        for n in range(2):
            wanted = softmax_attention(q[b, :, n], k[b, :, n], v[b, :, n], np.tri(6, dtype=bool))
            np.testing.assert_allclose(y_BTKH[b, :, n], wanted, atol=1e-5)
    last_BTKH = self_attention(jnp.asarray(q[:, 4:]), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(last_BTKH, y_BTKH[:, 4:], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_attention_sees_its_window_and_query_heads_share_keys(chunk):
    config = dataclasses.replace(CONFIG, positional_embedding="none")
    attention = small.build(lambda rngs: Attention(config, rngs=rngs))
    x_BTD = noise(2, 20, 16)
    cache, ys, step = attention.init_cache(2), [], jax.jit(attention.step)
    for t in range(0, 20, chunk):
        y, cache = step(jnp.asarray(x_BTD[:, t : t + chunk]), cache, jnp.full((2,), t), None)
        ys.append(y)
    parts_BTPKH = np.einsum("BTD,PKHD->BTPKH", x_BTD, np.array(attention.in_proj.weight[...]))
    k_BTKH, v_BTKH = parts_BTPKH[:, :, 2], parts_BTPKH[:, :, 3]
    delta = np.arange(20)[:, None] - np.arange(20)
    seen = (delta >= 0) & (delta < config.context)
    heads = [
        np.stack([softmax_attention(parts_BTPKH[b, :, g, k], k_BTKH[b, :, k], v_BTKH[b, :, k], seen) for b in (0, 1)])
        for k in range(2)
        for g in range(2)
    ]
    wanted = np.concatenate(heads, axis=2) @ np.array(attention.out_proj.weight[...]).reshape(16, 16).T
    np.testing.assert_allclose(np.concatenate(ys, axis=1), wanted, atol=1e-5)


@pytest.mark.slow
def test_cross_attention_sees_all_of_its_source_from_every_step():
    cross = small.build(lambda rngs: CrossAttention(dataclasses.replace(CONFIG, kv_repeat=1), rngs=rngs))
    x_BTD, source_BXD = noise(2, 3, 16), noise(2, 7, 16) + 1
    weights_KHD = np.array(cross.q_proj.weight[...]), *np.array(cross.kv_proj.weight[...])
    inputs = x_BTD, source_BXD, source_BXD
    q, k, v = (np.einsum("BTD,KHD->BTKH", x, w_KHD) for x, w_KHD in zip(inputs, weights_KHD, strict=True))
    heads = [
        np.stack([softmax_attention(q[b, :, n], k[b, :, n], v[b, :, n], np.ones((3, 7), bool)) for b in (0, 1)])
        for n in range(4)
    ]
    found = cross(jnp.asarray(x_BTD), *cross.keys_values(jnp.asarray(source_BXD)))
    wanted = np.concatenate(heads, axis=2) @ np.array(cross.out_proj.weight[...]).reshape(16, 16).T
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
def test_the_softmax_sums_in_float32():
    # 1000 equal weights times values of 1: a sum kept in bfloat16 stops growing at 256 of them.
    config = dataclasses.replace(CONFIG, context=1000, kv_repeat=1, positional_embedding="none")
    attention = small.build(lambda rngs: Attention(config, dtype=jnp.bfloat16, rngs=rngs))
    attention.in_proj.weight[...] = jnp.zeros((3, 4, 4, 16)).at[2].set(1 / 16)
    attention.out_proj.weight[...] = jnp.eye(16).reshape(16, 4, 1, 4)
    cache = attention.init_cache(1)
    assert cache.k_BKSH.dtype == jnp.bfloat16
    cache = dataclasses.replace(cache, v_BKSH=jnp.ones_like(cache.v_BKSH))
    y, _ = jax.jit(attention.step)(jnp.ones((1, 2, 16), jnp.bfloat16), cache, jnp.array([1000]), None)
    np.testing.assert_array_equal(np.array(y, np.float32), 1)


@pytest.mark.slow
@pytest.mark.parametrize("part", [2, 3], ids=["keys", "values"])
def test_what_overflows_is_not_cached(part):
    config = dataclasses.replace(CONFIG, positional_embedding="none")
    attention = small.build(lambda rngs: Attention(config, rngs=rngs))
    attention.in_proj.weight[...] = attention.in_proj.weight[...].at[part].mul(1e38)
    x_BTD, start_B = 1e3 * jnp.asarray(noise(1, 1, 16)), jnp.zeros((1,), jnp.int32)
    _, cache = jax.jit(attention.step)(x_BTD, attention.init_cache(1), start_B, None)
    assert np.isfinite(cache.k_BKSH).all()
    assert np.isfinite(cache.v_BKSH).all()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_a_nan_in_the_cache_does_not_outlive_a_reset(steps):
    transformer = small.build(lambda rngs: Transformer(dataclasses.replace(CONFIG, num_layers=2), rngs=rngs))
    step, fresh = jax.jit(transformer.step), transformer.init_state(2)
    x_BTD = jnp.asarray(noise(2, steps, 16))
    _, bad = step(x_BTD.at[0, 0, 0].set(jnp.nan), fresh)
    _, good = step(x_BTD, fresh)
    y_BTD, _ = step(x_BTD, reset_rows(bad, jnp.array([True, False]), fresh))
    fresh_BTD, _ = step(x_BTD, fresh)
    went_on_BTD, _ = step(x_BTD, good)
    np.testing.assert_array_equal(y_BTD[0], fresh_BTD[0])
    np.testing.assert_array_equal(y_BTD[1], went_on_BTD[1])
