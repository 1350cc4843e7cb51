"""Requests to a text-to-speech model and their options."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsm_jax.checkpoints import Model
from dsm_jax.errors import CheckpointError, ConfigError, DsmError, SpeechError
from dsm_jax.models.family import require
from dsm_jax.options import check_numbers, check_sampling
from dsm_jax.speech import SpokenWord
from dsm_jax.tts.script import Entry
from dsm_jax.tts.state import TtsSettings
from dsm_jax.tts.voices import Voice
from dsm_jax.tts.words import WordMachine


@dataclass(frozen=True, kw_only=True)
class SynthesizeOptions:
    """Options of a synthesis.

    Attributes:
      guidance_scale: how closely to follow text and voice, from 1 (no guidance). Models with distilled guidance know
        some values only (1 to 4 in steps of 0.5); others compute twice as much for any value but 1.
      temperature: of the sampling; 0 takes the most probable tokens; None takes the checkpoint's, or 0.6.
      top_k: sample audio tokens among so many of the most probable; 0 is all.
      top_k_text: the same for text tokens.
      seed: of the sampling.
      codebooks: how many to generate, from 1: fewer are faster and sound worse; None is all of the model's.
      padding_between: frames to leave between words; 1 makes the speech clearer.
      padding_bonus: added to the score of silence: above 0 speaks slower, below 0 faster.
      initial_padding: frames before the first word.
      max_padding: frames without a new word after which one is ordered.
      final_padding: frames after the end of the text, in which the last word sounds.
      max_frames: frames after which to give up.
      on_unsayable: "error" refuses a text with a word that the tokenizer cannot spell or a tag that is unknown; "skip"
        leaves it out and logs it.

    Raises:
      ConfigError: a value out of its range.
    """

    guidance_scale: float = 2.0
    temperature: float | None = None
    top_k: int = 250
    top_k_text: int = 25
    seed: int = 0
    codebooks: int | None = None
    padding_between: int = 1
    padding_bonus: float = 0.0
    initial_padding: int = 2
    max_padding: int = 8
    final_padding: int = 4
    max_frames: int = 30_000
    on_unsayable: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_sampling(temperature=self.temperature, top_k=self.top_k, top_k_text=self.top_k_text, seed=self.seed)
        least = {
            "guidance_scale": 1,
            "codebooks": 1,
            "padding_between": 0,
            "initial_padding": 0,
            "max_padding": 0,
            "final_padding": 0,
            "max_frames": 1,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < math.inf:
                raise ConfigError(f"{name} is {value}; expected {smallest} or more")
        if not math.isfinite(self.padding_bonus):
            raise ConfigError(f"padding_bonus is {self.padding_bonus}; expected a finite number")
        if self.on_unsayable not in ("error", "skip"):
            raise ConfigError(f"on_unsayable is {self.on_unsayable!r}; expected 'error' or 'skip'")

    def checked(self, model: Model) -> "SynthesizeOptions":
        """Return these options, which fit the model.

        Raises:
          CheckpointError: the model speaks in two streams of audio, which is not supported.
          ConfigError: more codebooks than the model generates.
          ModelKindError: the model does not speak.
        """
        require(model, "tts")
        lm, tts, name = model.config.lm, model.config.tts, model.name
        assert lm is not None
        assert tts is not None
        if tts.multistream:
            raise CheckpointError(f"{name} generates two speakers in streams of their own, which is not supported")
        if self.codebooks is not None and self.codebooks > lm.dep_q:
            raise ConfigError(f"{self.codebooks} codebooks are to be generated; {name} makes 1 to {lm.dep_q}")
        return self

    def fits(self, model: Model) -> bool:
        """Tell whether the model can honour these options."""
        try:
            self.checked(model)
        except DsmError:
            return False
        return True

    def temperature_of(self, model: Model) -> float:
        """Return the temperature: these options', the checkpoint's, or 0.6."""
        default = 0.6 if model.config.sampling.temp is None else model.config.sampling.temp
        return default if self.temperature is None else self.temperature


def delay_steps_of(model: Model) -> int:
    """Return how many steps a model's audio is behind its text."""
    assert model.config.tts is not None
    return int(model.config.tts.audio_delay * model.config.mimi.frame_rate)


def settings_of(
    model: Model, slots: int, *, max_top_k_text: int = 32, max_top_k_audio: int = 256, guided: bool = False
) -> TtsSettings:
    """Return the settings of a model's program.

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
        delay_steps=delay_steps_of(model),
        max_top_k_text=max_top_k_text,
        max_top_k_audio=max_top_k_audio,
        guided=guided,
    )


@dataclass(frozen=True)
class Turn:
    """One speaker's part of a dialogue.

    Attributes:
      text: of the turn; `<break time="0.5s"/>` is a pause.
      voice: of the speaker; None takes the `voice` that is given for the whole.
    """

    text: str
    voice: Voice | None = None


@dataclass(frozen=True)
class Dialogue:
    """A conversation between at most two speakers, who are told apart by their voices.

    Attributes:
      turns: in order.
    """

    turns: Sequence[Turn]

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        if not self.turns or not all(isinstance(turn, Turn) for turn in self.turns):
            kinds = sorted({type(turn).__name__ for turn in self.turns}) or "nothing"
            raise SpeechError(f"a dialogue was made of {kinds}; expected one or more Turn(text, voice)")


@dataclass(frozen=True)
class Request:
    """A text to say, as the runtime reads it.

    Attributes:
      text: one turn, or the turns of alternating speakers, the first one's first.
      voices: of the speakers, the first one's first: names, files or arrays, see `voices.read_voice`; for a model
        without speaker conditioning one recording to go on from.
      seed: of its sampling; None takes the options'.
      options: of its synthesis; None takes those that are given for all requests.
    """

    text: str | tuple[str, ...]
    voices: tuple[Voice, ...] = ()
    seed: int | None = None
    options: SynthesizeOptions | None = None

    @property
    def turns(self) -> tuple[str, ...]:
        """The text as turns."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @classmethod
    def of(
        cls, text: "str | Dialogue | Request", voice: Voice | None = None, options: SynthesizeOptions | None = None
    ) -> "Request":
        """Make the request for a text or a dialogue.

        Raises:
          SpeechError: it is neither, or a dialogue of more than two voices.
        """
        if isinstance(text, Request):
            return text if text.options is not None else dataclasses.replace(text, options=options)
        if isinstance(text, str):
            return cls(text, () if voice is None else (voice,), options=options)
        if not isinstance(text, Dialogue):
            raise SpeechError(f"the text is {type(text).__name__}; expected a str, a Dialogue, or several of these")
        spoken: list[str] = []
        voices: list[Voice] = []
        last = -1
        for turn in text.turns:
            own = voice if turn.voice is None else turn.voice
            speaker = 0 if own is None else _place(voices, own)
            if speaker == last:
                spoken[-1] += " " + turn.text
            else:
                spoken += [turn.text] if speaker == len(spoken) % 2 else ["", turn.text]
            last = speaker
        if len(voices) > 2:
            raise SpeechError(f"the dialogue has {len(voices)} voices; the models know two speakers")
        return cls(tuple(spoken), tuple(voices), options=options)


def _place(voices: list[Voice], voice: Voice) -> int:
    """Return the place of a voice among those known so far, and add it if it is new."""
    for place, known in enumerate(voices):
        if known is voice or (
            isinstance(known, str | os.PathLike) and isinstance(voice, type(known)) and known == voice
        ):
            return place
    voices.append(voice)
    return len(voices) - 1


def words_at(
    entries: Sequence[Entry], steps: Sequence[int], first_step: int, frame_rate: float, end: float
) -> list[SpokenWord]:
    """Return the words of a script, with times in seconds, from the steps at which its entries began.

    Args:
      entries: words and breaks of the script; breaks are left out.
      steps: the step at which each entry began; entries beyond the last step have not begun, and are left out.
      first_step: the step at which the sound begins.
      frame_rate: steps per second.
      end: end of the last word, in seconds.
    """
    begun = [
        (entry.text, (step - first_step) / frame_rate)
        for entry, step in zip(entries, steps, strict=False)
        if entry.tokens
    ]
    ends = [*(start for _, start in begun[1:]), end][: len(begun)]
    return [SpokenWord(text, start, max(start, until)) for (text, start), until in zip(begun, ends, strict=True)]
