"""SEANet's structure against the published file's listing. test_goldens.py compares its outputs with the reference.

Shape letters: B batch rows, T time steps, C channels.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.configs import SeanetConfig
from dsm_jax.nn.seanet import ResidualBlock, elu, seanet_decoder, seanet_encoder
from tests.helpers import small

LISTING = (Path(__file__).parent / "published/mimi.tensors.tsv").read_text().splitlines()


@pytest.mark.parametrize(("side", "make"), [("encoder", seanet_encoder), ("decoder", seanet_decoder)])
def test_the_published_seanet_has_the_published_number_of_parameters(side, make):
    rows = [line.split("\t") for line in LISTING if line.startswith(f"{side}.model.")]
    published = sum(math.prod(map(int, shape.split("x"))) for _, _, shape, *_ in rows)
    model = nnx.eval_shape(lambda: make(SeanetConfig(), rngs=nnx.Rngs(0)))
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == published
    assert published > 1_000_000


def test_the_published_seanet_has_a_hop_of_960_samples():
    def round_trip(x_BTC):
        latents_BTC = seanet_encoder(SeanetConfig(), rngs=nnx.Rngs(0))(x_BTC)
        return latents_BTC, seanet_decoder(SeanetConfig(), rngs=nnx.Rngs(0))(latents_BTC)

    latents_BTC, audio_BTC = jax.eval_shape(round_trip, jnp.zeros((1, 1920, 1)))
    assert (latents_BTC.shape, audio_BTC.shape) == ((1, 2, 512), (1, 1920, 1))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SeanetConfig(), [1, 1, 1, 1]),
        (SeanetConfig(n_filters=8), [4, 2, 1, 1]),
        (SeanetConfig(n_filters=8, ratios=(5, 5, 5, 4)), [4, 1, 1, 1]),  # 125 steps are no multiple of 2
        (SeanetConfig(n_filters=8, ratios=(8, 6, 2, 2)), [1, 1, 1, 1]),  # 192 steps are 48 groups of 4
        (small.MIMI.seanet, [1, 1]),
    ],
)
def test_narrow_blocks_convolve_in_groups_where_the_shortest_chunk_has_many(config, expected):
    def groups(make) -> list[int]:
        layers = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))).layers
        return [layer.wide.group for layer in layers if isinstance(layer, ResidualBlock)]

    assert groups(seanet_encoder) == expected
    assert groups(seanet_decoder) == expected[::-1]


def test_a_latent_does_not_depend_on_samples_after_its_hop():
    encoder = small.build(lambda rngs: seanet_encoder(small.MIMI.seanet, rngs=rngs))
    x_BTC = np.random.default_rng(0).normal(size=(1, 48, 1)).astype(np.float32)
    later_BTC = x_BTC.copy()
    later_BTC[:, 24:] += 1
    encode = jax.jit(encoder.__call__)
    one_BTC, other_BTC = encode(x_BTC), encode(later_BTC)
    np.testing.assert_array_equal(one_BTC[:, :3], other_BTC[:, :3])
    assert np.any(one_BTC[:, 3:] != other_BTC[:, 3:], axis=2).all()


def test_the_samples_of_a_latent_do_not_depend_on_later_latents():
    decoder = small.build(lambda rngs: seanet_decoder(small.MIMI.seanet, rngs=rngs))
    x_BTC = np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)
    later_BTC = x_BTC.copy()
    later_BTC[:, 3:] += 1
    decode = jax.jit(decoder.__call__)
    np.testing.assert_array_equal(decode(x_BTC)[:, :24], decode(later_BTC)[:, :24])


@pytest.mark.slow
def test_elu_and_its_derivative_match_the_formula_in_both_modes():
    x = jnp.array([-30.0, -2.0, -1e-3, 0.0, 1e-3, 0.5, 30.0])
    slope = jnp.where(x > 0, 1.0, jnp.exp(x))
    np.testing.assert_allclose(elu(x), jax.nn.elu(x), atol=1e-7)
    np.testing.assert_allclose(jax.vmap(jax.grad(elu))(x), slope, atol=1e-6)
    np.testing.assert_allclose(jax.jvp(elu, (x,), (jnp.full_like(x, 2.0),))[1], 2 * slope, atol=1e-6)
    assert elu(x.astype(jnp.bfloat16)).dtype == jax.vmap(jax.grad(elu))(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
