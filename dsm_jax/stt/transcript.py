"""What transcription gives back: words and pauses with their times, whole or one event at a time.

All times are seconds from the start of the audio; all probabilities are in [0, 1].
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """One spoken word and how sure the model was of it."""

    text: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Pause:
    """The model judged, at `time`, that nobody will speak for the next `horizon` seconds."""

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


@dataclass(frozen=True)
class Frames:
    """The model's raw output, one entry per 80 ms frame.

    Attributes:
      text_tokens: the text token of each frame.
      pause_probabilities: for each frame, the probability of silence over the next 0.5, 1, 2 and 3 seconds; None for
        a model without pause heads.
    """

    text_tokens: tuple[int, ...]
    pause_probabilities: tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True)
class Transcript:
    """The transcription of one recording.

    Attributes:
      text: all that was said, in reading order.
      words: in order of their start.
      pauses: in order of time; empty for a model without pause heads.
      duration: of the audio, seconds.
      frames: the raw output, where it was asked for.
      audio: name of the recording, where it has one.
      model: name of the model.
    """

    text: str
    words: tuple[Word, ...]
    pauses: tuple[Pause, ...]
    duration: float
    frames: Frames | None = None
    audio: str | None = None
    model: str | None = None

    def to_json(self) -> dict[str, object]:
        """Turns the transcript into plain values that `json` can write.

        Returns:
          The keys audio, model, duration, text, words, pauses, and frames if there are any. Times are rounded to 3
          decimals, probabilities to 4, or to 6 in frames.
        """
        result: dict[str, object] = {
            "audio": self.audio,
            "model": self.model,
            "duration": _rounded(self.duration, 3),
            "text": self.text,
            "words": [
                {
                    "text": word.text,
                    "start": _rounded(word.start, 3),
                    "end": _rounded(word.end, 3),
                    "probability": _rounded(word.probability, 4),
                }
                for word in self.words
            ],
            "pauses": [
                {
                    "time": _rounded(pause.time, 3),
                    "horizon": _rounded(pause.horizon, 3),
                    "probability": _rounded(pause.probability, 4),
                }
                for pause in self.pauses
            ],
        }
        if self.frames is not None:
            rows = self.frames.pause_probabilities
            result["frames"] = {
                "text_tokens": [int(token) for token in self.frames.text_tokens],
                "pause_probabilities": None if rows is None else [[_rounded(p, 6) for p in row] for row in rows],
            }
        return result


def _rounded(value: float, digits: int) -> float:
    return round(float(value), digits)  # float() first: numpy scalars round to numpy scalars, which json refuses
