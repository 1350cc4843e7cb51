"""SEANet, the convolutional encoder and decoder of Mimi, between samples and latents at the hop rate.

Shape letters: B batch rows, T time steps, C channels, D latent width.
Source: Moshi (Défossez et al. 2024), section 3.3; kyutai-labs/moshi@e6a55d2 moshi/modules/seanet.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import SeanetConfig
from dsm_jax.nn.conv import CausalConv1d, CausalConvTranspose1d
from dsm_jax.streaming import scaled_lengths


@jax.custom_jvp
def elu(x: jax.Array) -> jax.Array:
    """Compute ELU as exp(x) - 1, in half the time of `jax.nn.elu`.

    Its expm1 is exact to more digits near 0 than float32 keeps of the sums that follow.
    """
    return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0.0)) - 1.0)


@elu.defjvp
def _elu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The slope follows from the output, which is kept for the next layer anyway: a training step of the codec takes
    # 0.84 of the time that it takes with the slope from the input.
    y = elu(*primals)
    return y, tangents[0] * jnp.minimum(y + 1.0, 1.0)


class Chain(nnx.Module):
    """A chain of streaming modules, with an ELU before each but the first."""

    def __init__(self, layers: list[Any]):
        self.layers = nnx.List(layers)

    def init_state(self, batch_size: int) -> tuple:
        """Make the state of `batch_size` fresh streams: one entry per layer."""
        return tuple(layer.init_state(batch_size) for layer in self.layers)

    def step(self, x_BTC: jax.Array, state: tuple, lengths_B: jax.Array | None = None) -> tuple[jax.Array, tuple]:
        """Run one chunk through every layer."""
        states = []
        for i, (layer, before) in enumerate(zip(self.layers, state, strict=True)):
            # A residual block has its own first activation, on the residual branch only.
            x_in = x_BTC if i == 0 or isinstance(layer, ResidualBlock) else elu(x_BTC)
            y_BTC, after = layer.step(x_in, before, lengths_B)
            lengths_B = scaled_lengths(lengths_B, x_BTC.shape[1], y_BTC.shape[1])
            x_BTC = y_BTC
            states.append(after)
        return x_BTC, tuple(states)

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        """Run one step over the whole clip."""
        return self.step(x_BTC, self.init_state(x_BTC.shape[0]))[0]


class ResidualBlock(nnx.Module):
    """x + narrow(elu(wide(elu(x)))), where `wide` has the config's residual kernel and `narrow` a kernel of 1.

    Args:
      channels: of input and output.
      config: of the network.
      dilation: of `wide`.
      steps: steps of the shortest chunk; the length of every chunk is a multiple of it.
      rngs: for the parameters.
    """

    def __init__(self, channels: int, config: SeanetConfig, *, dilation: int, steps: int = 1, rngs: nnx.Rngs):
        hidden, kernel = channels // config.compress, config.residual_kernel_size
        # Ask for many groups: XLA on a CPU rounds few by the length of the chunk, which may change codes.
        group = max(1, 32 // channels)
        if steps % group or steps < 64 * group:
            group = 1
        self.wide = CausalConv1d(channels, hidden, kernel=kernel, dilation=dilation, group=group, rngs=rngs)
        self.narrow = CausalConv1d(hidden, channels, kernel=1, rngs=rngs)

    def init_state(self, batch_size: int) -> tuple:
        """Make the state of `batch_size` fresh streams."""
        return self.wide.init_state(batch_size), self.narrow.init_state(batch_size)

    def step(self, x_BTC: jax.Array, state: tuple, lengths_B: jax.Array | None = None) -> tuple[jax.Array, tuple]:
        """Run one chunk."""
        y_BTC, wide = self.wide.step(elu(x_BTC), state[0], lengths_B)
        y_BTC, narrow = self.narrow.step(elu(y_BTC), state[1], lengths_B)
        return x_BTC + y_BTC, (wide, narrow)

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        """Run one step over the whole clip."""
        return self.step(x_BTC, self.init_state(x_BTC.shape[0]))[0]


def _residuals(channels: int, config: SeanetConfig, steps: int, rngs: nnx.Rngs) -> list[Any]:
    return [
        ResidualBlock(channels, config, dilation=config.dilation_base**j, steps=steps, rngs=rngs)
        for j in range(config.n_residual_layers)
    ]


def seanet_encoder(config: SeanetConfig, *, rngs: nnx.Rngs) -> Chain:
    """Make the encoder: samples [B, T, channels] to latents [B, T / hop, dimension]."""
    width, steps = config.n_filters, math.prod(config.ratios)
    layers: list[Any] = [CausalConv1d(config.channels, width, kernel=config.kernel_size, rngs=rngs)]
    for ratio in reversed(config.ratios):
        layers += _residuals(width, config, steps, rngs)
        layers.append(CausalConv1d(width, 2 * width, kernel=2 * ratio, stride=ratio, rngs=rngs))
        width, steps = 2 * width, steps // ratio
    layers.append(CausalConv1d(width, config.dimension, kernel=config.last_kernel_size, rngs=rngs))
    return Chain(layers)


def seanet_decoder(config: SeanetConfig, *, rngs: nnx.Rngs) -> Chain:
    """Make the decoder: latents [B, T, dimension] to samples [B, T * hop, channels]."""
    width, steps = config.n_filters * 2 ** len(config.ratios), 1
    layers: list[Any] = [CausalConv1d(config.dimension, width, kernel=config.kernel_size, rngs=rngs)]
    for ratio in config.ratios:
        layers.append(CausalConvTranspose1d(width, width // 2, stride=ratio, rngs=rngs))
        width, steps = width // 2, steps * ratio
        layers += _residuals(width, config, steps, rngs)
    layers.append(CausalConv1d(width, config.channels, kernel=config.last_kernel_size, rngs=rngs))
    return Chain(layers)
