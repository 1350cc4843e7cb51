"""The spectral loss of the codec against its formulas, and its gradients at silence.

Shape letters: B batch rows, T samples, N frames, F frequency bins.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.training.losses.codec import magnitudes, stft_loss

RATE = 24_000
T = 6_000


LOSS = jax.jit(jax.value_and_grad(stft_loss, argnums=1))


def noise(seed: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (rows, T)).astype(np.float32)


def sine(hertz: float, amplitude: float = 1.0) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(T) / RATE)).astype(np.float32)[None]


@pytest.mark.slow
@pytest.mark.parametrize("window", [256, 1024])
def test_magnitudes_are_those_of_windowed_fourier_transforms(window):
    x_BT, hop = noise(0), window // 4
    found_BNF = np.asarray(magnitudes(x_BT, window))
    assert found_BNF.shape == (2, T // hop - 3, window // 2 + 1)
    hann_W = np.sin(np.pi * np.arange(window) / window) ** 2
    for frame in range(found_BNF.shape[1]):
        piece_BW = x_BT[:, frame * hop : frame * hop + window] * hann_W
        wanted_BF = np.abs(np.fft.rfft(piece_BW)) / hann_W.sum() * 2
        np.testing.assert_allclose(found_BNF[:, frame], wanted_BF, atol=2e-3)  # quiet ones have a floor


@pytest.mark.slow
@pytest.mark.parametrize("amplitude", [1.0, 0.25])
def test_the_magnitude_of_a_sine_is_its_amplitude_at_its_frequency(amplitude):
    window, bin_ = 512, 20
    found_NF = np.asarray(magnitudes(sine(bin_ * RATE / window, amplitude), window)[0])
    np.testing.assert_allclose(found_NF[:, bin_], amplitude, rtol=1e-3)
    np.testing.assert_array_equal(found_NF.argmax(1), bin_)
    assert found_NF[:, bin_ + 2 :].max() < 0.01 * amplitude + 2e-3
    assert found_NF.min() > 0, "so that it has a logarithm"


@pytest.mark.slow
def test_the_distance_is_zero_to_itself_and_grows_with_noise():
    x_BT = noise(0)
    distances = [float(LOSS(x_BT, x_BT + np.float32(share) * noise(1))[0]) for share in (0.0, 0.1, 0.3, 1.0)]
    assert distances[0] == 0
    assert distances == sorted(set(distances))


@pytest.mark.parametrize("target", ["noise", "silence"])
@pytest.mark.parametrize("made", ["noise", "silence", "other"])
def test_gradients_are_finite_for_equal_sounds_and_for_silence(target, made):
    sounds = {"noise": noise(0), "silence": np.zeros((2, T), np.float32), "other": noise(1)}
    value, gradient_BT = LOSS(sounds[target], sounds[made])
    assert np.isfinite(value)
    assert np.isfinite(gradient_BT).all()
    assert bool(value) == (target != made)
    if made == "other":
        assert np.abs(gradient_BT).max() > 0


def test_gradient_descent_on_the_loss_approaches_the_target():
    x_BT, y_BT = noise(0), noise(1)
    before, gradient_BT = LOSS(x_BT, y_BT)
    after, _ = LOSS(x_BT, y_BT - 0.01 * gradient_BT / jnp.sqrt(jnp.mean(gradient_BT**2)))
    assert after < before


@pytest.mark.slow
def test_all_scales_have_the_same_weight():
    x_BT, y_BT = noise(0), noise(1)
    each = [float(stft_loss(x_BT, y_BT, scales=(window,))) for window in (256, 2048)]
    assert float(stft_loss(x_BT, y_BT, scales=(256, 2048))) == pytest.approx(np.mean(each), rel=1e-6)
    assert each[0] != each[1]
