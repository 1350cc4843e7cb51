"""Sound for training, and strings of words put together from it: levels, lengths and times; a seed is a sound.

Shape letters: T samples or frames.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from dsm_jax.training import sounds
from dsm_jax.training.compose import Gaps, Spoken, Take, labels_of, string_of

RATE = 8_000
SEEDS = range(25)  # enough for every branch to be taken
WORDS = ("one", "two", "three")

CHANGES: dict[str, Callable] = {
    "noise": lambda random, x_T: sounds.noise(random, len(x_T), RATE),
    "room": lambda random, x_T: sounds.room(random, x_T, RATE),
    "tilt": lambda random, x_T: sounds.tilt(random, x_T, RATE),
    "hide": lambda random, x_T: sounds.hide(random, x_T, RATE),
    "roughen": lambda random, x_T: sounds.roughen(random, x_T, RATE),
}


def tone(samples: int = 4_000, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)).astype(np.float32)


@pytest.mark.parametrize("name", CHANGES)
def test_a_seed_is_a_sound_and_another_seed_another(name):
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


def test_noise_is_as_loud_as_it_says():
    for seed in SEEDS:
        assert sounds.rms(sounds.noise(np.random.default_rng(seed), 8_000, RATE)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("level", [1e-6, 0.1, 50.0])
def test_a_roughened_sound_does_not_clip_and_has_many_levels(level):
    peaks = [np.abs(sounds.roughen(np.random.default_rng(seed), level * tone(), RATE)).max() for seed in SEEDS]
    assert max(peaks) < 1
    assert max(peaks) > 5 * min(peaks)


def test_a_room_keeps_the_direct_sound_where_it_was_and_adds_what_follows():
    x_T = np.zeros(4_000, np.float32)
    x_T[1_000] = 1
    for seed in SEEDS:
        y_T = sounds.room(np.random.default_rng(seed), x_T, RATE)
        assert np.abs(y_T[:1_000]).max() < 1e-6
        assert y_T[1_000] == pytest.approx(1, abs=1e-5)
        assert 1e-3 < np.sum(y_T[1_001:] ** 2) < 0.5
        assert np.abs(y_T[1_000 + RATE // 4 + 1 :]).max() < 1e-6


def test_decibels_are_factors_and_levels_are_root_mean_squares():
    assert [sounds.gain(db) for db in (-20, 0, 6.0206)] == pytest.approx([0.1, 1, 2], rel=1e-5)
    assert sounds.rms(tone()) == pytest.approx(0.3 / np.sqrt(2), rel=1e-3)
    assert 0 < sounds.rms(np.zeros(5, np.float32)) < 1e-5


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_change_of_speed_changes_length_and_pitch(factor):
    y_T = sounds.change_speed(tone(RATE), factor)
    assert y_T.dtype == np.float32
    assert len(y_T) == pytest.approx(RATE / factor, abs=1)
    spectrum = np.abs(np.fft.rfft(y_T * np.hanning(len(y_T))))
    assert np.fft.rfftfreq(len(y_T), 1 / RATE)[spectrum.argmax()] == pytest.approx(440 * factor, abs=2)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_a_change_of_tempo_changes_length_and_not_pitch(factor):
    x_T = tone(RATE)
    y_T = sounds.change_tempo(x_T, factor, RATE)
    assert (y_T.dtype, len(y_T)) == (np.float32, round(RATE / factor))
    spectrum = np.abs(np.fft.rfft(y_T * np.hanning(len(y_T))))
    assert np.fft.rfftfreq(len(y_T), 1 / RATE)[spectrum.argmax()] == pytest.approx(440, abs=2)
    assert np.abs(y_T[400:-400]).max() == pytest.approx(0.3, abs=0.01)
    if factor == 1.0:
        np.testing.assert_allclose(y_T, x_T, atol=1e-6)
    assert sounds.change_tempo(x_T[:399], factor, RATE).size == 399, "too short to take pieces of"


def test_what_changes_in_time_stays_where_it_was_after_a_change_of_tempo():
    x_T = np.concatenate([tone(2_000, 300), tone(2_000, 900)])
    y_T = sounds.change_tempo(x_T, 0.8, RATE)
    for part_T, hertz in ((y_T[:2_300], 300), (y_T[2_700:], 900)):
        spectrum = np.abs(np.fft.rfft(part_T * np.hanning(len(part_T))))
        assert np.fft.rfftfreq(len(part_T), 1 / RATE)[spectrum.argmax()] == pytest.approx(hertz, abs=8)


def test_noise_can_be_rumble_too_deep_to_hear():
    deep = 0
    for seed in range(60):
        power = np.abs(np.fft.rfft(sounds.noise(np.random.default_rng(seed), 4 * RATE, RATE))) ** 2
        deep += power[: 4 * 20].sum() > 0.8 * power.sum()  # below 20 Hz
    assert 3 <= deep <= 30


def test_bands_and_moments_are_hidden_and_the_rest_is_not():
    silent, thinner, same = 0, 0, 0
    x_T = np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    for seed in range(60):
        y_T = sounds.hide(np.random.default_rng(seed), x_T, RATE)
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
    assert sounds.resample(x_T, RATE, RATE) is x_T
    y_T = sounds.resample(x_T, RATE, 3 * RATE)
    wanted_T = 0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / (3 * RATE))
    assert y_T.shape == wanted_T.shape
    np.testing.assert_allclose(y_T[1_000:-1_000], wanted_T[1_000:-1_000], atol=1e-3)


def test_the_active_part_of_a_recording_is_where_somebody_speaks():
    x_T = 1e-3 * np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    x_T[2_000:5_000] += tone(3_000)
    start, end = sounds.active(x_T, RATE)
    assert (start, end) == pytest.approx((0.25, 0.625), abs=0.025)
    assert sounds.active(x_T, RATE, below_peak_db=80) == (0.0, 1.0)


def takes(random: np.random.Generator) -> list[Take]:
    """Six takes of noise, which resembles nothing else, by two speakers, with silence at both ends."""
    made = []
    for word in WORDS:
        for speaker in ("ann", "bob"):
            said_T = random.normal(size=random.integers(2_000, 3_000)).astype(np.float32)
            # Low enough to stay in band at any speed.
            said_T = np.convolve(said_T, np.hanning(17), "same").astype(np.float32)
            pcm_T = np.concatenate([np.zeros(400, np.float32), said_T, np.zeros(800, np.float32)])
            made.append(Take(word, speaker, pcm_T, 400 / RATE, (400 + len(said_T)) / RATE))
    return made


def speaker_of(pcm_T: np.ndarray, word: Spoken, given: list[Take]) -> str:
    """Whose take is heard where a word is said to be; fails where none is."""
    for take in given:
        factor = (take.end - take.start) / (word.end - word.start)
        if take.word != word.text or not 0.5 < factor < 2:
            continue
        said_T = sounds.change_speed(take.pcm_T, factor)
        first = round((word.start - take.start / factor) * RATE)
        heard_T = pcm_T[first : first + len(said_T)]
        if len(heard_T) == len(said_T) and np.corrcoef(heard_T, said_T)[0, 1] > 0.98:
            return take.speaker
    raise AssertionError(f"{word} is not heard there")


@pytest.mark.parametrize("speed", [0.0, 0.15])
def test_words_are_heard_at_their_times_by_one_speaker_and_do_not_overlap(speed):
    speakers = set()
    for seed in range(10):
        random = np.random.default_rng(seed)
        given = takes(random)
        pcm_T, words = string_of(random, given, RATE, seconds=4.0, speed=speed)
        assert (pcm_T.dtype, pcm_T.shape) == (np.float32, (4 * RATE,))
        assert 2 <= len(words) <= 10
        heard = {speaker_of(pcm_T, word, given) for word in words}
        assert len(heard) == 1
        speakers |= heard
        times = [time for word in words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert times[0] >= 0
        assert times[-1] <= 4.0
        silent_T = np.ones(len(pcm_T), bool)
        for word in words:
            silent_T[int(word.start * RATE) - 20 : int(word.end * RATE) + 20] = False
        assert np.abs(pcm_T[silent_T]).max() < 0.02 * np.abs(pcm_T).max(), "nothing is said between words"
    assert speakers == {"ann", "bob"}


def test_a_change_of_tempo_moves_words_and_their_times_together():
    given = takes(np.random.default_rng(0))
    lengths = {take.word + take.speaker: take.end - take.start for take in given}
    factors = []
    for seed in range(10):
        pcm_T, words = string_of(np.random.default_rng(seed), given, RATE, seconds=4.0, speed=0.0, tempo=0.2)
        silent_T = np.ones(len(pcm_T), bool)
        for word in words:
            silent_T[int(word.start * RATE) - 120 : int(word.end * RATE) + 120] = False
            factors.append((word.end - word.start) / np.mean([lengths[word.text + who] for who in ("ann", "bob")]))
        assert np.abs(pcm_T[silent_T]).max() < 0.05 * np.abs(pcm_T).max(), "nothing is said between words"
    assert min(factors) < 0.9
    assert max(factors) > 1.1


def test_a_string_is_the_same_for_the_same_seed():
    def made(seed: int) -> tuple[np.ndarray, list[Spoken]]:
        return string_of(np.random.default_rng(seed), takes(np.random.default_rng(0)), RATE, seconds=3.0)

    (pcm_T, words), (again_T, same), (other_T, _) = made(1), made(1), made(2)
    np.testing.assert_array_equal(pcm_T, again_T)
    assert words == same
    assert not np.array_equal(pcm_T, other_T)


def test_words_that_do_not_fit_are_left_out():
    random = np.random.default_rng(0)
    given = takes(random)
    gaps = Gaps(shortest=0.1, longest=0.1, lead=0.0)
    for seconds, most in ((0.2, 0), (0.8, 1), (1.6, 3)):
        pcm_T, words = string_of(random, given, RATE, seconds=seconds, words=10, gaps=gaps, speed=0.0)
        assert len(words) <= most
        assert len(pcm_T) == round(seconds * RATE)
        assert bool(words) == pcm_T.any()
    pcm_T, words = string_of(random, given, RATE, seconds=10.0, words=2, gaps=gaps, speed=0.0)
    assert len(words) == 2
    pcm_T, words = string_of(random, given, RATE, seconds=1.0, words=0)
    assert words == []
    assert not pcm_T.any()


def test_gaps_between_takes_are_as_long_as_asked_for():
    random = np.random.default_rng(0)
    given = takes(random)
    gaps = Gaps(shortest=0.2, longest=0.5, lead=0.3)
    found = []
    for _ in range(10):
        _, words = string_of(random, given, RATE, seconds=6.0, gaps=gaps, speed=0.0)
        assert 400 / RATE <= words[0].start <= 0.3 + 400 / RATE
        # A take has 0.1 s of silence after its word, and 0.05 s before.
        found += [b.start - a.end - 0.15 for a, b in itertools.pairwise(words)]
    assert 0.2 - 1e-6 < min(found) < 0.25
    assert 0.4 < max(found) < 0.5 + 1e-6


def test_labels_are_those_of_the_middle_of_each_frame():
    random = np.random.default_rng(0)
    for parts in (1, 3):
        _, words = string_of(random, takes(random), RATE, seconds=4.0)
        labels_T = labels_of(words, WORDS, frames=50, frame_rate=12.5, parts=parts)
        assert (labels_T.dtype, labels_T.shape) == (np.int32, (50,))
        for frame, label in enumerate(labels_T):
            middle, wanted = (frame + 0.5) / 12.5, 0
            for word in words:
                for part in range(parts):
                    length = (word.end - word.start) / parts
                    if word.start + part * length <= middle < word.start + (part + 1) * length:
                        wanted = 1 + WORDS.index(word.text) * parts + part
            assert label == wanted
        assert len(set(labels_T.tolist())) > parts
