"""Transcribe with faster-whisper (installed separately), to compare recognisers."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dsm_jax
from dsm_jax.training.data import WordSpan
from recipes.digits.augment import resample
from recipes.digits.data import MIMI, WORDS

Recogniser = Callable[[np.ndarray], dsm_jax.Transcript]


def whisper(folder: Path) -> Recogniser:
    """Make a function that transcribes samples at the codec's rate.

    Args:
      folder: folder with a model of faster-whisper.
    """
    from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]

    model = WhisperModel(str(folder), device="cpu", compute_type="float32")

    def recognise(pcm_T: np.ndarray) -> dsm_jax.Transcript:
        segments, _ = model.transcribe(resample(pcm_T, MIMI.sample_rate, 16_000), language="en", beam_size=5)
        spans = words_of(" ".join(segment.text for segment in segments))
        words = tuple(dsm_jax.Word(w.text, 0.0, 0.0, 1.0) for w in spans)
        return dsm_jax.Transcript("", words, (), 0.0, None, None, "whisper")

    return recognise


def words_of(text: str) -> list[WordSpan]:
    """Split a text into words, without punctuation or times."""
    return [WordSpan(word, 0.0, 0.0) for word in re.findall(r"[a-z0-9']+", text.lower())]


def spell_numbers(transcript: dsm_jax.Transcript) -> dsm_jax.Transcript:
    """Spell the numbers of a transcript digit by digit: "8 41" becomes "eight four one"."""
    numbers = {str(number): word for number, word in enumerate(WORDS)}
    parts: list[str] = [part for word in transcript.words for part in re.findall(r"[0-9]|[a-z']+", word.text)]
    words = [numbers.get(part, part) for part in parts]
    return dataclasses.replace(transcript, words=tuple(dsm_jax.Word(word, 0.0, 0.0, 1.0) for word in words))
