"""Text-to-speech models for clients: text is spoken while it arrives.

Shape letters: X steps of a voice, C its width, T samples.
"""

import dataclasses
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import ConfigError, SpeechError
from dsm_jax.options import check_sampling
from dsm_jax.runtime.slots import Slots
from dsm_jax.runtime.steps import Leave
from dsm_jax.serving.outbox import Outbox
from dsm_jax.serving.speaking import NO_VOICE, LiveVoice, Said, SpeakingService, check_sent_text
from dsm_jax.tts import voices
from dsm_jax.tts.host import SpeechRequest
from dsm_jax.tts.live import STEPS
from dsm_jax.tts.script import MAIN, MIN_ENTRIES, MIN_TOKENS, Entry, more_entries
from dsm_jax.tts.speech import Request, SynthesizeOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer

_LONGEST_TEXT = 32_000  # characters of one piece: more than any session takes, and short enough to be read at once
_PUBLISHED_VOICE = "expresso/ex03-ex01_happy_001_channel1_334s.wav"  # of Kyutai's own examples
_PUBLISHED_STEPS = 125  # of a published voice
_PUBLISHED = re.compile(r"[\w-]+(/[\w.+-]+)+")  # names of published voices; nothing else is asked of the hub
_MADE_FOR = re.compile(r"\.[0-9a-f]{8}@\d+$")


class ScriptService(SpeakingService):
    """A text-to-speech model for clients.

    Voices are the model's own, those of a folder, and for published models those that Kyutai has published, which are
    fetched when they are first named.

    Args:
      model: a text-to-speech model.
      slots: sessions at a time.
      options: of the synthesis.
      folder: of more voices, in folders of its own too; None for none.
      default_voice: name of the voice of clients that name none; None takes the first.
      clock: seconds, monotonic.

    Raises:
      ConfigError: there is no voice for a model that needs one.
      DsmError: the default voice cannot be read.
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
        self._has_speakers = voices.has_speakers(self.synthesizer.lm)
        self._files = self._voice_files(folder)
        self._bases: dict[str, SpeechRequest] = {}
        self.default_voice = self._default(default_voice)
        # Recordings to go on from are encoded now, as the codec would be compiled for each length.
        first = voices.voices_of(model) if self._has_speakers else self._files
        bases = [self.base(name) for name in (self.default_voice, *first)]
        self._longest_voice = max((_PUBLISHED_STEPS, *(len(voice) for base in bases for voice in base.voices)))
        self._slots = self.synthesizer.slots_for(*map(self._with_room, bases))
        self.step_seconds: dict[int, float] = {}
        self._warm_up()

    @property
    def slots(self) -> Slots[Any]:
        """The slots of the program."""
        return self._slots

    @property
    def voices(self) -> Sequence[str]:
        """The names of the voices that are known."""
        return list(dict.fromkeys((self.default_voice, *self._files, *self._bases)))

    def _voice_files(self, folder: Path | None) -> dict[str, Path]:
        """Return the files of the model's own voices and of a folder, by name."""
        files = dict(voices.voices_of(self.model))
        if folder is None:
            return files
        if not folder.is_dir():
            raise ConfigError(f"the folder of voices {folder} does not exist; name one that does")
        model_id = self.model.config.model_id
        own = None if model_id is None else f".{model_id.sig}@{model_id.epoch}"
        for path in sorted(folder.rglob("*")):
            if path.suffix not in ((".safetensors",) if self._has_speakers else audio.SUFFIXES):
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            if made_for := _MADE_FOR.search(name):  # a published voice has a file for each model
                if made_for[0] != own:
                    continue
                name = name.removesuffix(made_for[0])
            files[name] = path
        return files

    def _default(self, name: str | None) -> str:
        if name is not None:
            return name
        if self._files or not self._has_speakers:
            return next(iter(self._files), NO_VOICE)
        if self.model.config.model_id is None:
            raise ConfigError(f"{self.model.name} needs voices and has none of its own; give a folder of them")
        return _PUBLISHED_VOICE

    def base(self, name: str) -> SpeechRequest:
        """Return the request of a voice, without text; it is read once.

        Raises:
          DsmError: the voice is unknown, or cannot be read.
        """
        if name not in self._bases:
            given: tuple[voices.Voice, ...] = (self._files.get(name, name),)
            if name not in self._files and name == NO_VOICE and not self._has_speakers:
                given = ()
            elif name not in self._files and not self._can_fetch(name):
                known = ", ".join(self._files) or "none"
                raise SpeechError(f"the voice {name!r} is unknown; {self.model.name} has {known}")
            request = Request((), given)
            self._bases[name] = self.synthesizer.prepare(request, self.options, entries=[], complete=False)
        return self._bases[name]

    def knows(self, voice: str) -> bool:
        """Tell whether a voice is known, or is one that can be fetched."""
        return voice in self.voices or self._can_fetch(voice)

    def _can_fetch(self, voice: str) -> bool:
        return self._has_speakers and self.model.config.model_id is not None and bool(_PUBLISHED.fullmatch(voice))

    def _with_room(self, base: SpeechRequest) -> SpeechRequest:
        """Return a request whose voice is as long as any that the server takes."""
        if not base.voices:
            return base
        longest = np.zeros((self._longest_voice, base.voices[0].shape[1]), np.float32)
        return dataclasses.replace(base, voices=[longest])

    def _warm_up(self) -> None:
        """Run all that clients will run.

        Raises:
          DsmError: the session has failed.
        """
        session = self.session(Outbox())
        word = _sayable(self)
        session.say(word)
        self.slots.start(session)
        session.say(word)
        session.finish()
        seconds = []
        while not session.ended:
            start = time.perf_counter()
            self.slots.step()
            if session.error is not None:
                raise session.error
            seconds.append(time.perf_counter() - start)
        self.step_seconds[STEPS] = float(np.median(seconds))

    def entries(self, text: str, speaker: int | None) -> list[Entry]:
        """Return the words and breaks of a piece of text; `speaker` as for `more_entries`."""
        return more_entries(
            (text,),
            self.synthesizer.tokenizer,
            frame_rate=self.model.config.mimi.frame_rate,
            multi_speaker=self._has_speakers,
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
        base = self.base(self.default_voice if voice is None else voice)
        for vectors in base.voices:
            self._check_length(vectors)
        if seed is not None:
            check_sampling(temperature=None, seed=seed)  # in the engine it would fail for everyone
            base = dataclasses.replace(base, seed=seed)
        return LiveSpeech(self, outbox, base, is_file=is_file)

    def with_voice(self, base: SpeechRequest, voice_XC: np.ndarray) -> SpeechRequest:
        """Return a request with a voice that a client has sent.

        Raises:
          SpeechError: the model cannot take the voice, or it is longer than any that the server takes.
        """
        if not self._has_speakers:
            raise SpeechError(f"{self.model.name} takes no vectors as a voice; choose one by its name")
        self._check_length(voice_XC)
        voices.conditions(self.synthesizer.lm, [[voice_XC]], base.condition_guidance)
        return dataclasses.replace(base, voices=[voice_XC])

    def _check_length(self, voice_XC: np.ndarray) -> None:
        if len(voice_XC) > self._longest_voice:
            raise SpeechError(
                f"the voice has {len(voice_XC)} steps; this server takes {self._longest_voice}: give a shorter one"
            )


def _sayable(service: ScriptService) -> str:
    """Return a word that the model's tokenizer can spell."""
    for word in ("hello", "one", "a", "e"):
        try:
            if service.entries(word, None):
                return word
        except SpeechError:
            continue
    raise ConfigError(f"{service.model.name} can spell no common word; take a tokenizer of the model's language")


class LiveSpeech(LiveVoice, SpeechSession):
    """One client's text, spoken while it arrives.

    The event loop calls `say`, `use_voice` and `finish`; all else is the engine's.

    Args:
      service: of the model.
      outbox: messages to the client.
      base: request of the voice, without text.
      is_file: whether the session may wait for a slot.
    """

    def __init__(self, service: ScriptService, outbox: Outbox, base: SpeechRequest, *, is_file: bool = False):
        super().__init__(service, outbox, base, is_file=is_file)
        self._service, self._base = service, base
        self._inbox: deque[Entry | None] = deque()  # None ends the text
        self._entries: list[Entry] = []
        self._count = self._tokens = 0  # of all entries that were added
        self._has_words = False
        self._told = 0  # entries that were returned as `Said`

    def use_voice(self, voice_XC: np.ndarray) -> None:
        """Speak with vectors of the client's own; they count before the first word.

        Raises:
          SpeechError: the model cannot take them.
        """
        if not self._has_words:
            self._base = self._service.with_voice(self._base, voice_XC)

    def say(self, text: str) -> None:
        """Add text; see `LiveVoice.say`."""
        check_sent_text(text)
        if len(text) > _LONGEST_TEXT:
            raise SpeechError(f"a piece of text has {len(text)} characters; send up to {_LONGEST_TEXT} at a time")
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
        self._prepared = self._collect()
        return super().request()

    def due(self, now: float) -> float:
        """Return the time at which a step can be taken."""
        return super().due(now) if self._inbox or not self.waits else math.inf

    def take_input(self) -> Leave | None:
        """Give new text to the slot; let the slot take steps unless it waits for text or its listener lags."""
        if self._inbox:
            self._service.synthesizer.extend(self, self._collect())
        return super().take_input()

    def take_messages(self) -> list[Any]:
        """Return the words that have ended, and the sound that was made, since the last call."""
        begun = len(self._taken)
        whole = max(self._told, begun if self.ended else begun - 1)
        said = [self._said(index) for index in range(self._told, whole)]
        self._told = whole
        return [*said, *super().take_messages()]

    def _said(self, index: int) -> Said:
        entry, rate = self._entries[index], self.model.config.mimi.frame_rate
        first = self._base.prefix_QT.shape[1]
        start = (self._taken[index] - first) / rate
        end = self._samples / self.model.sample_rate
        stop = (self._taken[index + 1] - first) / rate if index + 1 < len(self._taken) else max(start, end)
        return Said(entry.text or f'<break time="{entry.padding / rate:.2f}s">', start, stop)
