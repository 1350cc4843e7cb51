"""Conversational speech models for clients: a turn is spoken once its text is whole.

Shape letters: T samples.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsm_jax import audio, files
from dsm_jax.checkpoints import Model
from dsm_jax.csm.host import ConversationRequest, bucket
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.requests import Request as TurnRequest
from dsm_jax.csm.requests import Segment
from dsm_jax.csm.synthesizer import ConversationSession, ConversationSynthesizer
from dsm_jax.errors import ConfigError, SpeechError
from dsm_jax.models.family import csm_config
from dsm_jax.runtime.slots import Slots
from dsm_jax.serving.outbox import Outbox
from dsm_jax.serving.speaking import NO_VOICE, LiveVoice, SpeakingService, check_sent_text

TURN_CHARACTERS = 10_000  # of a turn of a conversation, before its tokens are counted


class TurnService(SpeakingService):
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
      ConfigError: a recording without its words, two of one name, or one that is too long.
      SpeechError: no voice of the default's name.
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
        self.synthesizer = ConversationSynthesizer(model, slots, limit=1, behind=0, inserts=1)
        self._contexts: dict[str, tuple[Segment, ...]] = _segments(folder) or {NO_VOICE: ()}
        self.default_voice = next(iter(self._contexts)) if default_voice is None else default_voice
        self._context(self.default_voice)
        self._context_length = csm_config(model.config).backbone.context
        # The other half is for the answer.
        self.longest_prompt = self._context_length // 2
        for voice in self._contexts:
            self._check_length(voice)
        self._slots = self.synthesizer.slots_for(self._of_length(self.longest_prompt))
        self.step_seconds: dict[int, float] = {}
        self._warm_up()

    @property
    def slots(self) -> Slots[Any]:
        """The slots of the program."""
        return self._slots

    @property
    def voices(self) -> Sequence[str]:
        """The names of the voices that are known."""
        return list(self._contexts)

    def _context(self, voice: str) -> tuple[Segment, ...]:
        """Return the turns that a voice is taken from."""
        if voice not in self._contexts:
            known = ", ".join(self._contexts)
            raise SpeechError(f"the voice {voice!r} is unknown; {self.model.name} has {known}")
        return self._contexts[voice]

    def _check_length(self, voice: str) -> None:
        """Check that a voice leaves room for a turn: encode its recording, which compiles the codec for its length.

        Raises:
          ConfigError: it does not.
        """
        context = self._contexts[voice]
        if (length := self.synthesizer.prompt(TurnRequest("a", 0, context)).shape[1]) > self.longest_prompt:
            raise ConfigError(
                f"the voice {context[0].audio} takes {length} positions with the shortest turn, one for each token of "
                f"text and each frame of audio; {self.model.name} takes up to {self.longest_prompt}: cut the recording "
                "and its words"
            )

    def _of_length(self, length: int) -> ConversationRequest:
        """Return a request with a prompt of so many positions."""
        request = self.synthesizer.prepare(TurnRequest("a"), self.options)
        prompt_MT = np.repeat(request.prompt_MT[:, :1], length, axis=1)
        frames = min(self.options.max_frames, self._context_length - length)
        return dataclasses.replace(request, prompt_MT=prompt_MT, max_frames=frames)

    def _warm_up(self) -> None:
        """Run a prompt of each size that is compiled, one at a time as sessions are admitted, and a step.

        Raises:
          DsmError: a session has failed.
        """
        sizes = {bucket(length, self._context_length) for length in range(1, self.longest_prompt + 1)}
        for size in sorted(sizes):
            session = ConversationSession(self.model, self._of_length(min(size, self.longest_prompt)))
            self.slots.start(session)
            start = time.perf_counter()
            self.slots.step()
            if session.error is not None:
                raise session.error
            self.step_seconds[1] = time.perf_counter() - start
            self.slots.cancel(session)

    def session(
        self, outbox: Outbox, *, voice: str | None = None, seed: int | None = None, is_file: bool = False
    ) -> "LiveTurn":
        """Make a session.

        Raises:
          SpeechError: the voice is unknown.
        """
        context = self._context(self.default_voice if voice is None else voice)
        options = self.options if seed is None else dataclasses.replace(self.options, seed=seed)
        return LiveTurn(self, outbox, context, options, is_file=is_file)


def _segments(folder: Path | None) -> dict[str, tuple[Segment, ...]]:
    """Read the voices of a folder: recordings with their words.

    Raises:
      ConfigError: a recording without its words, or two of one name.
    """
    found: dict[str, tuple[Segment, ...]] = {}
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.suffix not in audio.SUFFIXES:
            continue
        words = path.with_suffix(".txt")
        if not words.is_file():
            raise ConfigError(f"the voice {path} has no words; write what is said in it to {words.name} beside it")
        if path.stem in found:
            raise ConfigError(f"the voice {path} has the name of {found[path.stem][0].audio}; rename one, or remove it")
        try:
            text = files.read_text(words).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{words} cannot be read as text ({error}); write it in UTF-8") from None
        if not text:
            raise ConfigError(f"{words} is empty; write what is said in {path.name} to it")
        found[path.stem] = (Segment(text, 0, path),)
    return found


class LiveTurn(LiveVoice, ConversationSession):
    """One client's turn of a conversation, spoken once its text is whole.

    Args:
      service: of the model.
      outbox: messages to the client.
      context: turns that the voice is taken from.
      options: of the synthesis.
      is_file: whether the session may wait for a slot.
    """

    def __init__(
        self,
        service: TurnService,
        outbox: Outbox,
        context: tuple[Segment, ...],
        options: CsmOptions,
        *,
        is_file: bool = False,
    ):
        super().__init__(service, outbox, None, is_file=is_file)
        self._service, self._context, self._options = service, context, options
        self._text: list[str] = []
        self._length = 0  # characters of all pieces

    def say(self, text: str) -> None:
        """Add text; see `LiveVoice.say`."""
        check_sent_text(text)
        self._length += len(text)
        if self._length > TURN_CHARACTERS:
            raise SpeechError(
                f"the turn has {self._length} characters; this server takes up to {TURN_CHARACTERS}: cut it"
            )
        if text.strip():
            self._text.append(text)

    def finish(self) -> None:
        """End the text; see `LiveVoice.finish`."""
        request = TurnRequest(" ".join(self._text), 0, self._context)
        prepared = self._service.synthesizer.prepare(request, self._options)
        if (length := prepared.prompt_MT.shape[1]) > self._service.longest_prompt:
            raise SpeechError(
                f"the turn and its voice take {length} positions; this server takes up to "
                f"{self._service.longest_prompt}: cut the text, or choose a shorter voice"
            )
        self._prepared, self.can_start = prepared, True
