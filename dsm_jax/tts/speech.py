"""What is asked of a model that speaks, and what it gives back.

Shape letters: T samples, Q codebooks, F frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import CheckpointError, DsmError, SpeechError
from dsm_jax.models.family import require
from dsm_jax.tts.program import TtsSettings
from dsm_jax.tts.script import Entry
from dsm_jax.tts.voices import Voice
from dsm_jax.tts.words import WordMachine


@dataclass(frozen=True, kw_only=True)
class SpeechOptions:
    """How to speak.

    Attributes:
      guidance: how closely to follow text and voice, from 1 (not guided). Models with distilled guidance know some
        values only (1 to 4 in steps of 0.5); others compute twice as much for any value but 1.
      temperature: of the sampling; 0 takes the most probable tokens; None takes the checkpoint's, or 0.6.
      top_k_text, top_k_audio: tokens are drawn from so many of the most probable; 0 is all.
      codebooks: how many to generate, from 1: fewer are faster and sound worse; None is all of the model's.
      padding_between: frames to leave between words; 1 makes the speech clearer.
      padding_bonus: added to the score of saying nothing: above 0 speaks slower, below 0 faster.
      initial_padding: frames before the first word.
      max_padding: frames without a new word after which one is ordered.
      final_padding: frames after the end of the text, in which the last word sounds.
      max_frames: frames after which to give up.
      seed: of the sampling.
    """

    guidance: float = 2.0
    temperature: float | None = None
    top_k_text: int = 25
    top_k_audio: int = 250
    codebooks: int | None = None
    padding_between: int = 1
    padding_bonus: float = 0.0
    initial_padding: int = 2
    max_padding: int = 8
    final_padding: int = 4
    max_frames: int = 30_000
    seed: int = 0

    def checked(self, model: Model) -> "SpeechOptions":
        """Returns these options, which fit the model.

        Raises:
          CheckpointError: the model does not speak.
          SpeechError: a value out of its range.
        """
        require(model, "tts")
        lm, tts, name = model.config.lm, model.config.tts, model.name
        assert lm is not None
        assert tts is not None
        if tts.multistream:
            raise CheckpointError(f"{name} generates two speakers in streams of their own, which is not supported")
        numbers = {
            "temperature": (self.temperature_of(model), 0),
            "top_k_text": (self.top_k_text, 0),
            "top_k_audio": (self.top_k_audio, 0),
            "final_padding": (self.final_padding, 0),
            "max_padding": (self.max_padding, 0),
            "initial_padding": (self.initial_padding, 0),
            "guidance": (self.guidance, 1),
            "max_frames": (self.max_frames, 1),
        }
        if not np.isfinite(self.padding_bonus):
            raise SpeechError(f"padding_bonus is {self.padding_bonus}, and must be finite: give another value")
        for key, (value, least) in numbers.items():
            if not (np.isfinite(value) and value >= least):
                raise SpeechError(f"{key} is {getattr(self, key)}, and must be {least} or more: give another value")
        if self.codebooks is not None and not 1 <= self.codebooks <= lm.dep_q:
            raise SpeechError(f"{self.codebooks} codebooks are to be generated; {name} makes 1 to {lm.dep_q}")
        return self

    def fits(self, model: Model) -> bool:
        """Tells whether the model can honour these options."""
        try:
            self.checked(model)
        except DsmError:
            return False
        return True

    def temperature_of(self, model: Model) -> float:
        """Returns the temperature: these options', the checkpoint's, or 0.6."""
        default = 0.6 if model.config.sampling.temp is None else model.config.sampling.temp
        return default if self.temperature is None else self.temperature


def settings_of(
    model: Model, slots: int, *, max_top_k_text: int = 32, max_top_k_audio: int = 256, guided: bool = False
) -> TtsSettings:
    """Returns the settings of a model's program.

    Args:
      model: a text-to-speech model.
      slots: number of slots.
      max_top_k_text: the largest top-k of text tokens that a request may choose.
      max_top_k_audio: the same of audio tokens.
      guided: whether requests may choose classifier-free guidance.
    """
    lm, tts = model.config.lm, model.config.tts
    assert lm is not None
    assert tts is not None
    return TtsSettings(
        slots=slots,
        machine=WordMachine(lm.text_card + 1, tts.second_stream_ahead),
        delay_steps=int(tts.audio_delay * model.config.mimi.frame_rate),
        max_top_k_text=max_top_k_text,
        max_top_k_audio=max_top_k_audio,
        guided=guided,
    )


@dataclass(frozen=True)
class Request:
    """Something to say.

    Attributes:
      text: one turn, or the turns of a conversation between two speakers.
      voices: of the speakers, the first one's first: names, files or arrays, see `voices.read_voice`; for a model
        without speaker conditioning one recording to go on from.
      seed: of its sampling; None takes the options'.
      options: how to say it; None takes those that are given for all requests.
    """

    text: str | tuple[str, ...]
    voices: tuple[Voice, ...] = ()
    seed: int | None = None
    options: SpeechOptions | None = None

    @property
    def turns(self) -> tuple[str, ...]:
        """The text as turns."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)


@dataclass(frozen=True)
class SpokenWord:
    """A word of the text and where it begins in the audio, in seconds; `end` is where the next begins, or the end."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Speech:
    """Speech, and how it came about.

    Attributes:
      pcm: float32 samples [T] in [-1, 1].
      sample_rate: Hz.
      words: in order.
      frames: int32 [1 + Q, F], the text tokens as fed to the model and the codes, delays undone; the first
        `audio_delay` of them have no audio, and -1 for it.
      model: name of the model.
    """

    pcm: np.ndarray = field(repr=False)
    sample_rate: int
    words: tuple[SpokenWord, ...]
    frames: np.ndarray = field(repr=False)
    model: str

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.pcm.size / self.sample_rate

    def to_json(self) -> dict:
        """All but the sound, as plain values."""
        return {
            "model": self.model,
            "duration": round(self.duration, 3),
            "text": " ".join(word.text for word in self.words),
            "words": [{"text": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in self.words],
        }


def words_at(
    entries: Sequence[Entry], steps: Sequence[int], first_step: int, frame_rate: float, end: float
) -> list[SpokenWord]:
    """The words of a script from the steps at which its entries were taken."""
    begun = [
        (entry.text, (step - first_step) / frame_rate)
        for entry, step in zip(entries, steps, strict=False)
        if entry.tokens
    ]
    ends = [start for _, start in begun[1:]] + [end]
    return [SpokenWord(text, start, max(start, until)) for (text, start), until in zip(begun, ends, strict=True)]
