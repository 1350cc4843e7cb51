"""Text to speech for clients: sessions and services of all families, with text and sound in pieces.

Shape letters: T samples.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import SpeechError
from dsm_jax.runtime.slots import Slots
from dsm_jax.serving.outbox import Outbox
from dsm_jax.speaking import SpeakingSession

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


class SpeakingService(ABC):
    """A model that speaks, for clients: its slots, warmed up, and its voices.

    Attributes:
      model: the model.
      default_voice: name of the voice of clients that name none.
      step_seconds: measured duration of a call, by its steps.
    """

    model: Model
    default_voice: str
    step_seconds: dict[int, float]

    @property
    @abstractmethod
    def slots(self) -> Slots[Any]:
        """The slots of the program."""

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


def check_characters(text: str) -> None:
    """Refuse halves of characters, which JSON can hold and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpeechError(f"the text has half of a character at {error.start}; send whole ones") from None
