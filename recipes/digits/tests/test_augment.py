"""Augmentation: levels, lengths and times; the same seed gives the same sound.

Shape letters: T samples or frames.
"""

from collections.abc import Callable

import numpy as np
import pytest

from recipes.digits import augment

RATE = 8_000
SEEDS = range(25)  # enough for every branch to be taken

CHANGES: dict[str, Callable] = {
    "noise": lambda random, x_T: augment.noise(random, len(x_T), RATE),
    "reverb": lambda random, x_T: augment.reverb(random, x_T, RATE),
    "random_eq": lambda random, x_T: augment.random_eq(random, x_T, RATE),
    "spec_augment": lambda random, x_T: augment.spec_augment(random, x_T, RATE),
    "augment": lambda random, x_T: augment.augment(random, x_T, RATE),
}


def tone(samples: int = 4_000, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)).astype(np.float32)


@pytest.mark.parametrize("name", CHANGES)
def test_a_seed_gives_one_sound_and_another_seed_another(name):
    change, x_T = CHANGES[name], tone()
    made = [change(np.random.default_rng(seed), x_T) for seed in SEEDS]
    for seed, y_T in zip(SEEDS, made, strict=True):
        assert (y_T.dtype, y_T.shape) == (np.float32, x_T.shape)
        np.testing.assert_array_equal(y_T, change(np.random.default_rng(seed), x_T))
    assert len({y_T.tobytes() for y_T in made}) == len(made)
    np.testing.assert_array_equal(x_T, tone(), "what is given is not changed")


@pytest.mark.parametrize("samples", [1, 2, 3, 79, 1_001])
@pytest.mark.parametrize("name", CHANGES)
def test_short_sounds_and_silence_stay_finite_and_as_long(name, samples):
    for seed in SEEDS:
        for x_T in (tone(samples), np.zeros(samples, np.float32)):
            y_T = CHANGES[name](np.random.default_rng(seed), x_T)
            assert y_T.shape == x_T.shape
            assert np.isfinite(y_T).all()
            if name != "noise" and not x_T.any():
                assert not y_T.any(), "silence stays silence"


def test_noise_has_rms_1():
    for seed in SEEDS:
        assert augment.rms(augment.noise(np.random.default_rng(seed), 8_000, RATE)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("level", [1e-6, 0.1, 50.0])
def test_an_augmented_sound_does_not_clip_and_levels_vary(level):
    peaks = [np.abs(augment.augment(np.random.default_rng(seed), level * tone(), RATE)).max() for seed in SEEDS]
    assert max(peaks) < 1
    assert max(peaks) > 5 * min(peaks)


def test_reverb_keeps_the_direct_path_and_adds_a_tail():
    x_T = np.zeros(4_000, np.float32)
    x_T[1_000] = 1
    for seed in SEEDS:
        y_T = augment.reverb(np.random.default_rng(seed), x_T, RATE)
        assert np.abs(y_T[:1_000]).max() < 1e-6
        assert y_T[1_000] == pytest.approx(1, abs=1e-5)
        assert 1e-3 < np.sum(y_T[1_001:] ** 2) < 0.5
        assert np.abs(y_T[1_000 + RATE // 4 + 1 :]).max() < 1e-6


def test_decibels_are_factors_and_levels_are_root_mean_squares():
    assert [augment.gain(db) for db in (-20, 0, 6.0206)] == pytest.approx([0.1, 1, 2], rel=1e-5)
    assert augment.rms(tone()) == pytest.approx(0.3 / np.sqrt(2), rel=1e-3)
    assert 0 < augment.rms(np.zeros(5, np.float32)) < 1e-5


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_change_of_speed_changes_length_and_pitch(factor):
    y_T = augment.change_speed(tone(RATE), factor)
    assert y_T.dtype == np.float32
    assert len(y_T) == pytest.approx(RATE / factor, abs=1)
    spectrum = np.abs(np.fft.rfft(y_T * np.hanning(len(y_T))))
    assert np.fft.rfftfreq(len(y_T), 1 / RATE)[spectrum.argmax()] == pytest.approx(440 * factor, abs=2)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_a_change_of_tempo_changes_length_and_not_pitch(factor):
    x_T = tone(RATE)
    y_T = augment.change_tempo(x_T, factor, RATE)
    assert (y_T.dtype, len(y_T)) == (np.float32, round(RATE / factor))
    spectrum = np.abs(np.fft.rfft(y_T * np.hanning(len(y_T))))
    assert np.fft.rfftfreq(len(y_T), 1 / RATE)[spectrum.argmax()] == pytest.approx(440, abs=2)
    assert np.abs(y_T[400:-400]).max() == pytest.approx(0.3, abs=0.01)
    if factor == 1.0:
        np.testing.assert_allclose(y_T, x_T, atol=1e-6)
    assert augment.change_tempo(x_T[:399], factor, RATE).size == 399, "too short to take pieces of"


def test_a_change_of_tempo_moves_events_in_proportion():
    x_T = np.concatenate([tone(2_000, 300), tone(2_000, 900)])
    y_T = augment.change_tempo(x_T, 0.8, RATE)
    for part_T, hertz in ((y_T[:2_300], 300), (y_T[2_700:], 900)):
        spectrum = np.abs(np.fft.rfft(part_T * np.hanning(len(part_T))))
        assert np.fft.rfftfreq(len(part_T), 1 / RATE)[spectrum.argmax()] == pytest.approx(hertz, abs=8)


def test_noise_can_lie_below_hearing():
    deep = 0
    for seed in range(60):
        power = np.abs(np.fft.rfft(augment.noise(np.random.default_rng(seed), 4 * RATE, RATE))) ** 2
        deep += power[: 4 * 20].sum() > 0.8 * power.sum()  # below 20 Hz
    assert 3 <= deep <= 30


def test_spec_augment_masks_bands_and_moments_and_nothing_else():
    silent, thinner, same = 0, 0, 0
    x_T = np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    for seed in range(60):
        y_T = augment.spec_augment(np.random.default_rng(seed), x_T, RATE)
        level = np.sqrt(np.mean(y_T.reshape(-1, 80) ** 2, axis=1))
        silent += (level < 0.1).any()
        power, before = (np.abs(np.fft.rfft(a_T)) ** 2 for a_T in (y_T, x_T))
        thinner += (power[200:3600].reshape(-1, 20).sum(1) < 0.1 * before[200:3600].reshape(-1, 20).sum(1)).any()
        same += np.allclose(y_T, x_T, atol=1e-4)
        assert np.sum(y_T**2) > 0.3 * np.sum(x_T**2)
    assert 20 < silent < 58
    assert 20 < thinner < 58
    assert same > 0


def test_resampling_keeps_the_sound_and_to_the_same_rate_every_sample():
    x_T = tone(RATE)
    assert augment.resample(x_T, RATE, RATE) is x_T
    y_T = augment.resample(x_T, RATE, 3 * RATE)
    wanted_T = 0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / (3 * RATE))
    assert y_T.shape == wanted_T.shape
    np.testing.assert_allclose(y_T[1_000:-1_000], wanted_T[1_000:-1_000], atol=1e-3)


def test_the_active_part_of_a_recording_is_its_speech():
    x_T = 1e-3 * np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    x_T[2_000:5_000] += tone(3_000)
    start, end = augment.active(x_T, RATE)
    assert (start, end) == pytest.approx((0.25, 0.625), abs=0.025)
    assert augment.active(x_T, RATE, below_peak_db=80) == (0.0, 1.0)
