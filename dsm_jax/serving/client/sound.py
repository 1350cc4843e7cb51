"""Sound as the clients of every dialect send and return it.

Shape letters: T samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from dsm_jax import audio
from dsm_jax.errors import ServerError
from dsm_jax.speech import IncompleteSpeechError, Speech, SpokenWord

SAMPLE_RATE = 24_000  # Hz, of both dialects
_NO_FRAMES = np.zeros((0, 0), np.int32)  # a server does not send the codes


def live_samples(pcm: ArrayLike) -> np.ndarray:
    """Return samples of live audio as mono float32 [T] at 24 kHz; there may be none.

    Args:
      pcm: float in [-1, 1] or int16 at 24 kHz, of shape [T] or [C, T].

    Raises:
      AudioError: samples of another kind, or ones that are not finite.
    """
    samples = np.asarray(pcm)
    return audio.read(samples, SAMPLE_RATE) if samples.size else np.zeros(0, np.float32)


class BrokenSpeechError(ServerError, IncompleteSpeechError):
    """A speech that ended before its text, over a server; `speech` is the part that came."""


def joined_speech(
    pieces: Sequence[np.ndarray], text: str, model: str, words: Sequence[SpokenWord] = (), *, complete: bool = True
) -> Speech:
    """Return the speech of a server from the pieces [T] of its sound."""
    pcm_T = np.concatenate([np.zeros(0, np.float32), *pieces])
    return Speech(pcm_T, SAMPLE_RATE, tuple(words), _NO_FRAMES, model, complete, text)


def with_part(error: ServerError, part: Speech) -> ServerError:
    """Return the error of a speech that has ended early, with the part that came before, if there is sound in it."""
    return BrokenSpeechError(str(error), part) if part.pcm.size else error
