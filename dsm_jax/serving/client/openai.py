"""Clients of a server in OpenAI's dialect: whole recordings to text, live audio in turns, and text to speech.

The dialect names a model in every request, and tells less than moshi-server's: live text has no word times, and
speech no words. A server may be ours or another, such as OpenAI's own; the address may end in /v1.

Shape letters: T samples.
"""

import asyncio
import contextlib
import io
import json
import math
import os
import secrets
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from dsm_jax import audio
from dsm_jax.errors import AudioError, ServerError
from dsm_jax.serving.client import links
from dsm_jax.serving.client.openai_sessions import (
    AsyncTranscription,
    Transcription,
    TurnDelta,
    TurnEnded,
    server_address,
)
from dsm_jax.serving.client.sound import SAMPLE_RATE, joined_speech, with_part
from dsm_jax.speech import Speech
from dsm_jax.stt.events import Word
from dsm_jax.stt.transcript import Transcript
from dsm_jax.tokenizers import check_characters

__all__ = [
    "AsyncTranscription",
    "Transcription",
    "TurnDelta",
    "TurnEnded",
    "synthesize",
    "synthesize_async",
    "synthesize_stream",
    "synthesize_stream_async",
    "transcribe",
    "transcribe_async",
]

_PIECE = 1 << 16  # bytes that are sent or read at once
_UPLOAD = "/v1/audio/transcriptions"
_SPEECH = "/v1/audio/speech"


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
    server = server_address(url)
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
    server = server_address(url)
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

    Raises:
      ServerError: as for `synthesize_stream`; if some sound came before, the error is an `IncompleteSpeechError` too,
        which carries that.
    """
    pieces: list[np.ndarray] = []
    try:
        pieces.extend(synthesize_stream(url, text, model=model, voice=voice, api_key=api_key))  # keeps what came
    except ServerError as error:
        raise with_part(error, joined_speech(pieces, text, model, complete=False)) from None
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
