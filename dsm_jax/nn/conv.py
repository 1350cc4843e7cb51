"""Causal convolutions, forward and transposed, that run over a whole clip or one chunk at a time.

Shape letters: docs/axes.md; C is the channels in, O the channels out.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.errors import StreamError
from dsm_jax.nn.precision import full_precision
from dsm_jax.streaming import select_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvState:
    """The input steps that the next chunk needs, oldest first, and whether a row has had a chunk."""

    tail_BTC: jax.Array
    started_B: jax.Array


def _xla_convolve(x_BTC: jax.Array, kernel_RCO: jax.Array, stride: int, dilation: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BTC,
        kernel_RCO,
        window_strides=(stride,),
        padding="VALID",
        rhs_dilation=(dilation,),
        dimension_numbers=("NTC", "TIO", "NTC"),
    )


def _sum_over_taps(x_BTC: jax.Array, kernel_RCO: jax.Array, dilation: int) -> jax.Array:
    """Convolve from one channel as a sum over taps.

    XLA's convolution takes 2 to 9 times as long on two CPU cores: 5.0 against 0.6 ms for 64 rows of a frame to 8
    channels, 5.0 against 1.2 ms for 4 rows of 8 frames to Mimi's 64.
    """
    taps = kernel_RCO.shape[0]
    steps = x_BTC.shape[1] - (taps - 1) * dilation
    parts = [x_BTC[:, r * dilation :][:, :steps] * kernel_RCO[r] for r in range(taps)]
    return functools.reduce(jnp.add, parts)


def _convolve_in_groups(x_BTC: jax.Array, kernel_RCO: jax.Array, dilation: int, group: int) -> jax.Array:
    """Compute `group` output steps as the channels of one, with a kernel of the taps of each and zeros.

    From 8 channels to 4, XLA's convolution of 32 rows of a frame takes 1.6 ms on a CPU core, and 0.6 ms in groups of 4;
    from 16 to 8, that of 480 steps takes 0.47 ms, and 0.34 ms in groups of 2.
    """
    steps = x_BTC.shape[1] - (kernel_RCO.shape[0] - 1) * dilation
    apart_RCO = jax.lax.pad(kernel_RCO, jnp.zeros((), kernel_RCO.dtype), ((0, 0, dilation - 1), (0, 0, 0), (0, 0, 0)))
    shifted = [jnp.pad(apart_RCO, ((step, group - 1 - step), (0, 0), (0, 0))) for step in range(group)]
    y_BTU = _xla_convolve(x_BTC, jnp.concatenate(shifted, axis=2), group, 1)
    return y_BTU.reshape(y_BTU.shape[0], steps, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve_narrowly(x_BTC: jax.Array, kernel_RCO: jax.Array, dilation: int, group: int) -> jax.Array:
    """Convolve from one channel, or in groups, with the gradient of XLA's convolution.

    The gradient of a sum over taps keeps an array as large as the output for each tap, and takes 68 against 6 ms for
    two rows of a second. That of groups takes half of the time for 32 rows of a frame, twice the time for one row of 8.
    """
    if kernel_RCO.shape[1] == 1:
        return _sum_over_taps(x_BTC, kernel_RCO, dilation)
    return _convolve_in_groups(x_BTC, kernel_RCO, dilation, group)


@_convolve_narrowly.defjvp
@full_precision
def _(
    dilation: int, group: int, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    _, tangent_BTO = jax.jvp(lambda x_BTC, kernel_RCO: _xla_convolve(x_BTC, kernel_RCO, 1, dilation), primals, tangents)
    return _convolve_narrowly(*primals, dilation, group), tangent_BTO


def _convolve_to_samples(x_BTC: jax.Array, kernel_RCO: jax.Array, dilation: int) -> jax.Array:
    """Convolve to one channel as a product with all taps, and a sum over them.

    XLA's convolution takes 1.1 against 0.4 ms on two CPU cores for 8 frames of Mimi's 64 channels, and its gradient 5.5
    against 1.4 ms for two rows of a second.
    """
    taps = kernel_RCO.shape[0]
    steps = x_BTC.shape[1] - (taps - 1) * dilation
    x_BTR = x_BTC @ kernel_RCO[:, :, 0].T
    parts = [x_BTR[:, r * dilation :][:, :steps, r : r + 1] for r in range(taps)]
    return functools.reduce(jnp.add, parts)


@full_precision
def _convolve(x_BTC: jax.Array, kernel_RCO: jax.Array, stride: int = 1, dilation: int = 1, group: int = 1) -> jax.Array:
    _, channels_in, channels_out = kernel_RCO.shape
    if stride == 1 and channels_in > 1 and channels_out == 1:
        return _convolve_to_samples(x_BTC, kernel_RCO, dilation)
    if stride == 1 and (channels_in == 1 or group > 1):
        return _convolve_narrowly(x_BTC, kernel_RCO, dilation, group)
    return _xla_convolve(x_BTC, kernel_RCO, stride, dilation)


class _Tailed(nnx.Module):
    """Base class of convolutions: keeps the tail of the input between chunks, and runs a clip as one `step`."""

    channels: int
    tail: int  # input steps kept between chunks
    replicate: bool = False  # before the first chunk: repeat its first step, instead of zeros
    step: Callable[..., tuple[jax.Array, ConvState]]

    def init_state(self, batch_size: int, dtype: jnp.dtype = jnp.float32) -> ConvState:
        """Make the state of `batch_size` fresh streams."""
        return ConvState(jnp.zeros((batch_size, self.tail, self.channels), dtype), jnp.zeros((batch_size,), bool))

    def _extend(self, x_BTC: jax.Array, state: ConvState, lengths_B: jax.Array | None) -> tuple[jax.Array, ConvState]:
        """Prepend the tail to a chunk; return both, and the state after the steps that each row takes."""
        tail_BTC = state.tail_BTC
        if self.replicate:
            tail_BTC = jnp.where(state.started_B[:, None, None], tail_BTC, x_BTC[:, :1])
        seen_BTC = jnp.concatenate([tail_BTC, x_BTC], axis=1)
        if lengths_B is None:
            last_BTC = seen_BTC[:, seen_BTC.shape[1] - self.tail :]
            return seen_BTC, ConvState(last_BTC, jnp.ones_like(state.started_B))
        index_BT1 = (lengths_B[:, None] + jnp.arange(self.tail))[:, :, None]
        after = ConvState(jnp.take_along_axis(seen_BTC, index_BT1, axis=1), jnp.ones_like(state.started_B))
        return seen_BTC, select_rows(lengths_B > 0, after, state)

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        """Run one step over the whole clip."""
        return self.step(x_BTC, self.init_state(x_BTC.shape[0], x_BTC.dtype))[0]


class CausalConv1d(_Tailed):
    """1-D convolution whose output never looks ahead.

    The input is padded on the left by (taps - 1) * dilation + 1 - stride steps, as in kyutai-labs/moshi@e6a55d2
    moshi/modules/conv.py; there is no padding on the right.

    Args:
      group: output steps that a convolution of stride 1 computes at once, which is faster for few channels.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        group: int = 1,
        bias: bool = True,
        replicate: bool = False,
        rngs: nnx.Rngs,
    ):
        self.channels, self.stride, self.dilation, self.replicate = channels_in, stride, dilation, replicate
        self.group = group
        self.tail = (kernel - 1) * dilation + 1 - stride
        init = nnx.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        self.kernel_RCO = nnx.Param(init(rngs.params(), (kernel, channels_in, channels_out)))
        self.bias_O = nnx.Param(jnp.zeros((channels_out,))) if bias else None

    def step(
        self, x_BTC: jax.Array, state: ConvState, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, ConvState]:
        """Consume T steps, a multiple of the stride and of the group, and return T / stride steps.

        Raises:
          StreamError: T is not a positive multiple of the stride and of the group.
        """
        multiple = self.stride * self.group
        if x_BTC.shape[1] == 0 or x_BTC.shape[1] % multiple:
            raise StreamError(
                f"a convolution that takes {multiple} steps at a time got a chunk of {x_BTC.shape[1]}; "
                f"send a positive multiple of {multiple}, and pad the end of the clip if need be"
            )
        seen_BTC, state = self._extend(x_BTC, state, lengths_B)
        y_BTO = _convolve(seen_BTC, self.kernel_RCO[...], self.stride, self.dilation, self.group)
        return (y_BTO if self.bias_O is None else y_BTO + self.bias_O[...]), state


class CausalConvTranspose1d(_Tailed):
    """Transposed 1-D convolution with a kernel of R strides, truncated on the right so that it never looks ahead.

    Output step t * J + j is the sum over r of x[t - r] times the kernel's tap r * J + j: an ordinary causal convolution
    of R taps with U = J * O output channels, which are then laid out in time. The state is therefore the last R - 1
    input steps, and chunks have no overlap to add up.

    Source: kyutai-labs/moshi@e6a55d2 moshi/modules/conv.py:StreamingConvTranspose1d, which keeps partial outputs
    instead; the sums are the same.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int, bias: bool = True, rngs: nnx.Rngs):
        self.channels, self.stride, self.tail = channels_in, stride, 1
        init = nnx.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        self.kernel_RCU = nnx.Param(init(rngs.params(), (2, channels_in, stride * channels_out)))
        self.bias_O = nnx.Param(jnp.zeros((channels_out,))) if bias else None

    def step(
        self, x_BTC: jax.Array, state: ConvState, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, ConvState]:
        """Consume T steps and return T * stride steps."""
        seen_BTC, state = self._extend(x_BTC, state, lengths_B)
        y_BTU = _convolve(seen_BTC, self.kernel_RCU[...])
        y_BTO = y_BTU.reshape(y_BTU.shape[0], y_BTU.shape[1] * self.stride, -1)
        return (y_BTO if self.bias_O is None else y_BTO + self.bias_O[...]), state


class DepthwiseUpsample(_Tailed):
    """Mimi's upsampling: a depthwise transposed convolution with a kernel of two strides and no bias.

    Source: kyutai-labs/moshi@e6a55d2 moshi/modules/resample.py:ConvTrUpsample1d with `channel_wise`.
    """

    def __init__(self, channels: int, *, stride: int, rngs: nnx.Rngs):
        self.channels, self.stride, self.tail = channels, stride, 1
        self.kernel_RJC = nnx.Param(nnx.initializers.normal(0.5)(rngs.params(), (2, stride, channels)))

    def step(
        self, x_BTC: jax.Array, state: ConvState, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, ConvState]:
        """Consume T steps and return T * stride steps."""
        seen_BTC, state = self._extend(x_BTC, state, lengths_B)
        kernel_RJC = self.kernel_RJC[...]
        older_BTJC = seen_BTC[:, :-1, None] * kernel_RJC[0]
        y_BTJC = older_BTJC + seen_BTC[:, 1:, None] * kernel_RJC[1]
        return y_BTJC.reshape(y_BTJC.shape[0], -1, self.channels), state
