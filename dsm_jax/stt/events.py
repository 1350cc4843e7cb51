"""Words and pauses with their times, as transcription finds them.

All times are seconds from the start of the audio; all probabilities are in [0, 1].
"""

from dataclasses import dataclass

PAUSE_HORIZONS = (0.5, 1.0, 2.0, 3.0)  # seconds of silence, of which each has a head of its own in the model


@dataclass(frozen=True)
class Word:
    """One spoken word, its times in seconds, and the probability that the model gave it."""

    text: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Pause:
    """A prediction of the model, made at `time`, that nobody will speak for the next `horizon` seconds."""

    time: float
    horizon: float
    probability: float


@dataclass(frozen=True)
class WordStarted:
    """Streaming: a word began at `start`; its end is not known yet, and neither may be the end of its text."""

    text: str
    start: float


@dataclass(frozen=True)
class WordEnded:
    """Streaming: a word that had started is complete."""

    word: Word


Event = WordStarted | WordEnded | Pause
