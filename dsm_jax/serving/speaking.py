"""Text to speech for clients: sessions and services of all families, with text and sound in pieces.

Shape letters: T samples.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import SpeechError
from dsm_jax.runtime.slots import Slots
from dsm_jax.runtime.steps import Leave
from dsm_jax.serving.outbox import Outbox
from dsm_jax.speaking import SpeakingSession
from dsm_jax.tokenizers import half_character

LAG_S = 60.0  # of sound that waits for its listener, after which the session takes no more steps
NO_VOICE = "default"  # the name of the voice that a model chooses by itself


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
    """One client's text and its sound, whatever the family of the model; the family's own session is the next base.

    The event loop calls `say` and `finish`; all else is the engine's.

    Args:
      service: of the model.
      outbox: messages to the client: `Sound` and `Said`.
      prepared: the request, of which the text may be still to come; None while there is none.
      is_file: whether the session may wait for a slot.

    Attributes:
      outbox, is_file: as above.
      can_start: whether there is enough text to take the slot.
      first_sound: seconds from the start in a slot to the first sound; None before.
    """

    def __init__(self, service: "SpeakingService", outbox: Outbox, prepared: Any, *, is_file: bool = False):
        super().__init__(service.model, prepared)
        self.outbox, self.is_file, self.can_start = outbox, is_file, False
        self.first_sound: float | None = None
        self._clock = service.clock
        self._started: float  # set once the session has a slot
        self._sounds: list[Sound] = []

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

    def request(self) -> Any:
        """Return the request as the program puts it into a slot: the session begins now, however long it waited."""
        self._started = self._clock()
        return super().request()

    def _lags(self) -> bool:
        return len(self.outbox) > LAG_S * self.model.config.mimi.frame_rate

    def due(self, now: float) -> float:
        """Return the time at which a step can be taken."""
        return math.inf if self._lags() else now

    def take_input(self) -> Leave | None:
        """Let the slot take steps unless it waits for text or its listener lags."""
        return None if self._lags() else super().take_input()

    def add_pcm(self, pcm_T: np.ndarray) -> None:
        """Take samples that were made; they are not kept for a whole speech."""
        if pcm_T.size and self.first_sound is None:
            self.first_sound = self._clock() - self._started
        self._samples += pcm_T.size
        size = self.model.config.mimi.frame_size
        self._sounds += [Sound(pcm_T[at : at + size]) for at in range(0, pcm_T.size, size)]

    def take_messages(self) -> list[Any]:
        """Return the messages to the client since the last call."""
        sounds, self._sounds = self._sounds, []
        return list(sounds)


class SpeakingService(ABC):
    """A model that speaks, for clients: its slots, warmed up, and its voices.

    Attributes:
      model: the model.
      default_voice: name of the voice of clients that name none.
      step_seconds: measured duration of a call, by its steps.
      clock: seconds, monotonic.
    """

    model: Model
    default_voice: str
    step_seconds: dict[int, float]
    clock: Callable[[], float]

    @property
    @abstractmethod
    def slots(self) -> Slots[Any]:
        """The slots of the program."""

    @property
    def groups(self) -> list[Slots[Any]]:
        """The slots as the one group that steps together: a step is several frames long, for which nobody waits."""
        return [self.slots]

    @property
    def total(self) -> int:
        """Sessions at a time."""
        return self.slots.program.slots

    @property
    @abstractmethod
    def voices(self) -> Sequence[str]:
        """The names of the voices that are known."""

    def knows(self, voice: str) -> bool:
        """Tell whether a voice is known, or is one that can be fetched."""
        return voice in self.voices

    @abstractmethod
    def session(
        self, outbox: Outbox, *, voice: str | None = None, seed: int | None = None, is_file: bool = False
    ) -> LiveVoice:
        """Make a session; call it off the event loop, as a voice may have to be fetched.

        Args:
          outbox: messages to the client.
          voice: name of the voice; None takes the default one.
          seed: of the sampling; None takes the service's.
          is_file: whether the session may wait for a slot.

        Raises:
          DsmError: the voice is unknown, or cannot be read.
        """


def check_sent_text(text: str) -> None:
    """Refuse halves of characters, which JSON can hold; unlike the tokenizer's error, this one quotes no text.

    Raises:
      SpeechError: the text has half of a character in it.
    """
    if (at := half_character(text)) is not None:
        raise SpeechError(f"the text has half of a character at {at}; send whole ones")
