"""Norms over the last axis, computed in float32 for inputs of any dtype.

Shape letters: docs/axes.md.
Source: kyutai-labs/moshi@e6a55d2 moshi/modules/transformer.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, computed in float32."""

    def __init__(self, width: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale_D = nnx.Param(jnp.ones((width,)))
        self.bias_D = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalise the last axis."""
        x32 = x_BTD.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + self.epsilon)
        return (y * self.scale_D[...].astype(jnp.float32) + self.bias_D[...].astype(jnp.float32)).astype(x_BTD.dtype)


class RMSNorm(nnx.Module):
    """x * alpha / rms(x), computed in float32; the epsilon is added to the mean square."""

    def __init__(self, width: int, *, epsilon: float):
        self.epsilon = epsilon
        self.alpha_D = nnx.Param(jnp.ones((width,)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalise the last axis."""
        x32 = x_BTD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.epsilon)
        return (x32 * (self.alpha_D[...].astype(jnp.float32) * inverse)).astype(x_BTD.dtype)


def make_norm(name: str, width: int) -> LayerNorm | RMSNorm:
    """Make the norm that a config names, with an epsilon of 1e-8 if the name ends in `_f32`, else 1e-5."""
    kind = RMSNorm if name.startswith("rms_norm") else LayerNorm
    return kind(width, epsilon=1e-8 if name.endswith("_f32") else 1e-5)
