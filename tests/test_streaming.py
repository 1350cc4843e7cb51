"""Every streaming module keeps the contract: any cut, beyond the window, with idle and reset rows.

Shape letters: B batch rows, T time steps, C channels, M streams.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.configs import TransformerConfig
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import MimiDecoder, MimiEncoder
from dsm_jax.nn.conv import CausalConv1d, CausalConvTranspose1d, DepthwiseUpsample
from dsm_jax.nn.seanet import ResidualBlock, seanet_decoder, seanet_encoder
from dsm_jax.nn.transformer import Transformer
from dsm_jax.streaming import KVCache, place_rows, reset_rows, select_rows, step_in_blocks, taken_BT
from tests.helpers import small
from tests.helpers.check import check_streaming

ROUNDING = 2e-5  # float32 sums of values about 1, added up in another order


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 7},
        {"kernel": 1},
        {"kernel": 3, "dilation": 4, "bias": False},
        {"kernel": 8, "stride": 4},
        {"kernel": 5, "stride": 2, "dilation": 2},
        {"kernel": 4, "stride": 2, "bias": False, "replicate": True},
        {"kernel": 3, "dilation": 2, "replicate": True},
    ],
)
def test_convolutions_stream(options):
    conv = small.build(lambda rngs: CausalConv1d(3, 4, **options, rngs=rngs))
    block = options.get("stride", 1)
    check_streaming(conv, noise(2, 26 * block, 3), block=block, window=conv.tail, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: CausalConvTranspose1d(3, 4, stride=5, rngs=rngs),
        lambda rngs: CausalConvTranspose1d(3, 4, stride=2, bias=False, rngs=rngs),
        lambda rngs: DepthwiseUpsample(3, stride=2, rngs=rngs),
    ],
)
def test_transposed_convolutions_stream(make):
    check_streaming(small.build(make), noise(2, 17, 3), window=1, atol=ROUNDING)


@pytest.mark.slow
def test_seanet_streams():
    config = small.MIMI.seanet
    residual = small.build(lambda rngs: ResidualBlock(4, config, dilation=2, rngs=rngs))
    check_streaming(residual, noise(2, 17, 4), window=4, atol=ROUNDING)
    encoder = small.build(lambda rngs: seanet_encoder(config, rngs=rngs))
    check_streaming(encoder, noise(2, 17 * 8, 1), block=8, window=38, atol=ROUNDING, seeds=(0,))
    decoder = small.build(lambda rngs: seanet_decoder(config, rngs=rngs))
    check_streaming(decoder, noise(2, 24, 16), window=7, atol=ROUNDING, seeds=(0,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer_norm", "positional_embedding": "rope", "layer_scale": 0.3},
        {"norm": "rms_norm_f32", "positional_embedding": "sin", "gating": "silu", "kv_repeat": 2},
        {"norm": "layer_norm_f32", "positional_embedding": "sin_rope", "kv_repeat": 4},
        {"norm": "rms_norm", "positional_embedding": "none", "gating": "silu", "layer_scale": 0.3},
    ],
)
def test_transformers_stream_past_their_window(options):
    config = TransformerConfig(d_model=16, num_heads=4, num_layers=1, dim_feedforward=24, context=4, **options)
    # The longest chunk of the check lies between one and two windows.
    transformer = small.build(lambda rngs: Transformer(config, rngs=rngs))
    check_streaming(transformer, noise(2, 17, 16), window=4, atol=ROUNDING)


@dataclasses.dataclass
class Peeking:
    """A transformer that runs each chunk before it knows how many of its steps it takes."""

    transformer: Transformer

    def init_state(self, batch_size):
        return self.transformer.init_state(batch_size)

    def step(self, x_BTD, state, lengths_B=None):
        y_BTD, chunk = self.transformer.peek(x_BTD, state)
        lengths_B = jnp.full(x_BTD.shape[:1], x_BTD.shape[1]) if lengths_B is None else lengths_B
        return y_BTD, self.transformer.commit(state, chunk, lengths_B)

    def __call__(self, x_BTD):
        return self.transformer(x_BTD)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["rope", "sin"])
def test_steps_that_are_kept_after_they_ran_are_as_steps_that_are_taken(positions):
    config = TransformerConfig(
        d_model=16, num_heads=4, num_layers=2, dim_feedforward=24, context=5, positional_embedding=positions
    )
    transformer = small.build(lambda rngs: Transformer(config, rngs=rngs))
    check_streaming(Peeking(transformer), noise(2, 17, 16), window=5, atol=ROUNDING)


@pytest.mark.slow
def test_mimi_streams():
    frames, config = 17, small.MIMI
    window = config.transformer.context * config.seanet.hop
    samples = noise(2, frames * config.frame_size, 1)
    encoder = small.build(lambda rngs: MimiEncoder(config, rngs=rngs))
    decoder = small.build(lambda rngs: MimiDecoder(config, rngs=rngs))
    check_streaming(encoder, samples, block=config.frame_size, window=window, atol=ROUNDING, seeds=(0,))
    check_streaming(decoder, noise(2, frames, config.seanet.dimension), window=3, atol=ROUNDING, seeds=(0,))


@dataclasses.dataclass
class HiddenStates:
    """The language model with tokens [B, T, M], as the check needs time as the second axis."""

    lm: DelayedStreamsLM

    def init_state(self, batch_size):
        return self.lm.init_state(batch_size)

    def step(self, tokens_BTK, state, lengths_B=None):
        return self.lm.step(tokens_BTK.swapaxes(1, 2), state, lengths_B)

    def __call__(self, tokens_BTK):
        return self.step(tokens_BTK, self.init_state(tokens_BTK.shape[0]))[0]


@pytest.mark.slow
def test_the_language_model_streams():
    lm = small.build(lambda rngs: DelayedStreamsLM(small.STT, rngs=rngs))
    tokens_BTK = np.random.default_rng(0).integers(-1, 12, size=(2, 17, 4)).astype(np.int32)
    check_streaming(HiddenStates(lm), tokens_BTK, window=small.STT.context, atol=ROUNDING)


@pytest.mark.slow
def test_a_reset_takes_the_rows_of_the_fresh_state_and_leaves_caches_alone():
    state = small.build(lambda rngs: MimiEncoder(small.MIMI, rngs=rngs)).init_state(3)
    used = jax.tree.map(np.ones_like, state)
    reset = reset_rows(used, jnp.array([False, True, False]), state)
    assert all(np.all(cache.k_BKSH) and np.all(cache.v_BKSH) for cache in reset.transformer.caches)
    assert reset.transformer.position_B.tolist() == [1, 0, 1]
    assert np.array(reset.resample.tail_BTC).any(axis=(1, 2)).tolist() == [True, False, True]


def test_a_fresh_row_need_not_be_zeros():
    reset = reset_rows({"left_B": jnp.array([5, 6])}, jnp.array([True, False]), {"left_B": jnp.array([-1, -1])})
    assert reset["left_B"].tolist() == [-1, 6]


def test_rows_are_placed_in_slots_at_the_start_of_their_caches():
    cache = KVCache(jnp.zeros((3, 1, 5, 1)), jnp.ones((3, 1, 5, 1)))
    rows = KVCache(jnp.full((2, 1, 2, 1), 7.0), jnp.full((2, 1, 2, 1), 8.0))
    state = (cache, jnp.array([4, 5, 6]))
    placed, position_B = place_rows(state, jnp.array([2, 0]), (rows, jnp.array([1, 2])))
    assert position_B.tolist() == [2, 5, 1]
    assert placed.k_BKSH[:, 0, :, 0].tolist() == [[7, 7, 0, 0, 0], [0] * 5, [7, 7, 0, 0, 0]]
    assert placed.v_BKSH[:, 0, :, 0].tolist() == [[8, 8, 1, 1, 1], [1] * 5, [8, 8, 1, 1, 1]]


def test_select_rows_takes_active_rows_and_whole_caches():
    old = {"cache": KVCache(jnp.zeros((2, 1)), jnp.zeros((2, 1))), "tail_BT": jnp.zeros((2, 3))}
    new = jax.tree.map(lambda a: a + 1, old)
    picked = select_rows(jnp.array([True, False]), new, old)
    assert picked["tail_BT"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert picked["cache"].k_BKSH.tolist() == [[1], [1]]
    assert select_rows(None, new, old) is new


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 9, 11])
def test_step_in_blocks_gives_no_longer_block_than_its_limit(length):
    lengths = []

    def running_sum(x, total, lengths_B):
        lengths.append(x["a"].shape[1])
        a_BT = x["a"] if lengths_B is None else jnp.where(taken_BT(lengths_B, x["a"].shape[1]), x["a"], 0)
        sums = total[:, None] + jnp.cumsum(a_BT, axis=1)
        return {"y": sums}, sums[:, -1]

    x = {"a": jnp.arange(2 * length).reshape(2, length)}
    y, total = step_in_blocks(running_sum, x, jnp.array([5, 7]), None, block=3)
    np.testing.assert_array_equal(y["y"], np.cumsum(x["a"], axis=1) + np.array([[5], [7]]))
    np.testing.assert_array_equal(total, y["y"][:, -1])
    ragged_B = np.array([length // 2, length])
    _, total = step_in_blocks(running_sum, x, jnp.array([5, 7]), jnp.asarray(ragged_B), block=3)
    assert total.tolist() == [5 + int(x["a"][0, : ragged_B[0]].sum()), 7 + int(x["a"][1].sum())]
    assert max(lengths) <= 3
