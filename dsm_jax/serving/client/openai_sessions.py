"""Live sessions of OpenAI's dialect: speech to text in turns over its realtime websocket.

Shape letters: T samples.
"""

import base64
import contextlib
import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from dsm_jax import files
from dsm_jax.errors import ServerError
from dsm_jax.serving.client import links
from dsm_jax.serving.client.plain import PlainSession
from dsm_jax.serving.client.session import Session
from dsm_jax.serving.client.sound import SAMPLE_RATE, live_samples

_EVENT = SAMPLE_RATE  # samples of an event
_REALTIME = "/v1/realtime"
_SERVER_VAD: Mapping[str, Any] = MappingProxyType({"type": "server_vad"})
# The dialect has no event for the end of the audio. But a commit right after another has nothing to commit, so that
# the server answers it with this error, which stands behind all that came of the audio before.
_EMPTY = "input_audio_buffer_commit_empty"
_LAST_COMMIT = "commit_last"


def server_address(url: str) -> links.Address:
    """Read an address, which may end in the /v1 that all paths of the dialect begin with."""
    server = links.address(url)
    return dataclasses.replace(server, prefix=server.prefix.removesuffix("/v1"))


@dataclasses.dataclass(frozen=True)
class TurnDelta:
    """Text that is new in a turn; all deltas of a turn join to its text. `turn` is the turn's id."""

    turn: str
    text: str


@dataclasses.dataclass(frozen=True)
class TurnEnded:
    """A turn that is complete.

    Attributes:
      turn: its id.
      text: all of it.
      start: seconds from the start of the audio at which speech began; None if the server does not detect turns.
      end: seconds at which speech ended; None if the client has ended the turn.
    """

    turn: str
    text: str
    start: float | None
    end: float | None


class AsyncTranscription(Session[dict[str, Any], TurnDelta | TurnEnded]):
    """Transcribe live audio: send samples, and iterate over text as it is found, and over turns.

    >>> async def heard(url, recording):
    ...     async with AsyncTranscription(url, model="digits") as session:
    ...         await session.send(recording)
    ...         await session.finish()
    ...         return [event.text async for event in session if isinstance(event, TurnEnded)]

    Args:
      url: address of the server, such as "http://127.0.0.1:8080".
      model: name of the model.
      language: of the speech; None to let the model find out.
      prompt: text that steers the model; None for none.
      turn_detection: the rule by which the server ends turns, as OpenAI documents it; None to end them by `commit`.
      api_key: key of the client; None for none.

    Raises:
      ConfigError: no address.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        language: str | None = None,
        prompt: str | None = None,
        turn_detection: Mapping[str, Any] | None = _SERVER_VAD,
        api_key: str | None = None,
    ):
        super().__init__(str(server_address(url)), {"intent": "transcription"}, model=model, api_key=api_key)
        transcription = {"model": model, "language": language, "prompt": prompt}
        self._settings = {
            "format": {"type": "audio/pcm", "rate": SAMPLE_RATE},
            "transcription": {name: value for name, value in transcription.items() if value is not None},
            "turn_detection": None if turn_detection is None else dict(turn_detection),
        }
        self._starts: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._texts: list[str] = []
        self._committed: set[str] = set()  # turns whose text is not complete
        self._is_last = False  # after the answer to the last commit

    @property
    def text(self) -> str:
        """Return the text of all turns that are complete, with a space between them."""
        return " ".join(text for text in self._texts if text)

    async def send(self, pcm: ArrayLike) -> None:
        """Send samples.

        Args:
          pcm: float in [-1, 1] or int16 at 24 kHz, of shape [T] or [C, T], of any length; they are sent in 16 bits.

        Raises:
          AudioError: samples of another kind, or ones that are not finite.
          ServerError: the session has ended.
        """
        whole_T = np.clip(np.round(live_samples(pcm) * 32768), -32768, 32767).astype("<i2")
        for first in range(0, whole_T.size, _EVENT):
            data = base64.b64encode(whole_T[first : first + _EVENT].tobytes()).decode()
            await self._send("input_audio_buffer.append", audio=data)

    async def commit(self) -> None:
        """End a turn here; without audio since the last one nothing happens."""
        await self._send("input_audio_buffer.commit")

    async def finish(self) -> None:
        """End the audio: the iteration ends after its last turn."""
        await self.commit()
        await self._send("input_audio_buffer.commit", event_id=_LAST_COMMIT)

    async def _send(self, type: str, **fields: Any) -> None:
        await self._send_data(json.dumps({"type": type, **fields}))

    async def _path(self) -> str:
        return _REALTIME

    async def _begin(self, socket: ClientConnection, path: str) -> None:
        session = {"type": "transcription", "audio": {"input": self._settings}}
        with contextlib.suppress(ConnectionClosed):  # what the server said before it closed is read all the same
            await socket.send(json.dumps({"type": "session.update", "session": session}))
        while (event := self._decoded(await socket.recv()))["type"] != "session.updated":
            if event["type"] == "error":
                raise self._failed(event)

    def _decoded(self, data: str | bytes) -> dict[str, Any]:
        try:
            event = files.decode_json(data)
            if isinstance(event["type"], str):
                return event
        except (ValueError, TypeError, KeyError):
            pass
        raise ServerError(f"{self.server} sent a message that is no event; it is another kind of server")

    def _failed(self, event: Mapping[str, Any]) -> ServerError:
        error = event.get("error")
        if not isinstance(error, dict):
            error = {}
        if error.get("code") == "server_full":
            return ServerError(f"{self.server} has no free slot; try again later")
        said = error.get("message")
        return ServerError(f"{self.server} ended the session: {said or 'no reason was given'}")

    def _take(self, message: dict[str, Any]) -> None:
        try:
            self._take_event(message)
        except (KeyError, TypeError, AttributeError):
            raise ServerError(
                f"{self.server} sent an event {message['type'][:60]!r} without its fields; it is another kind of server"
            ) from None

    def _take_event(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "input_audio_buffer.speech_started":
                self._starts[event["item_id"]] = event["audio_start_ms"] / 1000
            case "input_audio_buffer.speech_stopped":
                self._ends[event["item_id"]] = event["audio_end_ms"] / 1000
            case "input_audio_buffer.committed":
                self._committed.add(event["item_id"])
            case "conversation.item.input_audio_transcription.delta":
                self._items.append(TurnDelta(event["item_id"], event["delta"]))
            case "conversation.item.input_audio_transcription.completed":
                turn, text = event["item_id"], event["transcript"]
                self._committed.discard(turn)
                self._texts.append(text)
                self._items.append(TurnEnded(turn, text, self._starts.pop(turn, None), self._ends.pop(turn, None)))
            case "error" if event["error"].get("code") == _EMPTY:
                self._is_last = self._is_last or event["error"].get("event_id") == _LAST_COMMIT
            case "error" | "conversation.item.input_audio_transcription.failed":
                raise self._failed(event)
        self._ended = self._is_last and not self._committed


class Transcription(PlainSession[TurnDelta | TurnEnded]):
    """Transcribe live audio: as `AsyncTranscription`, with plain calls.

    Iterate in another thread than the one that sends, or after `finish`; `ready` returns what is there at any time.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        language: str | None = None,
        prompt: str | None = None,
        turn_detection: Mapping[str, Any] | None = _SERVER_VAD,
        api_key: str | None = None,
    ):
        self._async = AsyncTranscription(
            url, model=model, language=language, prompt=prompt, turn_detection=turn_detection, api_key=api_key
        )
        super().__init__(self._async)

    @property
    def text(self) -> str:
        """Return the text of all turns that are complete, with a space between them."""
        return self._async.text

    def send(self, pcm: ArrayLike) -> None:
        """Send samples; as `AsyncTranscription.send`."""
        self._loop.run(self._async.send(pcm))

    def commit(self) -> None:
        """End a turn here; without audio since the last one nothing happens."""
        self._loop.run(self._async.commit())

    def finish(self) -> None:
        """End the audio: the iteration ends after its last turn."""
        self._loop.run(self._async.finish())
