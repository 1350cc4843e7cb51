"""Distances between recordings: mel distance and scale-invariant signal-to-distortion ratio.

Shape letters: B batch rows, T samples, N frames of a spectrogram, F frequency bins, M mel bands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsm_jax.training.losses.codec import magnitudes


@functools.cache
def _mel_filters(bands: int, window: int, sample_rate: int) -> np.ndarray:
    """Make triangular filters [F, M] of equal width on the mel scale (2595 log10(1 + f / 700))."""
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = np.linspace(0, sample_rate / 2, window // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def mel_distance(x_BT: jax.Array, y_BT: jax.Array, *, sample_rate: int) -> jax.Array:
    """Average the difference of log-mel spectrograms (natural logarithm, 64 bands, windows of 1024), per row [B]."""
    filters_FM = _mel_filters(64, 1024, sample_rate)
    x_BNM, y_BNM = (jnp.log(magnitudes(s_BT, 1024) @ filters_FM) for s_BT in (x_BT, y_BT))
    return jnp.mean(jnp.abs(x_BNM - y_BNM), axis=(1, 2))


def si_sdr(x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
    """Compute the scale-invariant signal-to-distortion ratio of y in dB, per row [B] (Le Roux et al. 2019)."""
    x_BT = x_BT - x_BT.mean(1, keepdims=True)
    y_BT = y_BT - y_BT.mean(1, keepdims=True)
    scale_B1 = jnp.sum(x_BT * y_BT, 1, keepdims=True) / (jnp.sum(x_BT**2, 1, keepdims=True) + 1e-8)
    target_BT = scale_B1 * x_BT
    noise_B = jnp.sum((y_BT - target_BT) ** 2, 1)
    return 10 * jnp.log10(jnp.sum(target_BT**2, 1) / (noise_B + 1e-8) + 1e-8)
