"""Norms, feed-forwards and the stack: formulas in numpy, memory, gradients, and a difference from the reference.

Shape letters: B batch rows, T steps, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.configs import TransformerConfig
from dsm_jax.nn.norms import LayerNorm, RMSNorm, make_norm
from dsm_jax.nn.transformer import FeedForward, GatedFeedForward, Transformer
from tests.goldens import compare
from tests.helpers import small
from tests.helpers.check import check_in_place


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "kind", "epsilon"),
    [
        ("layer_norm", LayerNorm, 1e-5),
        ("layer_norm_f32", LayerNorm, 1e-8),
        ("rms_norm", RMSNorm, 1e-5),
        ("rms_norm_f32", RMSNorm, 1e-8),
    ],
)
def test_each_norm_matches_its_formula_and_epsilon(name, kind, epsilon):
    norm = make_norm(name, 6)
    assert isinstance(norm, kind)
    x_BTD = noise(2, 3, 6) * 1e-3  # so small that the epsilon matters
    scale_D, bias_D = noise(2, 6)
    if kind is LayerNorm:
        norm.scale_D[...], norm.bias_D[...] = jnp.asarray(scale_D), jnp.asarray(bias_D)
        wanted = scale_D * (x_BTD - x_BTD.mean(-1, keepdims=True)) / np.sqrt(x_BTD.var(-1, keepdims=True) + epsilon)
        wanted = wanted + bias_D
    else:
        norm.alpha_D[...] = jnp.asarray(scale_D)
        wanted = scale_D * x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + epsilon)
    np.testing.assert_allclose(norm(jnp.asarray(x_BTD)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm_f32"])
def test_norms_are_computed_in_float32(name):
    # In bfloat16 the mean square of 4096 equal values is off by far more than one rounding of the result.
    norm = jax.tree.map(lambda a: a.astype(jnp.bfloat16), make_norm(name, 4096))
    x_BTD = jnp.asarray(noise(1, 2, 4096)).astype(jnp.bfloat16)
    y_BTD = norm(x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    in_32 = make_norm(name, 4096)(x_BTD.astype(jnp.float32))
    np.testing.assert_array_equal(y_BTD, in_32.astype(jnp.bfloat16))


@pytest.mark.slow
def test_feed_forwards_match_their_formulas():
    x_BTD = noise(2, 3, 6)
    plain = small.build(lambda rngs: FeedForward(6, 8, rngs=rngs))
    gated = small.build(lambda rngs: GatedFeedForward(6, 8, rngs=rngs))
    inner = x_BTD @ np.array(plain.linear1.weight[...]).T
    erf = np.array(jax.scipy.special.erf(inner / np.sqrt(2, dtype=np.float32)))
    wanted = 0.5 * inner * (1 + erf) @ np.array(plain.linear2.weight[...]).T
    np.testing.assert_allclose(plain(jnp.asarray(x_BTD)), wanted, atol=1e-5)
    a, b = (x_BTD @ part.T for part in np.array(gated.linear_in.weight[...]))
    np.testing.assert_allclose(
        gated(jnp.asarray(x_BTD)), a / (1 + np.exp(-a)) * b @ np.array(gated.linear_out.weight[...]).T, atol=1e-5
    )


@pytest.mark.parametrize(
    ("feedforward", "inner"), [(64, 42), (66, 44), (60, 40)], ids=["four widths", "as published", "any other"]
)
def test_the_gated_inner_width_follows_the_reference(feedforward, inner):
    config = TransformerConfig(
        d_model=16, num_heads=2, num_layers=1, dim_feedforward=feedforward, context=4, gating="silu"
    )
    layer = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))).layers[0]
    assert layer.feedforward.linear_in.weight.shape == (2, inner, 16)


@pytest.mark.slow
def test_a_chunk_sees_what_single_steps_see_where_the_reference_loses_keys():
    config, arrays = compare.read("transformer_mimi")
    transformer = compare.filled_transformer(config, arrays)
    step, state, ys = jax.jit(transformer.step), transformer.init_state(2), []
    for t in range(0, arrays["in.x"].shape[1], 2):
        y, state = step(arrays["in.x"][:, t : t + 2], state)
        ys.append(y)
    compare.expect("pairs", np.concatenate(ys, axis=1), arrays["out.offline"])
    lost_T = np.abs(arrays["out.pairs"] - arrays["out.offline"]).max(axis=(0, 2)) > 1e-3
    assert lost_T.tolist() == [t >= config["context"] - 1 for t in range(len(lost_T))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", [1, 4, small.STT.context, small.STT.context + 1, 3 * small.STT.context, 3 * small.STT.context + 1]
)
def test_init_clip_makes_no_caches_for_short_clips(steps):
    model = small.build(lambda rngs: Transformer(small.STT.transformer, rngs=rngs))
    x_BTD = jnp.asarray(noise(2, steps, 16))
    clip = model.init_clip(2, steps)
    assert (None in clip.caches) == (steps <= 3 * small.STT.context)
    y_BTD, after = model.step(x_BTD, clip)
    expected_BTD, expected = model.step(x_BTD, model.init_state(2))
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=0, atol=1e-5)  # summed in another order
    np.testing.assert_array_equal(after.position_B, expected.position_B)


@pytest.mark.slow
def test_gradients_pass_through_windows():
    config = TransformerConfig(d_model=8, num_heads=2, num_layers=1, dim_feedforward=12, context=4, layer_scale=0.1)
    graphdef, params = nnx.split(small.build(lambda rngs: Transformer(config, rngs=rngs)))
    x_BTD = jnp.asarray(noise(1, 10, 8))

    def last(params, x_BTD):
        return jnp.sum(nnx.merge(graphdef, params)(x_BTD)[:, -1] ** 2)

    of_params, of_x_BTD = jax.jit(jax.grad(last, argnums=(0, 1)))(params, x_BTD)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(of_params))
    assert np.any(of_x_BTD, axis=(0, 2)).tolist() == [False] * 6 + [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_updates_its_caches_in_place(steps):
    config = TransformerConfig(d_model=16, num_heads=4, num_layers=2, dim_feedforward=24, context=8192)
    transformer = small.build(lambda rngs: Transformer(config, rngs=rngs))
    lengths_B = jnp.array([steps, 0])
    check_in_place(
        lambda x_BTD, state: transformer.step(x_BTD, state, lengths_B),
        jnp.zeros((2, steps, 16)),
        transformer.init_state(2),
    )


@pytest.mark.slow
def test_keeping_steps_that_ran_updates_the_caches_in_place():
    config = TransformerConfig(d_model=16, num_heads=4, num_layers=2, dim_feedforward=24, context=8192)
    transformer = small.build(lambda rngs: Transformer(config, rngs=rngs))

    def step(x_BTD, state):
        y_BTD, chunk = transformer.peek(x_BTD, state)
        return y_BTD, transformer.commit(state, chunk, (y_BTD[:, 0] > 0).sum(axis=1) % 4)

    check_in_place(step, jnp.zeros((2, 3, 16)), transformer.init_state(2))


@pytest.mark.slow
def test_a_prefill_gives_each_rows_last_output_and_runs_the_last_feed_forward_for_it_alone():
    config = TransformerConfig(d_model=16, num_heads=4, num_layers=2, dim_feedforward=24, context=8)
    transformer = small.build(lambda rngs: Transformer(config, rngs=rngs))
    x_BTD, lengths_B = jnp.asarray(noise(3, 7, 16)), jnp.array([7, 1, 0])
    _, state = transformer.step(x_BTD[:, :5], transformer.init_state(3), jnp.array([5, 2, 0]))
    compiled = [
        jax.jit(run).lower(x_BTD, state, lengths_B).compile() for run in (transformer.step, transformer.prefill)
    ]
    (wanted_BTD, wanted), (last_BD, after) = (run(x_BTD, state, lengths_B) for run in compiled)
    np.testing.assert_allclose(last_BD[:2], jnp.stack([wanted_BTD[0, 6], wanted_BTD[1, 0]]), rtol=0, atol=1e-5)
    for found, expected in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(found, expected)
    saved = np.subtract(*(run.cost_analysis()["flops"] for run in compiled))
    assert saved >= 2 * 3 * 6 * 2 * 16 * 24  # two products of the six other steps of three rows
