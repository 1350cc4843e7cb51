"""What two sounds have in common, by their spectra: the codec's reconstruction loss and the distances it is judged by.

Shape letters: B batch rows, T samples, N frames of a spectrogram, F frequency bins, M mel bands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SCALES = (256, 512, 1024, 2048)  # samples in a window; the hop is a quarter
_FLOOR = 1e-3  # of a magnitude: 60 dB below full scale, where differences stop to count


def magnitudes(x_BT: jax.Array, window: int) -> jax.Array:
    """Magnitudes [B, N, F] of a short-time Fourier transform, of a full-scale sine about 1; the hop is window / 4.

    Windows lie wholly inside the sound, so N is T // hop - 3 and F is window // 2 + 1.
    """
    hop = window // 4
    blocks = x_BT.shape[1] // hop
    parts_BNH = x_BT[:, : blocks * hop].reshape(x_BT.shape[0], blocks, hop)
    frames_BNW = jnp.concatenate([parts_BNH[:, i : blocks - 3 + i] for i in range(4)], axis=2)
    hann_W = jnp.asarray(np.hanning(window + 1)[:-1] * (4 / window), x_BT.dtype)
    spectrum_BNF = jnp.fft.rfft(frames_BNW * hann_W)
    return jnp.sqrt(spectrum_BNF.real**2 + spectrum_BNF.imag**2 + _FLOOR**2)


def stft_loss(x_BT: jax.Array, y_BT: jax.Array, *, scales: tuple[int, ...] = SCALES) -> jax.Array:
    """Mean distance of log magnitudes plus that of magnitudes relative to the target's, averaged over scales; scalar.

    Args:
      x_BT: the target.
      y_BT: what is to resemble it.
      scales: window lengths in samples.
    """
    total = jnp.zeros(())
    for window in scales:
        x_BNF, y_BNF = magnitudes(x_BT, window), magnitudes(y_BT, window)
        linear = jnp.mean(jnp.abs(x_BNF - y_BNF)) / (jnp.mean(x_BNF) + _FLOOR)
        total += jnp.mean(jnp.abs(jnp.log(x_BNF) - jnp.log(y_BNF))) + linear
    return total / len(scales)


@functools.cache
def _mel_filters(bands: int, window: int, sample_rate: int) -> np.ndarray:
    """Triangles of equal width on the mel scale (2595 log10(1 + f / 700)), [F, M]."""
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = np.linspace(0, sample_rate / 2, window // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def mel_distance(x_BT: jax.Array, y_BT: jax.Array, *, sample_rate: int) -> jax.Array:
    """Mean absolute difference of log-mel spectrograms (natural logarithm, 64 bands, windows of 1024), per row [B]."""
    filters_FM = _mel_filters(64, 1024, sample_rate)
    x_BNM, y_BNM = (jnp.log(magnitudes(s_BT, 1024) @ filters_FM) for s_BT in (x_BT, y_BT))
    return jnp.mean(jnp.abs(x_BNM - y_BNM), axis=(1, 2))


def si_sdr(x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
    """Scale-invariant signal-to-distortion ratio of y against x in dB, per row [B] (Le Roux et al. 2019)."""
    x_BT = x_BT - x_BT.mean(1, keepdims=True)
    y_BT = y_BT - y_BT.mean(1, keepdims=True)
    scale_B1 = jnp.sum(x_BT * y_BT, 1, keepdims=True) / (jnp.sum(x_BT**2, 1, keepdims=True) + 1e-8)
    target_BT = scale_B1 * x_BT
    noise_B = jnp.sum((y_BT - target_BT) ** 2, 1)
    return 10 * jnp.log10(jnp.sum(target_BT**2, 1) / (noise_B + 1e-8) + 1e-8)
