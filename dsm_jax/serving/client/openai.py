"""Clients of a server in OpenAI's dialect: whole recordings to text, live audio in turns, and text to speech.

The dialect names a model in every request, and tells less than moshi-server's: live text has no word times, and
speech no words. A server may be ours or another, such as OpenAI's own; the address may end in /v1.

Shape letters: T samples.
"""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import math
import os
import secrets
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import ArrayLike
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from dsm_jax import audio, files
from dsm_jax.errors import AudioError, ServerError
from dsm_jax.serving.client import links
from dsm_jax.serving.client.plain import PlainSession
from dsm_jax.serving.client.session import Session
from dsm_jax.serving.client.sound import SAMPLE_RATE, joined_speech, live_samples
from dsm_jax.speech import Speech
from dsm_jax.stt.events import Word
from dsm_jax.stt.transcript import Transcript
from dsm_jax.tokenizers import check_characters

_PIECE = 1 << 16  # bytes that are sent or read at once
_EVENT = SAMPLE_RATE  # samples of an event
_UPLOAD = "/v1/audio/transcriptions"
_SPEECH = "/v1/audio/speech"
_REALTIME = "/v1/realtime"
_SERVER_VAD: Mapping[str, Any] = MappingProxyType({"type": "server_vad"})
# The dialect has no event for the end of the audio. But a commit right after another has nothing to commit, so that
# the server answers it with this error, which stands behind all that came of the audio before.
_EMPTY = "input_audio_buffer_commit_empty"
_LAST_COMMIT = "commit_last"


# Whole recordings.


def transcribe(
    url: str,
    recording: audio.Source,
    *,
    model: str,
    language: str | None = None,
    prompt: str | None = None,
    temperature: float | None = None,
    api_key: str | None = None,
) -> Transcript:
    """Transcribe a recording over a server.

    Args:
      url: address of the server, such as "http://127.0.0.1:8080".
      recording: as for `audio.blocks`. A file is sent as it is, so that the server must be able to read its format.
      model: name of the model.
      language: of the recording, such as "en"; None to let the model find out.
      prompt: text that steers the model; None for none.
      temperature: of the sampling; None for the server's.
      api_key: key of the client; None for none.

    Returns:
      The transcript, without pauses. Where a server does not tell a word's probability, it is the mean of the word's
      segment, or 0 if that is not told either.

    Raises:
      AudioError: the recording cannot be read.
      TextError: an option has half of a character in it.
      ServerError: the server cannot be reached, refuses, or does not answer in the dialect.
    """
    server = _address(url)
    fields = [("model", model), ("response_format", "verbose_json")]
    fields += [("timestamp_granularities[]", granularity) for granularity in ("word", "segment")]
    options = {"language": language, "prompt": prompt, "temperature": temperature}
    fields += [(name, str(value)) for name, value in options.items() if value is not None]
    with contextlib.ExitStack() as stack:
        file, suffix = _opened(recording, stack)
        headers, body = _form(fields, file, suffix)
        with links.answer(server, "POST", _UPLOAD, body=body, headers=headers, api_key=api_key) as found:
            told = links.parsed(server, _UPLOAD, found.read())
    try:
        segments = [(float(part["start"]), float(part["avg_logprob"])) for part in told.get("segments") or ()]
        words = tuple(_word(word, segments) for word in told.get("words") or ())
        return Transcript(
            str(told["text"]), words, (), float(told["duration"]), audio=audio.path_of(recording), model=model
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ServerError(
            f"{server}{_UPLOAD} did not answer with words and their times; it is another kind of server, "
            "or the model has no word times"
        ) from None


async def transcribe_async(url: str, recording: audio.Source, *, model: str, **options: Any) -> Transcript:
    """Transcribe a recording over a server; as `transcribe`, in a thread."""
    return await asyncio.to_thread(transcribe, url, recording, model=model, **options)


def _address(url: str) -> links.Address:
    """Read an address, which may end in the /v1 that all paths of the dialect begin with."""
    server = links.address(url)
    return dataclasses.replace(server, prefix=server.prefix.removesuffix("/v1"))


def _opened(recording: audio.Source, stack: contextlib.ExitStack) -> tuple[BinaryIO, str]:
    """Return a recording as a file, and the suffix that tells its format."""
    if isinstance(recording, str | os.PathLike) and (path := Path(recording)) != Path("-"):
        try:
            file = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise AudioError(f"{path} cannot be read ({error.strerror or error}); give a recording") from None
        return file, path.suffix if path.suffix[1:].isalnum() and path.suffix.isascii() else ""
    written = io.BytesIO()
    soundfile.write(written, audio.read(recording, SAMPLE_RATE), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    written.seek(0)
    return written, ".wav"


def _form(fields: Sequence[tuple[str, str]], file: BinaryIO, suffix: str) -> tuple[dict[str, str], Iterator[bytes]]:
    """Return the headers and the body of a form with one file, whose own name is not told."""
    boundary = secrets.token_hex(16)
    for _, text in fields:
        check_characters(text)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="recording{suffix}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    head, tail = "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)

    def body() -> Iterator[bytes]:
        yield head
        while piece := file.read(_PIECE):
            yield piece
        yield tail

    length = str(len(head) + size + len(tail))
    return {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": length}, body()


def _word(told: Mapping[str, Any], segments: list[tuple[float, float]]) -> Word:
    start, probability = float(told["start"]), told.get("probability")
    if probability is None:
        of_segment = [logprob for begun, logprob in segments if begun <= start]
        probability = math.exp(of_segment[-1]) if of_segment else 0.0
    return Word(str(told["word"]).strip(), start, float(told["end"]), float(probability))


# Speech.


def synthesize_stream(
    url: str, text: str, *, model: str, voice: str, api_key: str | None = None
) -> Generator[np.ndarray, None, None]:
    """Say a whole text over a server, and yield its sound as it is made: float32 samples [T] at 24 kHz.

    Args:
      url: address of the server, such as "http://127.0.0.1:8080".
      text: text.
      model: name of the model.
      voice: name of the voice.
      api_key: key of the client; None for none.

    Raises:
      ServerError: the server cannot be reached, refuses the text or the voice, or fails.
    """
    server = _address(url)
    asked = {"model": model, "voice": voice, "input": text, "response_format": "pcm"}
    headers = {"Content-Type": "application/json"}
    left = b""
    with links.answer(
        server, "POST", _SPEECH, body=json.dumps(asked).encode(), headers=headers, api_key=api_key
    ) as found:
        while data := found.read1(_PIECE):
            data = left + data
            whole = len(data) // 2 * 2
            left = data[whole:]
            if whole:
                yield np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768


def synthesize(url: str, text: str, *, model: str, voice: str, api_key: str | None = None) -> Speech:
    """Say a whole text over a server; as `synthesize_stream`.

    Returns:
      The speech in 16 bits, without words and frames.
    """
    pieces = list(synthesize_stream(url, text, model=model, voice=voice, api_key=api_key))
    return joined_speech(pieces, text, model)


async def synthesize_async(url: str, text: str, *, model: str, voice: str, api_key: str | None = None) -> Speech:
    """Say a whole text over a server; as `synthesize`, in a thread."""
    return await asyncio.to_thread(synthesize, url, text, model=model, voice=voice, api_key=api_key)


async def synthesize_stream_async(
    url: str, text: str, *, model: str, voice: str, api_key: str | None = None
) -> AsyncIterator[np.ndarray]:
    """Say a whole text over a server; as `synthesize_stream`, in threads."""
    pieces = synthesize_stream(url, text, model=model, voice=voice, api_key=api_key)
    try:
        while (pcm_T := await asyncio.to_thread(next, pieces, None)) is not None:
            yield pcm_T
    finally:
        await asyncio.to_thread(pieces.close)


# Live audio.


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
        super().__init__(str(_address(url)), {"intent": "transcription"}, model=model, api_key=api_key)
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
