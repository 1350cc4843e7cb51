"""Sessions that speak requests in slots, and the loops over these that all models that speak share.

Shape letters: T samples.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import DsmError, SpeechError
from dsm_jax.progress import Progress, ProgressCallback
from dsm_jax.runtime.slots import Slots
from dsm_jax.runtime.steps import Leave
from dsm_jax.speech import Speech

Prepared = TypeVar("Prepared")
Request = TypeVar("Request")


class SpeakingSession(ABC, Generic[Prepared]):
    """One request while it has a slot.

    Args:
      model: that speaks.
      prepared: the request; None for one that has failed already.
      error: why it has failed.
      index: its place among the requests.
      progress: called with the seconds of sound that were made so far.
    """

    def __init__(
        self,
        model: Model,
        prepared: Prepared | None,
        *,
        error: DsmError | None = None,
        index: int = 0,
        progress: Callable[[float], None] | None = None,
    ):
        self.model, self.index, self.ended = model, index, False
        self.error: DsmError | None = error
        self.waits = False  # for more of its text
        self._prepared, self._progress = prepared, progress
        self._pcm: list[np.ndarray] = []
        self._samples = 0

    @property
    def prepared(self) -> Prepared:
        """The request, with all of the text so far."""
        assert self._prepared is not None
        return self._prepared

    def request(self) -> Prepared:
        """Return the request as the program puts it into a slot."""
        return self.prepared

    def take_input(self) -> Leave | None:
        """Let the slot take steps, unless it waits for text."""
        return None if self.waits else Leave()

    @abstractmethod
    def read(self, outputs: Any, slot: int, part: Leave) -> None:
        """Collect what a call made in this slot."""

    @abstractmethod
    def speech(self, *, complete: bool = True) -> Speech:
        """Return the speech of a session that has ended."""

    def fail(self, error: DsmError) -> None:
        """End with an error."""
        self.error = error

    def take_pcm(self) -> np.ndarray:
        """Return the samples [T] made since the last call, and forget them."""
        pcm, self._pcm = self._pcm, []
        return joined(pcm)

    @property
    def pcm_T(self) -> np.ndarray:
        """The samples [T] that were made and not forgotten."""
        return joined(self._pcm)

    def add_pcm(self, pcm_T: np.ndarray) -> None:
        """Take samples [T] that were made, and report the progress."""
        self._pcm.append(pcm_T)
        self._samples += pcm_T.size
        if self._progress is not None:
            self._progress(self._samples / self.model.sample_rate)


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Join pieces of sound, of which there may be none: float32 samples [T]."""
    return np.concatenate([np.zeros(0, np.float32), *pieces])


class SessionMaker(Protocol):
    """A model, and the slots that its requests share."""

    model: Model

    def prepare(self, request: Any, options: Any) -> Any:
        """Read a request, with options for one that has none of its own."""
        ...

    def slots_for(self, *requests: Any) -> Slots[Any]:
        """Return the slots, which the first call makes, with room for these requests."""
        ...


def read_or_error(read: Callable[..., Request], *arguments: Any) -> Request | SpeechError:
    """Read a request of several; return the error of one that cannot be read, so that the others are not lost."""
    try:
        return read(*arguments)
    except SpeechError as error:
        return error


def speak_each(
    synthesizer: SessionMaker,
    session: Callable[..., SpeakingSession[Any]],
    requests: Sequence[Any],
    options: Any,
    progress: ProgressCallback | None,
) -> Iterator[tuple[int, Speech | DsmError]]:
    """Speak requests, and yield each as it ends, with its place; a request that cannot be said yields its error.

    Args:
      synthesizer: reads the requests, and has their slots.
      session: class of the sessions.
      requests: all of them are read first, so that the program has room for each; an error in place of a request that
        could not be read is yielded.
      options: of requests that have none.
      progress: called with the seconds of each speech that were made so far.
    """

    def prepared(index: int) -> SpeakingSession[Any]:
        try:
            if isinstance(requests[index], DsmError):
                raise requests[index]
            request = synthesizer.prepare(requests[index], options)
        except DsmError as error:
            return session(synthesizer.model, None, error=error, index=index)
        report = None if progress is None else functools.partial(_report, progress, index)
        return session(synthesizer.model, request, index=index, progress=report)

    sessions = [prepared(index) for index in range(len(requests))]
    ready = [one.prepared for one in sessions if one.error is None]
    for done in synthesizer.slots_for(*ready).run(sessions) if ready else sessions:
        yield done.index, done.speech() if done.error is None else done.error


def _report(progress: ProgressCallback, index: int, seconds: float) -> None:
    progress(Progress(seconds, None, index))


def sound(slots: Slots[Any], session: SpeakingSession[Any]) -> Iterator[np.ndarray]:
    """Yield the samples [T] of an admitted session as they are made, until it waits for text or has ended.

    Raises:
      DsmError: the error with which the session has ended.
    """
    while not session.waits and not session.ended:
        slots.step()
        if (pcm_T := session.take_pcm()).size:
            yield pcm_T
    if session.error is not None:
        raise session.error
