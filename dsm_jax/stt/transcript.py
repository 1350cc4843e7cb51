"""The transcription of one recording, and its formats: text, JSON, subtitles and a table."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dsm_jax import files
from dsm_jax.errors import ConfigError
from dsm_jax.stt import subtitles
from dsm_jax.stt.events import Pause, Word

SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt", "tsv": ".tsv"}


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
class Segment:
    """A phrase of a transcript: as many words as a subtitle shows at once, with its times in seconds.

    `dsm_jax.csm.Segment` is another class: a turn of a conversation.
    """

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """The transcription of one recording.

    Attributes:
      text: all that was said, in reading order.
      words: in order of their start.
      pauses: in order of time; empty for a model without pause heads.
      duration: length of the audio, seconds.
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

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The words in phrases, which break at pauses and at the ends of sentences; see `subtitles`."""
        return tuple(
            Segment(" ".join(cue.lines), cue.start_ms / 1000, cue.end_ms / 1000) for cue in subtitles.cues(self.words)
        )

    def to_srt(self) -> str:
        """Return SubRip subtitles."""
        return subtitles.srt(self.words)

    def to_vtt(self) -> str:
        """Return WebVTT subtitles."""
        return subtitles.vtt(self.words)

    def to_tsv(self) -> str:
        """Return a table with whisper's columns: start and end in milliseconds, and text; one row per segment."""
        return subtitles.tsv(self.words)

    def to_dict(self) -> dict[str, object]:
        """Return the transcript as plain values that `json` can write.

        Returns:
          The keys audio, model, duration, text, words, segments, pauses, and frames if there are any. Times are rounded
          to 3 decimals, probabilities to 4, or to 6 in frames.
        """
        result: dict[str, object] = {
            "audio": self.audio,
            "model": self.model,
            "duration": _rounded(self.duration, 3),
            "text": self.text,
            "words": [word_dict(word) for word in self.words],
            "segments": [{"text": s.text, "start": s.start, "end": s.end} for s in self.segments],
            "pauses": [pause_dict(pause) for pause in self.pauses],
        }
        if self.frames is not None:
            rows = self.frames.pause_probabilities
            result["frames"] = {
                "text_tokens": [int(token) for token in self.frames.text_tokens],
                "pause_probabilities": None if rows is None else [[_rounded(p, 6) for p in row] for row in rows],
            }
        return result

    def render(self, format: str) -> str:
        """Return the transcript as the content of a file.

        Args:
          format: one of `SUFFIXES`: "text", "json", "srt", "vtt" or "tsv".

        Returns:
          The content, ending in a newline unless it is empty.

        Raises:
          ConfigError: there is no such format.
        """
        if format == "text":
            return self.text + "\n" if self.text else ""
        if format == "json":
            return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        subtitle = {"srt": self.to_srt, "vtt": self.to_vtt, "tsv": self.to_tsv}
        if format not in subtitle:
            raise ConfigError(f"the format {format!r} is unknown; expected one of {', '.join(SUFFIXES)}")
        return subtitle[format]()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the transcript to a file; its suffix chooses the format.

        Args:
          path: ends in .txt, .json, .srt, .vtt or .tsv. A file already there is replaced once the new one is whole.

        Raises:
          ConfigError: the suffix is another one, the folder does not exist, or the place cannot be written.
        """
        formats = {suffix: name for name, suffix in SUFFIXES.items()}
        if (suffix := Path(path).suffix.lower()) not in formats:
            raise ConfigError(f"{path} ends in {suffix!r}; expected one of {', '.join(formats)}")
        files.check_folder_of(path, ConfigError)
        try:
            files.write_text(path, self.render(formats[suffix]))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}). Choose another place.") from error

    def text_with_pauses(self) -> str:
        """Return the words in order, with "[pause]" wherever the model predicted that nobody would speak."""
        told = [(word.end, word.text) for word in self.words] + [(p.time, "[pause]") for p in self.pauses]
        return " ".join(text for _, text in sorted(told, key=lambda item: item[0]))


def word_dict(word: Word) -> dict[str, object]:
    """Return a word as plain values."""
    return {
        "text": word.text,
        "start": _rounded(word.start, 3),
        "end": _rounded(word.end, 3),
        "probability": _rounded(word.probability, 4),
    }


def pause_dict(pause: Pause) -> dict[str, object]:
    """Return a pause as plain values."""
    return {
        "time": _rounded(pause.time, 3),
        "horizon": _rounded(pause.horizon, 3),
        "probability": _rounded(pause.probability, 4),
    }


def _rounded(value: float, digits: int) -> float:
    return round(float(value), digits)  # float() first: numpy scalars round to numpy scalars, which json refuses
