"""Convolutions against sums in numpy. test_streaming.py checks that they stream.

Shape letters: B batch rows, T time steps, C channels in, D channels out, K taps, S stride, M taps per output phase.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.errors import StreamError
from dsm_jax.nn.conv import CausalConv1d, CausalConvTranspose1d, DepthwiseUpsample


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@settings(max_examples=24, deadline=None)
@given(
    channels=st.sampled_from([(2, 3), (1, 3), (2, 1), (1, 1)]),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    replicate=st.booleans(),
    steps=st.integers(1, 4),
    group=st.integers(1, 4),
)
def test_a_convolution_is_a_sum_over_the_past(channels, kernel, stride, dilation, replicate, steps, group):
    reach = (kernel - 1) * dilation
    stride = min(stride, reach + 1)  # a kernel shorter than its stride would skip input
    group = group if stride == 1 else 1
    steps *= group
    channels_in, channels_out = channels
    options = {"kernel": kernel, "stride": stride, "dilation": dilation, "replicate": replicate, "group": group}
    conv = CausalConv1d(channels_in, channels_out, **options, rngs=nnx.Rngs(kernel))
    bias_D = np.arange(1.0, 1 + channels_out)
    conv.bias_O[...] = jnp.array(bias_D)
    x_BTC = noise(2, steps * stride, channels_in)
    y_BTD = np.array(conv(x_BTC))
    first_BC = x_BTC[:, 0] if replicate else np.zeros((2, channels_in), np.float32)
    for t in range(steps):
        now = t * stride + stride - 1  # an output step comes with the last input step of its stride
        wanted_BD = bias_D
        for k in range(kernel):
            at = now - reach + k * dilation
            wanted_BD = wanted_BD + (x_BTC[:, at] if at >= 0 else first_BC) @ np.array(conv.kernel_RCO[k])
        np.testing.assert_allclose(y_BTD[:, t], wanted_BD, rtol=1e-5, atol=1e-5)
    assert y_BTD.shape == (2, steps, channels_out)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("channels", [(2, 3), (1, 3), (3, 1), (1, 1)])
def test_the_gradient_of_a_convolution_is_the_gradient_of_a_sum_over_the_past(channels, group):
    channels_in, channels_out = channels
    conv = CausalConv1d(channels_in, channels_out, kernel=3, dilation=2, group=group, rngs=nnx.Rngs(0))
    kernel_KCD, x_BTC, weight_BTD = conv.kernel_RCO[...], noise(2, 6, channels_in), noise(2, 6, channels_out)

    def loss(kernel_KCD, x_BTC):
        changed = nnx.clone(conv)
        changed.kernel_RCO[...] = kernel_KCD
        return jnp.sum(changed(x_BTC) * weight_BTD)

    kernel_gradient, x_gradient = jax.grad(loss, argnums=(0, 1))(kernel_KCD, jnp.array(x_BTC))
    padded = np.concatenate([np.zeros((2, 4, channels_in)), x_BTC], axis=1)
    by_kernel = [np.einsum("btc,btd->cd", padded[:, 2 * k : 2 * k + 6], weight_BTD) for k in range(3)]
    by_x = sum(
        np.pad(weight_BTD @ np.array(kernel_KCD[k]).T, [(0, 0), (2 * k, 4 - 2 * k), (0, 0)])[:, 4:] for k in range(3)
    )
    np.testing.assert_allclose(kernel_gradient, np.stack(by_kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_gradient, by_x, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_convolution_from_samples_keeps_no_array_for_each_tap():
    conv = CausalConv1d(1, 64, kernel=7, rngs=nnx.Rngs(0))
    x_BTC = jnp.array(noise(2, 24000, 1))

    def loss(kernel_KCD):
        changed = nnx.clone(conv)
        changed.kernel_RCO[...] = kernel_KCD
        return jnp.sum(nnx.elu(changed(x_BTC)) ** 2)

    memory = jax.jit(jax.grad(loss)).lower(conv.kernel_RCO[...]).compile().memory_analysis()
    output_bytes = 2 * 24000 * 64 * 4
    assert memory.temp_size_in_bytes < 3 * output_bytes  # 8 times for the gradient of a sum over taps


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_a_transposed_convolution_adds_every_input_to_two_strides_of_output(stride):
    conv = CausalConvTranspose1d(3, 2, stride=stride, rngs=nnx.Rngs(0))
    conv.bias_O[...] = jnp.array([1.0, 2.0])
    x_BTC = noise(2, 4, 3)
    taps_MCSD = np.array(conv.kernel_RCU[...]).reshape(2, 3, stride, 2)[::-1]  # stored oldest input first
    wanted_BTD = np.full((2, 5 * stride, 2), [1.0, 2.0])
    for t in range(4):
        for m in range(2):
            wanted_BTD[:, (t + m) * stride : (t + m + 1) * stride] += np.einsum(
                "bc,csd->bsd", x_BTC[:, t], taps_MCSD[m]
            )
    np.testing.assert_allclose(conv(x_BTC), wanted_BTD[:, : 4 * stride], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_depthwise_upsample_is_a_transposed_convolution_with_a_diagonal_kernel():
    upsample = DepthwiseUpsample(3, stride=2, rngs=nnx.Rngs(0))
    full = CausalConvTranspose1d(3, 3, stride=2, bias=False, rngs=nnx.Rngs(0))
    diagonal = jnp.einsum("MSC,CD->MCSD", upsample.kernel_RJC[...], jnp.eye(3))
    full.kernel_RCU[...] = diagonal.reshape(2, 3, 6)
    x_BTC = noise(2, 5, 3)
    np.testing.assert_allclose(upsample(x_BTC), full(x_BTC), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("options", [{"stride": 4}, {"group": 4}])
def test_a_chunk_must_be_a_positive_multiple_of_the_stride_and_of_the_group(options, steps):
    conv = CausalConv1d(3, 4, kernel=8, **options, rngs=nnx.Rngs(0))
    message = f"a convolution that takes 4 steps at a time got a chunk of {steps}; send a positive multiple of 4, and"
    with pytest.raises(StreamError, match=re.escape(message)):
        conv(noise(1, steps, 3))


def test_init_state_makes_a_convolutions_state_in_the_given_dtype():
    conv = CausalConv1d(3, 4, kernel=4, rngs=nnx.Rngs(0))
    assert conv.init_state(2, jnp.bfloat16).tail_BTC.dtype == jnp.bfloat16
    assert conv.init_state(2).tail_BTC.shape == (2, 3, 3)
