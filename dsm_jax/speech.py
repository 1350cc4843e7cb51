"""The speech that a model makes of a text.

Shape letters: T samples, Q codebooks, F frames.
"""

import os
from dataclasses import dataclass, field

import numpy as np

from dsm_jax import audio
from dsm_jax.errors import SpeechError, plural


def no_words(turns: int) -> SpeechError:
    """Return the error for a script of so many turns without a word."""
    return SpeechError(
        f"the text ({plural(turns, 'turn')}) has no word in it, and at least one is needed: give a text to say"
    )


@dataclass(frozen=True)
class SpokenWord:
    """A word of the text, its start in the audio in seconds, and its end: the next word's start, or the end."""

    text: str
    start: float
    end: float


@dataclass(frozen=True, eq=False)  # arrays cannot be compared as one
class Speech(audio.Recorded):
    """Speech, with the times of its words; a recording, wherever one is taken.

    Attributes:
      pcm: float32 samples [T] in [-1, 1].
      sample_rate: Hz.
      words: in order; none from a conversational speech model, which does not know when it says which word.
      frames: int32 [1 + Q, F] of a text-to-speech model, the text tokens as fed to the model and the codes, delays
        undone; the first `audio_delay` of them have no audio, and -1 for it. Of a conversational speech model [Q, F],
        the codes.
      model: name of the model.
      complete: whether the text was said to its end; otherwise the speech is the part that was made until `max_frames`.
      text: of the words; from a conversational speech model, of the turn.
    """

    pcm: np.ndarray = field(repr=False)
    sample_rate: int
    words: tuple[SpokenWord, ...]
    frames: np.ndarray = field(repr=False)
    model: str
    complete: bool = True
    text: str = ""

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.pcm.size / self.sample_rate

    def to_dict(self) -> dict:
        """Return all but the sound, as plain values that `json` can write."""
        return {
            "model": self.model,
            "duration": round(self.duration, 3),
            "text": self.text,
            "words": [{"text": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in self.words],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sound to a file; its suffix chooses the format, see `audio.write`.

        Raises:
          AudioError: the suffix is unknown, or the place cannot be written.
        """
        audio.write(path, self.pcm, self.sample_rate)


class IncompleteSpeechError(SpeechError):
    """A text that was not said to its end, within `max_frames` or before a server broke off.

    Attributes:
      speech: the part that was said.
    """

    def __init__(self, message: str, speech: Speech):
        super().__init__(message)
        self.speech = speech

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.speech)
