"""Live sessions of moshi-server's dialect: speech to text and text to speech over websockets.

Shape letters: T samples.
"""

import asyncio
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from websockets.asyncio.client import ClientConnection

from dsm_jax.errors import ConfigError, ServerError, ServerFullError, WireError
from dsm_jax.serving.client import links
from dsm_jax.serving.client import wire as client_wire
from dsm_jax.serving.client.session import Session
from dsm_jax.serving.client.sound import SAMPLE_RATE, live_samples
from dsm_jax.serving.moshi import wire
from dsm_jax.speech import SpokenWord
from dsm_jax.stt.events import PAUSE_HORIZONS, Event, Pause, Word, WordEnded, WordStarted
from dsm_jax.stt.transcript import Transcript
from dsm_jax.tokenizers import check_characters

FRAME = 1_920  # samples
_MESSAGE = 12 * FRAME  # samples of a message, of a recording that is sent faster than it was spoken
_Item = TypeVar("_Item")


class _MoshiSession(Session[wire.Outgoing, _Item], Generic[_Item]):
    """A session whose messages are MessagePack; `kind` is "stt" or "tts"."""

    kind: str

    async def _path(self) -> str:
        path, self.model = await links.find_path(self.server, self.kind, self.model, api_key=self._api_key)
        return path

    async def _begin(self, socket: ClientConnection, path: str) -> None:
        first = self._decoded(await socket.recv())
        if isinstance(first, wire.Error):
            raise self._refused(first.message)
        if not isinstance(first, wire.Ready):
            raise ServerError(f"{self.server}{path} began with {type(first).__name__}; expected Ready")

    async def _send(self, message: wire.Incoming) -> None:
        await self._send_data(client_wire.encode(message))

    def _decoded(self, data: str | bytes) -> wire.Outgoing:
        if isinstance(data, str):
            raise ServerError(f"{self.server} sent a text message; expected MessagePack: it is another kind of server")
        try:
            return client_wire.decode(data)
        except WireError as error:
            raise ServerError(f"{self.server} is another kind of server: {error}") from None

    def _refused(self, reason: str) -> ServerError:
        if reason == "no free channels":
            return ServerFullError(f"{self.server} has no free slot; try again later, or wait for one with wait=True")
        if reason.startswith("no free channels"):  # and the queue is full
            return ServerFullError(f"{self.server} takes no recordings now: {reason}")
        return ServerError(f"{self.server} ended the session: {reason}")


class AsyncTranscription(_MoshiSession[Event]):
    """Transcribe live audio: send samples, and iterate over words and pauses as they are found.

    >>> async def heard(url, recording):
    ...     async with AsyncTranscription(url) as session:
    ...         await session.send(recording)
    ...         await session.finish()
    ...         return [event.word.text async for event in session if isinstance(event, WordEnded)]

    Args:
      url: address of the server, such as "http://127.0.0.1:8080".
      model: name of the model; None for the server's first.
      api_key: key of the client; None for none.
      wait: whether to wait for a slot, as recordings do; otherwise a full server refuses at once.
      horizon: seconds of silence that a pause predicts: 0.5, 1, 2 or 3.
      threshold: probability above which a pause is reported.
      needs_pauses: refuse a model that predicts no pauses.

    Raises:
      ConfigError: no address, no such horizon, or a threshold that is no probability.
    """

    kind = "stt"

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        wait: bool = False,
        horizon: float = 2.0,
        threshold: float = 0.5,
        needs_pauses: bool = False,
    ):
        if horizon not in PAUSE_HORIZONS or not 0 <= threshold <= 1:
            raise ConfigError(
                f"a pause of {horizon} s with the threshold {threshold} was asked for; expected a horizon of "
                f"{PAUSE_HORIZONS} s and a probability"
            )
        query = {"details": "1", "wait": "1" if wait else None, "pauses": "1" if needs_pauses else None}
        query |= {"horizon": str(horizon), "threshold": str(threshold)}
        super().__init__(url, query, model=model, api_key=api_key)
        self._samples = 0
        self._words: list[Word] = []
        self._found_pauses: list[Pause] = []
        self._marks: dict[int, asyncio.Future[None]] = {}
        self._next_mark = 0
        self._last_mark: int | None = None

    @property
    def duration(self) -> float:
        """Seconds of audio that were sent."""
        return self._samples / SAMPLE_RATE

    @property
    def transcript(self) -> Transcript:
        """Return the transcript so far."""
        text = " ".join(word.text for word in self._words)
        pauses = tuple(self._found_pauses)
        return Transcript(text, tuple(self._words), pauses, self.duration, model=self.model)

    async def send(self, pcm: ArrayLike) -> None:
        """Send samples, and wait while the server has more than it wants.

        Args:
          pcm: float in [-1, 1] or int16 at 24 kHz, of shape [T] or [C, T], of any length.

        Raises:
          AudioError: samples of another kind, or ones that are not finite.
          ServerError: the session has ended.
        """
        pcm_T = live_samples(pcm)
        for first in range(0, pcm_T.size, _MESSAGE):
            await self._send(wire.Audio(pcm_T[first : first + _MESSAGE]))
        self._samples += pcm_T.size

    async def mark(self, *, flush: bool = False) -> None:
        """Wait until all audio sent so far is transcribed: its words can be taken without waiting then.

        Args:
          flush: do not wait for more audio; without, a server waits 0.3 s for it.

        Raises:
          ServerError: the session ends before.
        """
        await (await self._mark(flush=flush))

    async def flush(self) -> None:
        """Wait until all audio sent so far is transcribed, without more audio."""
        await self.mark(flush=True)

    async def finish(self) -> None:
        """End the audio: the iteration ends after its last word."""
        self._last_mark = self._next_mark
        await self._mark(flush=True, end=True)

    async def _mark(self, *, flush: bool, end: bool = False) -> "asyncio.Future[None]":
        number, self._next_mark = self._next_mark, self._next_mark + 1
        self._marks[number] = answered = asyncio.get_running_loop().create_future()
        # Looked at, as nobody may await it, and asyncio would log its error.
        answered.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._error is not None:
            answered.set_exception(self._error)
        else:
            await self._send(wire.Marker(number, flush, end))
        return answered

    def _take(self, message: wire.Outgoing) -> None:
        match message:
            case wire.Word(text, start):
                self._items.append(WordStarted(text, start))
            case wire.EndWord(end, text, start, probability):
                if text is None or start is None or probability is None:
                    raise ServerError(f"{self.server} does not tell a word's details; it is another kind of server")
                self._words.append(Word(text, start, end, probability))
                self._items.append(WordEnded(self._words[-1]))
            case wire.Pause(time, horizon, probability):
                self._found_pauses.append(Pause(time, horizon, probability))
                self._items.append(self._found_pauses[-1])
            case wire.Marker(number):
                if (answered := self._marks.pop(number, None)) is not None and not answered.done():
                    answered.set_result(None)
                self._ended = self._ended or number == self._last_mark
            case wire.Error(reason):
                raise self._refused(reason)

    def _close(self, error: ServerError) -> None:
        super()._close(error)
        for answered in self._marks.values():
            if not answered.done():
                answered.set_exception(self._error or error)
        self._marks.clear()


class AsyncSpeech(_MoshiSession[np.ndarray | SpokenWord]):
    """Say text while it arrives: iterate over the sound, float32 samples [T] at 24 kHz, and the words in it.

    >>> async def said(url, text):
    ...     async with AsyncSpeech(url, seed=1) as session:
    ...         await session.say(text)
    ...         await session.finish()
    ...         return np.concatenate([pcm_T async for pcm_T in session if isinstance(pcm_T, np.ndarray)])

    Args:
      url: address of the server, such as "http://127.0.0.1:8080".
      voice: name of the voice; None for the server's default.
      seed: seed of the sampling; None for the server's.
      model: name of the model; None for the server's first.
      api_key: key of the client; None for none.

    Raises:
      ConfigError: no address, or a seed below 0.
    """

    kind = "tts"

    def __init__(
        self,
        url: str,
        *,
        voice: str | None = None,
        seed: int | None = None,
        model: str | None = None,
        api_key: str | None = None,
    ):
        if seed is not None and seed < 0:
            raise ConfigError(f"the seed is {seed}; a server takes one from 0")
        query = {"format": "PcmMessagePack", "voice": voice, "seed": None if seed is None else str(seed)}
        super().__init__(url, query, model=model, api_key=api_key)
        self._finished = False

    async def say(self, text: str) -> None:
        """Send text, of which every word is whole.

        Raises:
          ServerError: the session has ended.
          TextError: the text has half of a character in it.
        """
        check_characters(text)
        await self._send(wire.Text(text))

    async def finish(self) -> None:
        """End the text: the iteration ends with its sound."""
        self._finished = True
        await self._send(wire.Eos())

    def _take(self, message: wire.Outgoing) -> None:
        match message:
            case wire.Audio(pcm_T):
                self._items.append(pcm_T)
            case wire.Text(text, start, stop):
                self._items.append(SpokenWord(text, start, stop))
            case wire.Error(reason):
                raise self._refused(reason)

    def _close(self, error: ServerError) -> None:
        if self._finished and self._socket is not None and self._socket.close_code in (1000, 1005):
            self._ended = True
        super()._close(error)
