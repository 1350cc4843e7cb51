"""Real speech at 24 kHz, for drawing weights and for driving the references."""

import functools
from pathlib import Path

import numpy as np
import soundfile
import soxr

_DATA = Path(__file__).parents[2] / "data"
_FILES = {"librispeech": "librispeech-1272-128104-0000.flac", "bria": "bria.mp3"}


@functools.cache
def speech(name: str) -> np.ndarray:
    """Mono recording, float32 [samples] at 24 kHz: "librispeech" (5.9 s, read) or "bria" (45 s, a synthetic voice)."""
    samples, sample_rate = soundfile.read(_DATA / _FILES[name], dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), sample_rate, 24_000)
