"""Mel distance and signal-to-distortion ratio against their formulas.

Shape letters: B batch rows, T samples, F frequency bins, M mel bands.
"""

import numpy as np
import pytest

from recipes.digits.metrics import _mel_filters, mel_distance, si_sdr

RATE = 24_000
T = 6_000


def noise(seed: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (rows, T)).astype(np.float32)


def test_the_mel_distance_of_a_recording_is_0_to_itself_and_grows_with_noise():
    x_BT = noise(0)
    mel_B = [np.asarray(mel_distance(x_BT, x_BT + share * noise(1), sample_rate=RATE)) for share in (0.0, 0.3, 1.0)]
    np.testing.assert_array_equal(mel_B[0], 0)
    assert (mel_B[0] < mel_B[1]).all()
    assert (mel_B[1] < mel_B[2]).all()


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
