"""Augment recordings: speed, tempo, room, microphone, noise, level, and masks in frequency and time.

All functions take and return mono float32 arrays [T], and draw from the given random generator.
"""

import numpy as np
import soxr


def gain(db: float) -> float:
    """Convert decibels to a factor."""
    return 10.0 ** (db / 20)


def rms(x_T: np.ndarray) -> float:
    """Compute the root mean square, with a floor above 0."""
    return float(np.sqrt(np.mean(x_T**2) + 1e-12))


def active(x_T: np.ndarray, sample_rate: int, *, below_peak_db: float = 30.0) -> tuple[float, float]:
    """Find the start and the end of speech, in seconds: the first and the last moment near the loudest level.

    A recording of less than 30 ms counts as speech from beginning to end.
    """
    size = sample_rate // 100
    if len(x_T) < 3 * size:
        return 0.0, len(x_T) / sample_rate
    level = np.sqrt(np.mean(x_T[: len(x_T) // size * size].reshape(-1, size) ** 2, axis=1))
    smooth = np.convolve(level, np.ones(3) / 3, "same")
    loud = np.flatnonzero(smooth >= smooth.max() * gain(-below_peak_db))
    return float(loud[0]) / 100, float(loud[-1] + 1) / 100


def resample(x_T: np.ndarray, rate_in: float, rate_out: float) -> np.ndarray:
    """Resample with an anti-aliasing filter."""
    return soxr.resample(x_T, rate_in, rate_out).astype(np.float32) if rate_in != rate_out else x_T


def change_speed(x_T: np.ndarray, factor: float) -> np.ndarray:
    """Change speed and pitch together: a factor above 1 is faster and higher."""
    return resample(x_T, 1000.0 * factor, 1000.0)


def change_tempo(x_T: np.ndarray, factor: float, sample_rate: int) -> np.ndarray:
    """Change speed at an unchanged pitch (WSOLA, Verhelst and Roelands 1993); a factor above 1 is faster.

    Windows of 25 ms overlap by half; each is shifted by up to 6 ms to where it best continues the window before it.
    Recordings shorter than two windows are returned unchanged.
    """
    hop, reach = round(0.0125 * sample_rate), round(0.006 * sample_rate)
    if len(x_T) < 4 * hop:
        return x_T
    window_W = np.hanning(2 * hop + 1)[:-1].astype(np.float32)
    padded_T = np.concatenate([np.zeros(hop + reach), x_T, np.zeros(3 * hop + 2 * reach)]).astype(np.float32)
    windows = round(len(x_T) / factor / hop) + 1
    y_T = np.zeros((windows + 1) * hop, np.float32)
    taken = reach
    for i in range(windows):
        if i:
            wanted_T = padded_T[taken + hop : taken + 3 * hop]  # the continuation of the last window
            first = min(round(i * hop * factor), len(x_T))  # the first candidate's start
            likeness = np.correlate(padded_T[first : first + 2 * (reach + hop)], wanted_T, "valid")
            taken = first + int(likeness.argmax())
        y_T[i * hop : (i + 2) * hop] += window_W * padded_T[taken : taken + 2 * hop]
    return y_T[hop : hop + round(len(x_T) / factor)]


def noise(random: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """Make background noise of rms 1: coloured noise, sometimes with hum, swells and clicks."""
    spectrum = np.fft.rfft(random.normal(size=samples))
    hertz = np.fft.rfftfreq(samples, 1 / sample_rate)
    slope = random.uniform(-2.5, 0.3)  # exponent of power over frequency: from beyond brown to slightly blue
    flat_below = 10 ** random.uniform(-0.5, 2.0)  # keeps most steep noises from having all power below hearing
    spectrum *= np.maximum(hertz, flat_below) ** (slope / 2)
    if random.random() < 0.4:  # a dominant band, over a weaker background or alone
        centre, width = 10 ** random.uniform(2, 3.8), random.uniform(0.2, 1.5)
        band = np.exp(-(np.log2(np.maximum(hertz, 1) / centre) ** 2) / (2 * width**2))
        spectrum *= band + random.uniform(0, 0.3)
    y_T = np.fft.irfft(spectrum, samples)
    y_T /= rms(y_T)
    time_T = np.arange(samples) / sample_rate
    if random.random() < 0.3:
        for harmonic in range(1, random.integers(2, 6)):
            pitch = harmonic * random.choice([50.0, 60.0, 100.0, 120.0])
            y_T += random.uniform(0, 1.5) * np.sin(2 * np.pi * (pitch * time_T + random.random())) / harmonic
    if random.random() < 0.3:
        y_T *= np.exp(random.uniform(0.2, 1) * np.sin(2 * np.pi * (random.uniform(0.1, 2) * time_T + random.random())))
    if random.random() < 0.3:
        for _ in range(random.integers(1, 1 + max(1, samples // sample_rate) * 2)):
            at, length = random.integers(samples), random.integers(sample_rate // 500, sample_rate // 20)
            click_T = random.normal(size=length) * np.exp(-np.arange(length) / (length / random.uniform(3, 8)))
            y_T[at : at + length] += random.uniform(2, 12) * click_T[: samples - at]
    return (y_T / rms(y_T)).astype(np.float32)


def reverb(random: np.random.Generator, x_T: np.ndarray, sample_rate: int) -> np.ndarray:
    """Add the reverberation of a small room: a direct path and a decaying tail."""
    seconds = random.uniform(0.03, 0.25)
    tail_T = random.normal(size=int(seconds * sample_rate)) * np.exp(-np.linspace(0, 6, int(seconds * sample_rate)))
    tail_T *= random.uniform(0.05, 0.5) / np.sqrt(np.sum(tail_T**2))
    tail_T[0] = 1.0
    size = 1 << (len(x_T) + len(tail_T)).bit_length()
    y_T = np.fft.irfft(np.fft.rfft(x_T, size) * np.fft.rfft(tail_T, size), size)[: len(x_T)]
    return y_T.astype(np.float32)


def _octaves(samples: int, sample_rate: int) -> np.ndarray:
    """Convert a spectrum's frequencies to octaves above 1 kHz, with frequencies below 60 Hz taken as 60 Hz."""
    return np.log2(np.maximum(np.fft.rfftfreq(samples, 1 / sample_rate), 60.0) / 1000)


def random_eq(random: np.random.Generator, x_T: np.ndarray, sample_rate: int) -> np.ndarray:
    """Imitate another microphone: a smooth random gain over frequency, within about 10 dB."""
    spectrum = np.fft.rfft(x_T)
    octaves = _octaves(len(x_T), sample_rate)
    curve_db = random.normal(0, 1.5) * octaves
    for _ in range(2):
        curve_db = curve_db + random.normal(0, 3) * np.exp(-((octaves - random.uniform(-3, 2)) ** 2))
    return np.fft.irfft(spectrum * 10 ** (np.clip(curve_db, -20, 12) / 20), len(x_T)).astype(np.float32)


def spec_augment(random: np.random.Generator, x_T: np.ndarray, sample_rate: int) -> np.ndarray:
    """Mask up to two bands of at most an octave, and some moments of up to 60 ms (Park et al. 2019)."""
    spectrum = np.fft.rfft(x_T)
    octaves = _octaves(len(x_T), sample_rate)
    for _ in range(random.integers(0, 3)):
        spectrum[np.abs(octaves - random.uniform(-3, 2)) < random.uniform(0.1, 0.5)] *= 0.05
    y_T = np.fft.irfft(spectrum, len(x_T)).astype(np.float32)
    for _ in range(random.integers(0, 1 + 2 * len(x_T) // sample_rate)):
        at, length = random.integers(len(x_T)), int(random.uniform(0.01, 0.06) * sample_rate)
        y_T[at : at + length] *= 0.05
    return y_T


def augment(
    random: np.random.Generator,
    x_T: np.ndarray,
    sample_rate: int,
    *,
    strength: float = 1.0,
    quietest_db: float = -26.0,
) -> np.ndarray:
    """Apply reverb, equaliser, masks, noise and level, each at random; the peak stays below 1.

    Args:
      random: random generator.
      x_T: the recording.
      sample_rate: sample rate of the recording, Hz.
      strength: from 0 to 1; scales the probability of each change and the level of the loudest noise.
      quietest_db: lowest peak, relative to full scale.
    """
    if random.random() < 0.3 * strength:
        x_T = reverb(random, x_T, sample_rate)
    if random.random() < 0.6 * strength:
        x_T = random_eq(random, x_T, sample_rate)
    if random.random() < 0.6 * strength:
        x_T = spec_augment(random, x_T, sample_rate)
    level = rms(x_T)
    if random.random() < 0.7 * strength and level > 1e-5:
        loudest_db = 20 - 12 * strength  # level of the loudest noise below the recording
        x_T = x_T + level * gain(-random.uniform(loudest_db, 50)) * noise(random, len(x_T), sample_rate)
    peak = gain(random.uniform(quietest_db, -0.5))
    return (x_T * (peak / max(float(np.abs(x_T).max()), 1e-4))).astype(np.float32)
