"""Spectral distances against formulas, and where they could stop being numbers.

Shape letters: B batch rows, T samples, N frames, F frequency bins, M mel bands.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.training.spectral import _mel_filters, magnitudes, mel_distance, si_sdr, stft_loss

RATE = 24_000
T = 6_000


LOSS = jax.jit(jax.value_and_grad(stft_loss, argnums=1))


def noise(seed: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (rows, T)).astype(np.float32)


def sine(hertz: float, amplitude: float = 1.0) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(T) / RATE)).astype(np.float32)[None]


@pytest.mark.parametrize("window", [256, 1024])
def test_magnitudes_are_those_of_a_transform_of_windowed_pieces(window):
    x_BT, hop = noise(0), window // 4
    found_BNF = np.asarray(magnitudes(x_BT, window))
    assert found_BNF.shape == (2, T // hop - 3, window // 2 + 1)
    hann_W = np.sin(np.pi * np.arange(window) / window) ** 2
    for frame in range(found_BNF.shape[1]):
        piece_BW = x_BT[:, frame * hop : frame * hop + window] * hann_W
        wanted_BF = np.abs(np.fft.rfft(piece_BW)) / hann_W.sum() * 2
        np.testing.assert_allclose(found_BNF[:, frame], wanted_BF, atol=2e-3)  # quiet ones have a floor


@pytest.mark.parametrize("amplitude", [1.0, 0.25])
def test_the_magnitude_of_a_sine_is_its_amplitude_at_its_frequency(amplitude):
    window, bin_ = 512, 20
    found_NF = np.asarray(magnitudes(sine(bin_ * RATE / window, amplitude), window)[0])
    np.testing.assert_allclose(found_NF[:, bin_], amplitude, rtol=1e-3)
    np.testing.assert_array_equal(found_NF.argmax(1), bin_)
    assert found_NF[:, bin_ + 2 :].max() < 0.01 * amplitude + 2e-3
    assert found_NF.min() > 0, "so that it has a logarithm"


def test_a_sound_is_at_no_distance_from_itself_and_further_from_what_is_less_like_it():
    x_BT = noise(0)
    distances = [float(LOSS(x_BT, x_BT + np.float32(share) * noise(1))[0]) for share in (0.0, 0.1, 0.3, 1.0)]
    assert distances[0] == 0
    assert distances == sorted(set(distances))
    mel_B = [np.asarray(mel_distance(x_BT, x_BT + share * noise(1), sample_rate=RATE)) for share in (0.0, 0.3, 1.0)]
    np.testing.assert_array_equal(mel_B[0], 0)
    assert (mel_B[0] < mel_B[1]).all()
    assert (mel_B[1] < mel_B[2]).all()


@pytest.mark.parametrize("target", ["noise", "silence"])
@pytest.mark.parametrize("made", ["noise", "silence", "other"])
def test_gradients_are_numbers_for_equal_sounds_and_for_silence(target, made):
    sounds = {"noise": noise(0), "silence": np.zeros((2, T), np.float32), "other": noise(1)}
    value, gradient_BT = LOSS(sounds[target], sounds[made])
    assert np.isfinite(value)
    assert np.isfinite(gradient_BT).all()
    assert bool(value) == (target != made)
    if made == "other":
        assert np.abs(gradient_BT).max() > 0


def test_descending_the_loss_makes_a_sound_more_like_the_target():
    x_BT, y_BT = noise(0), noise(1)
    before, gradient_BT = LOSS(x_BT, y_BT)
    after, _ = LOSS(x_BT, y_BT - 0.01 * gradient_BT / jnp.sqrt(jnp.mean(gradient_BT**2)))
    assert after < before


def test_each_scale_counts_as_much():
    x_BT, y_BT = noise(0), noise(1)
    each = [float(stft_loss(x_BT, y_BT, scales=(window,))) for window in (256, 2048)]
    assert float(stft_loss(x_BT, y_BT, scales=(256, 2048))) == pytest.approx(np.mean(each), rel=1e-6)
    assert each[0] != each[1]


def test_mel_bands_cover_every_frequency_and_rise_and_fall_about_their_middles():
    filters_FM = _mel_filters(64, 1024, RATE)
    assert filters_FM.shape == (513, 64)
    assert (filters_FM >= 0).all()
    assert (filters_FM.sum(0) > 0).all(), "none is empty"
    assert (filters_FM[1:-1].sum(1) > 0).all(), "all bins between the edges are heard"
    middles = filters_FM.argmax(0)
    np.testing.assert_allclose(filters_FM[middles[0] + 1 : middles[-1]].sum(1), 1, atol=1e-5)
    hertz_M = _mel_filters(64, 1 << 16, RATE).argmax(0) * RATE / (1 << 16)  # to a fraction of a Hz
    mel_M = 2595 * np.log10(1 + hertz_M / 700)
    np.testing.assert_allclose(np.diff(mel_M), mel_M[-1] / 64, atol=1)


def test_the_mel_distance_is_of_logarithms_row_by_row():
    x_BT = noise(0) * 3
    louder_B = np.asarray(mel_distance(x_BT, x_BT * np.array([[2.0], [4.0]], np.float32), sample_rate=RATE))
    np.testing.assert_allclose(louder_B, [np.log(2), np.log(4)], rtol=0.05)  # the floor takes some


def test_the_signal_to_distortion_ratio_is_that_of_its_formula():
    x_BT, y_BT = noise(0) + 0.5, noise(0) + 0.3 * noise(1) - 0.2
    x, y = (s.astype(np.float64) - s.mean(1, keepdims=True) for s in (x_BT, y_BT))
    target = (x * y).sum(1, keepdims=True) / (x * x).sum(1, keepdims=True) * x
    wanted_B = 10 * np.log10((target**2).sum(1) / ((y - target) ** 2).sum(1))
    found_B = np.asarray(si_sdr(x_BT, y_BT))
    np.testing.assert_allclose(found_B, wanted_B, atol=0.01)
    assert (np.abs(found_B - 10.5) < 1).all(), "noise at 0.3 of the level"


@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_the_signal_to_distortion_ratio_does_not_depend_on_levels(scale):
    x_BT, y_BT = noise(0), noise(0) + noise(1)
    np.testing.assert_allclose(si_sdr(x_BT, scale * y_BT), si_sdr(x_BT, y_BT), atol=0.01)
    np.testing.assert_allclose(si_sdr(scale * x_BT, y_BT), si_sdr(x_BT, y_BT), atol=0.01)
    assert (si_sdr(x_BT, scale * x_BT) > 60).all()
    assert np.isfinite(si_sdr(x_BT, np.zeros_like(x_BT))).all()
