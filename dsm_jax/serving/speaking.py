"""Text to speech for clients: sessions whose text arrives in pieces, and whose sound leaves frame by frame.

Shape letters: X steps of a voice, C its width, T samples.
"""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.csm.conversation import Request as TurnRequest
from dsm_jax.csm.conversation import Segment
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.synthesizer import ConversationSession, ConversationSynthesizer
from dsm_jax.errors import ConfigError, SpeechError
from dsm_jax.runtime.slots import Slots
from dsm_jax.runtime.steps import Leave
from dsm_jax.serving.outbox import Outbox
from dsm_jax.speaking import SpeakingSession
from dsm_jax.tts import voices
from dsm_jax.tts.host import SpeechRequest
from dsm_jax.tts.live import STEPS
from dsm_jax.tts.script import MAIN, MIN_ENTRIES, MIN_TOKENS, Entry, more_entries
from dsm_jax.tts.speech import Request, SynthesizeOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer

LAG_S = 60.0  # of sound that waits for its listener, after which the session takes no more steps
TURN_CHARACTERS = 1_000  # of a turn of a conversation: about a minute


@dataclasses.dataclass(frozen=True, eq=False)
class Sound:
    """A frame of speech: float32 samples [T]."""

    pcm_T: np.ndarray


@dataclasses.dataclass(frozen=True)
class Said:
    """A word whose end is known, with its times in the sound, in seconds."""

    text: str
    start: float
    stop: float


class LiveVoice(SpeakingSession[Any], ABC):
    """One client's text and its sound, whatever the family of the model.

    Attributes:
      outbox: messages to the client: `Sound` and `Said`.
      is_file: whether the session may wait for a slot.
      can_start: whether there is enough text to take the slot.
      first_sound: seconds from the start in a slot to the first sound; None before.
    """

    outbox: Outbox
    is_file: bool
    can_start: bool
    first_sound: float | None

    @abstractmethod
    def say(self, text: str) -> None:
        """Add text, of which every word is whole.

        Raises:
          SpeechError: text that cannot be said, or more than the server takes.
        """

    @abstractmethod
    def finish(self) -> None:
        """End the text.

        Raises:
          SpeechError: the text cannot be said.
        """

    @abstractmethod
    def due(self, now: float) -> float:
        """Return the time at which a step can be taken."""

    @abstractmethod
    def take_messages(self) -> list[Any]:
        """Return the messages to the client since the last call."""


class SpeakingService(Protocol):
    """A model that speaks, for clients: its slots, warmed up, and its voices."""

    model: Model
    voices: Mapping[str, Any]
    default_voice: str | None
    step_seconds: dict[int, float]

    @property
    def slots(self) -> Slots[Any]:
        """The slots of the program."""
        ...

    def session(
        self, outbox: Outbox, *, voice: str | None = None, seed: int | None = None, is_file: bool = False
    ) -> LiveVoice:
        """Make a session.

        Raises:
          SpeechError: the voice is unknown.
        """
        ...


def service_for(model: Model, slots: int, **settings: Any) -> SpeakingService:
    """Make the service of a model that speaks; the settings are those of `ScriptService` or `TurnService`."""
    kind = TurnService if model.config.model_type == "csm" else ScriptService
    return kind(model, slots, **settings)


def _chosen(voices: Mapping[str, Any], voice: str | None, default: str | None, model: Model) -> Any:
    """Return the voice that a client named, or the default one."""
    name = default if voice is None else voice
    if name not in voices:
        raise SpeechError(f"the voice {name!r} is unknown; {model.name} has {', '.join(voices) or 'none'}")
    return voices[name]


def _check_characters(text: str) -> None:
    """Refuse halves of characters, which JSON can hold and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpeechError(f"the text has half of a character at {error.start}; send whole ones") from None


class ScriptService:
    """A text-to-speech model for clients.

    Args:
      model: a text-to-speech model.
      slots: sessions at a time.
      options: of the synthesis.
      folder: of more voices; None for the model's own alone.
      default_voice: name of the voice of clients that name none; None takes the first.
      clock: seconds, monotonic.

    Raises:
      ConfigError: there is no voice of the default's name, or none at all for a model that needs one.
      As `Synthesizer`.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        *,
        options: SynthesizeOptions = SynthesizeOptions(),
        folder: Path | None = None,
        default_voice: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.options, self.clock = model, options, clock
        self.synthesizer = Synthesizer(model, slots, [options], limit=STEPS, behind=0)
        self.voices = self._read_voices(folder)
        self.default_voice = _default(self.voices, default_voice, model)
        bases = list(self.voices.values())
        self._room = max((voices.positions(base.voices) for base in bases), default=0)
        self._slots = self.synthesizer.slots_for(*bases)
        self.step_seconds: dict[int, float] = {}
        self._warm_up()

    @property
    def slots(self) -> Slots[Any]:
        """The slots of the program."""
        return self._slots

    def _read_voices(self, folder: Path | None) -> dict[str, SpeechRequest]:
        """Prepare a request without text for each voice, so that a client's session reads no file."""
        files = dict(voices.voices_of(self.model))
        has_speakers = voices.has_speakers(self.synthesizer.lm)
        if folder is not None:
            suffixes = (".safetensors",) if has_speakers else audio.SUFFIXES
            files |= {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in suffixes}
        if not has_speakers and not files:
            return {"default": self._prepared(())}
        if not files:
            raise ConfigError(f"{self.model.name} needs voices and has none of its own; give a folder of them")
        return {name: self._prepared((path,)) for name, path in files.items()}

    def _prepared(self, given: tuple[voices.Voice, ...]) -> SpeechRequest:
        return self.synthesizer.prepare(Request((), given), self.options, entries=[], complete=False)

    def _warm_up(self) -> None:
        """Run all that clients will run."""
        session = self.session(Outbox())
        word = _sayable(self)
        session.say(word)
        self.slots.admit([session])
        session.say(word)
        session.finish()
        seconds = []
        while not session.ended:
            start = time.perf_counter()
            self.slots.step()
            seconds.append(time.perf_counter() - start)
        self.step_seconds[STEPS] = float(np.median(seconds))

    def entries(self, text: str, speaker: int | None) -> list[Entry]:
        """Return the words and breaks of a piece of text; `speaker` as for `more_entries`."""
        return more_entries(
            (text,),
            self.synthesizer.tokenizer,
            frame_rate=self.model.config.mimi.frame_rate,
            multi_speaker=voices.has_speakers(self.synthesizer.lm),
            padding_between=self.options.padding_between,
            skip_unsayable=self.options.on_unsayable == "skip",
            speaker=speaker,
        )

    def session(
        self, outbox: Outbox, *, voice: str | None = None, seed: int | None = None, is_file: bool = False
    ) -> "LiveSpeech":
        """Make a session.

        Raises:
          SpeechError: the voice is unknown.
        """
        base = _chosen(self.voices, voice, self.default_voice, self.model)
        base = base if seed is None else dataclasses.replace(base, seed=seed)
        return LiveSpeech(self, outbox, base, is_file=is_file)

    def with_voice(self, base: SpeechRequest, voice_XC: np.ndarray) -> SpeechRequest:
        """Return a request with a voice that a client has sent.

        Raises:
          SpeechError: the model cannot take the voice, or it is longer than the server's own.
        """
        if not voices.has_speakers(self.synthesizer.lm):
            raise SpeechError(f"{self.model.name} takes no vectors as a voice; choose one by its name")
        if (needed := voices.positions([voice_XC])) > self._room:
            raise SpeechError(
                f"the voice has {len(voice_XC)} steps; this server takes up to {self._room * len(voice_XC) // needed}"
            )
        voices.conditions(self.synthesizer.lm, [[voice_XC]], base.condition_guidance)
        return dataclasses.replace(base, voices=[voice_XC])


def _default(known: Mapping[str, Any], name: str | None, model: Model) -> str:
    """Return the name of the default voice."""
    if name is None:
        return next(iter(known))
    if name not in known:
        raise ConfigError(f"the default voice {name!r} is none of those of {model.name}: {', '.join(known)}")
    return name


def _sayable(service: ScriptService) -> str:
    """Return a word that the model's tokenizer can spell."""
    for word in ("hello", "one", "a", "e"):
        try:
            if service.entries(word, None):
                return word
        except SpeechError:
            continue
    raise ConfigError(f"{service.model.name} can spell no common word; take a tokenizer of the model's language")


class LiveSpeech(SpeechSession, LiveVoice):
    """One client's text, spoken while it arrives.

    The event loop calls `say`, `use_voice` and `finish`; all else is the engine's.

    Args:
      service: of the model.
      outbox: messages to the client.
      base: request of the voice, without text.
      is_file: whether the session may wait for a slot.
    """

    def __init__(self, service: ScriptService, outbox: Outbox, base: SpeechRequest, *, is_file: bool = False):
        super().__init__(service.model, base)
        self.outbox, self.is_file, self.can_start = outbox, is_file, False
        self.first_sound: float | None = None
        self._service, self._base = service, base
        self._inbox: deque[Entry | None] = deque()  # None ends the text
        self._entries: list[Entry] = []
        self._count = self._tokens = 0  # of all entries that were added
        self._has_words = False
        self._told = 0  # entries that were returned as `Said`
        self._sounds: list[np.ndarray] = []
        self._started = service.clock()

    def use_voice(self, voice_XC: np.ndarray) -> None:
        """Speak with vectors of the client's own; they count before the first word.

        Raises:
          SpeechError: the model cannot take them.
        """
        if not self._has_words:
            self._base = self._service.with_voice(self._base, voice_XC)

    def say(self, text: str) -> None:
        """Add text; see `LiveVoice.say`."""
        _check_characters(text)
        entries = self._service.entries(text, MAIN if self._has_words else None)
        self._count += len(entries)
        self._tokens += sum(len(entry.tokens) for entry in entries)
        if self._count > MIN_ENTRIES or self._tokens > MIN_TOKENS:
            raise SpeechError(
                f"the text has {self._count} words and breaks, of {self._tokens} tokens; this server takes up to "
                f"{MIN_ENTRIES}, of {MIN_TOKENS}, in one session: end it, and begin another"
            )
        self._has_words = self._has_words or any(entry.tokens for entry in entries)
        self._inbox.extend(entries)
        self.can_start = self._has_words

    def finish(self) -> None:
        """End the text; see `LiveVoice.finish`."""
        if not self._has_words:
            raise SpeechError("the text has no word in it; send one before its end")
        self._inbox.append(None)

    def _collect(self) -> SpeechRequest:
        """Return the request with all text that has arrived."""
        complete = self.prepared.complete
        while self._inbox:
            entry = self._inbox.popleft()
            if entry is None:
                complete = True
            else:
                self._entries.append(entry)
        return dataclasses.replace(self._base, entries=list(self._entries), complete=complete)

    def request(self) -> SpeechRequest:
        """Return the request with the text so far."""
        self._prepared, self._prefix_left = self._collect(), self._base.prefix_QT.shape[1]
        self._started = self._service.clock()
        return self.prepared

    def due(self, now: float) -> float:
        """Return the time at which a step can be taken."""
        if self._lags():
            return math.inf
        return now if self._inbox or not self.waits else math.inf

    def _lags(self) -> bool:
        return len(self.outbox) > LAG_S * self.model.config.mimi.frame_rate

    def take_input(self) -> Leave | None:
        """Give new text to the slot; let the slot take steps unless it waits for text or its listener lags."""
        if self._inbox:
            self._service.synthesizer.extend(self, self._collect())
        return None if self._lags() else super().take_input()

    def add_pcm(self, pcm_T: np.ndarray) -> None:
        """Take samples that were made; they are not kept for a whole speech."""
        if pcm_T.size and self.first_sound is None:
            self.first_sound = self._service.clock() - self._started
        self._samples += pcm_T.size
        size = self.model.config.mimi.frame_size
        self._sounds += [pcm_T[at : at + size] for at in range(0, pcm_T.size, size)]

    def take_messages(self) -> list[Any]:
        """Return the words that have ended, and the sound that was made, since the last call."""
        begun = len(self._taken)
        whole = begun if self.ended else begun - 1
        said = [self._said(index) for index in range(self._told, max(self._told, whole))]
        self._told = max(self._told, whole)
        sounds, self._sounds = self._sounds, []
        return [*said, *map(Sound, sounds)]

    def _said(self, index: int) -> Said:
        entry, rate = self._entries[index], self.model.config.mimi.frame_rate
        first = self._base.prefix_QT.shape[1]
        start = (self._taken[index] - first) / rate
        end = self._samples / self.model.sample_rate
        stop = (self._taken[index + 1] - first) / rate if index + 1 < len(self._taken) else max(start, end)
        return Said(entry.text or f'<break time="{entry.padding / rate:.2f}s">', start, stop)


class TurnService:
    """A conversational speech model for clients.

    A voice is a recording `NAME.wav` in a folder, with its words in `NAME.txt`: the context of each turn.

    Args:
      model: a conversational speech model.
      slots: sessions at a time.
      options: of the synthesis.
      folder: of voices; None for none: the model chooses a voice by itself.
      default_voice: name of the voice of clients that name none; None takes the first.
      clock: seconds, monotonic.

    Raises:
      ConfigError: a recording without its words, or no voice of the default's name.
      As `ConversationSynthesizer`.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        *,
        options: CsmOptions = CsmOptions(),
        folder: Path | None = None,
        default_voice: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.options, self.clock = model, options, clock
        self.synthesizer = ConversationSynthesizer(model, slots, limit=1, behind=0)
        self.voices: dict[str, tuple[Segment, ...]] = _segments(folder) or {"default": ()}
        self.default_voice = _default(self.voices, default_voice, model)
        longest = "a " * (TURN_CHARACTERS // 2)
        requests = [
            self.synthesizer.prepare(TurnRequest(longest, 0, context), options) for context in self.voices.values()
        ]
        self._slots = self.synthesizer.slots_for(*requests)
        self.step_seconds: dict[int, float] = {}
        self._warm_up()

    @property
    def slots(self) -> Slots[Any]:
        """The slots of the program."""
        return self._slots

    def _warm_up(self) -> None:
        """Run prompts of all lengths that clients can give, one at a time as they are admitted, and a step."""
        for name in self.voices:
            for characters in range(1, TURN_CHARACTERS, 32):
                session = self.session(Outbox(), voice=name)
                session.say("a " * (characters // 2 + 1))
                session.finish()
                self.slots.admit([session])
                start = time.perf_counter()
                self.slots.step()
                self.step_seconds[1] = time.perf_counter() - start
                self.slots.cancel(session)

    def session(
        self, outbox: Outbox, *, voice: str | None = None, seed: int | None = None, is_file: bool = False
    ) -> "LiveTurn":
        """Make a session.

        Raises:
          SpeechError: the voice is unknown.
        """
        context = _chosen(self.voices, voice, self.default_voice, self.model)
        options = self.options if seed is None else dataclasses.replace(self.options, seed=seed)
        return LiveTurn(self, outbox, context, options, is_file=is_file)


def _segments(folder: Path | None) -> dict[str, tuple[Segment, ...]]:
    """Read the voices of a folder: recordings with their words."""
    found: dict[str, tuple[Segment, ...]] = {}
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.suffix not in audio.SUFFIXES:
            continue
        words = path.with_suffix(".txt")
        if not words.is_file():
            raise ConfigError(f"the voice {path} has no words; write what is said in it to {words.name} beside it")
        found[path.stem] = (Segment(words.read_text(encoding="utf-8").strip(), 0, path),)
    return found


class LiveTurn(ConversationSession, LiveVoice):
    """One client's turn of a conversation, spoken once its text is whole; the arguments are those of `LiveSpeech`."""

    def __init__(
        self,
        service: TurnService,
        outbox: Outbox,
        context: tuple[Segment, ...],
        options: CsmOptions,
        *,
        is_file: bool = False,
    ):
        super().__init__(service.model, None)
        self.outbox, self.is_file, self.can_start = outbox, is_file, False
        self.first_sound: float | None = None
        self._service, self._context, self._options = service, context, options
        self._text: list[str] = []
        self._started = service.clock()
        self._sent = 0

    def say(self, text: str) -> None:
        """Add text; see `LiveVoice.say`."""
        _check_characters(text)
        self._text.append(text)
        if (length := len(" ".join(self._text))) > TURN_CHARACTERS:
            raise SpeechError(f"the turn has {length} characters; this server takes up to {TURN_CHARACTERS}: cut it")

    def finish(self) -> None:
        """End the text; see `LiveVoice.finish`."""
        request = TurnRequest(" ".join(self._text), 0, self._context)
        self._prepared = self._service.synthesizer.prepare(request, self._options)
        self.can_start = True

    def due(self, now: float) -> float:
        """Return the time at which a step can be taken."""
        return math.inf if self._lags() else now

    def _lags(self) -> bool:
        return len(self.outbox) > LAG_S * self.model.config.mimi.frame_rate

    def take_input(self) -> Leave | None:
        """Let the slot take steps unless its listener lags."""
        return None if self._lags() else super().take_input()

    def take_messages(self) -> list[Any]:
        """Return the sound that was made since the last call."""
        size, pcm_T = self.model.config.mimi.frame_size, self.take_pcm()
        if pcm_T.size and self.first_sound is None:
            self.first_sound = self._service.clock() - self._started
        return [Sound(pcm_T[at : at + size]) for at in range(0, pcm_T.size, size)]
