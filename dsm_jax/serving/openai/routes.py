"""OpenAI's dialect over HTTP: transcriptions, speech, voices and models."""

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from dsm_jax.errors import DsmError
from dsm_jax.serving.answers import begun
from dsm_jax.serving.encoding import CONTENT_TYPES, SoundEncoder
from dsm_jax.serving.hearing import LiveHearing
from dsm_jax.serving.openai.errors import (
    ApiError,
    api_error,
    error_response,
    json_response,
    refusal_error,
    unknown_model,
)
from dsm_jax.serving.openai.formats import (
    LAST_EVENT,
    WordDeltas,
    logprobs,
    server_event,
    transcript_response,
    usage,
)
from dsm_jax.serving.openai.requests import SpeechRequest, TranscriptionRequest, speech_request, transcription_request
from dsm_jax.serving.outbox import Outbox
from dsm_jax.serving.server import Server
from dsm_jax.serving.services import Served
from dsm_jax.serving.uploads import heard, sound_of, spoken
from dsm_jax.serving.waiting import client_leaves, unless
from dsm_jax.stt.events import WordEnded, WordStarted
from dsm_jax.stt.transcript import Transcript

Handler = Callable[[Request, Server], Awaitable[Response]]

_log = logging.getLogger("dsm_jax.serving")


def routes(server: Server) -> list[BaseRoute]:
    """Return the routes of a server; the last one answers for all paths of the dialect that there are not."""
    began = int(time.time())

    async def models(request: Request, server: Server) -> Response:
        return json_response({"object": "list", "data": [_model(served, began) for served in server.models]})

    async def model(request: Request, server: Server) -> Response:
        name = request.path_params["id"]
        served = server.find("stt", name) or server.find("tts", name)
        if served is None:
            raise unknown_model(name, [served.name for served in server.models])
        return json_response(_model(served, began))

    handlers: dict[str, dict[str, Handler]] = {
        "/v1/audio/transcriptions": {"POST": transcribe},
        "/v1/audio/speech": {"POST": speak},
        "/v1/audio/voices": {"GET": voices},
        "/v1/models": {"GET": models},
        "/v1/models/{id:path}": {"GET": model},
        "/v1/{rest:path}": {},
    }
    return [Route(path, _Endpoint(server, by_method)) for path, by_method in handlers.items()]


class _Endpoint:
    """Answer all methods of a path; every error has the dialect's shape.

    Args:
      server: server.
      handlers: by their method; none for a path that there is not.
    """

    def __init__(self, server: Server, handlers: Mapping[str, Handler]):
        self._server, self._handlers = server, handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive, send)
        try:
            response = await self._answer(request)
        except ClientDisconnect:
            return
        except DsmError as error:
            response = error_response(api_error(error))
        except Exception as error:
            _log.exception("a request of the path %s has failed", request.scope["route"].path)
            response = error_response(api_error(error))
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if (refusal := self._server.refusal(request)) is not None:
            raise refusal_error(refusal)
        if not self._handlers:
            raise ApiError(f"there is no {request.url.path}", status=404, code="not_found")
        handler = self._handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = " or ".join(self._handlers)
            raise ApiError(f"the method is {request.method}; expected {allowed}", status=405, code="method_not_allowed")
        return await handler(request, self._server)


# Transcription.


async def transcribe(request: Request, server: Server) -> Response:
    """Transcribe a recording."""
    stack = contextlib.AsyncExitStack()
    asked = await stack.enter_async_context(transcription_request(request, server))
    if asked.stream:
        return await begun(request, _text_events(server, asked, stack), "text/event-stream")
    async with stack:
        return transcript_response(
            await unless(_transcript(server, asked), client_leaves(request)),
            asked.format,
            granularities=asked.granularities,
            with_logprobs=asked.with_logprobs,
            language=asked.language,
            temperature=asked.utterance.options.sampling(asked.served.model.config)[0],
        )


async def _transcript(server: Server, asked: TranscriptionRequest) -> Transcript:
    sessions: list[LiveHearing] = []
    async with contextlib.aclosing(_heard(server, asked)) as messages:
        async for session, _ in messages:
            sessions[:] = [session]
    return sessions[0].transcript(None)


def _heard(server: Server, asked: TranscriptionRequest) -> Any:
    return heard(server, asked.served, asked.file, "openai", asked.utterance)


async def _text_events(
    server: Server, asked: TranscriptionRequest, stack: contextlib.AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a transcription: deltas as its words come, and its whole text in the end."""
    deltas, words, sessions = WordDeltas(), [], list[LiveHearing]()
    async with stack, contextlib.aclosing(_heard(server, asked)) as messages:
        try:
            async for session, message in messages:
                if not sessions:
                    sessions.append(session)
                    yield b""  # the answer begins, so that it is noticed if the client leaves
                if not isinstance(message, WordStarted | WordEnded):
                    continue
                if isinstance(message, WordEnded):
                    words.append(message.word)
                if delta := deltas.add(message):
                    event: dict[str, Any] = {"type": "transcript.text.delta", "delta": delta}
                    if asked.with_logprobs and isinstance(message, WordEnded):
                        event["logprobs"] = logprobs([message.word])
                    yield server_event(event)
        except DsmError as error:
            if not sessions:
                raise
            yield server_event({"error": api_error(error).fields()})
            return
    seconds = sessions[0].transcript(None).duration
    done: dict[str, Any] = {"type": "transcript.text.done", "text": deltas.text, "usage": usage(seconds)}
    if asked.with_logprobs:
        done["logprobs"] = logprobs(words)
    yield server_event(done)
    yield LAST_EVENT


# Speech.


async def speak(request: Request, server: Server) -> Response:
    """Speak a text."""
    asked = await speech_request(request, server)
    speech = await asyncio.to_thread(_Speech, server, asked)  # a voice may have to be fetched
    if asked.as_events:
        return await begun(request, speech.events(), "text/event-stream")
    return await begun(request, speech.pieces(), CONTENT_TYPES[asked.format])


class _Speech:
    """One speech on its way to its listener.

    Args:
      server: server.
      asked: request.

    Raises:
      SpeechError: the text cannot be said.
    """

    def __init__(self, server: Server, asked: SpeechRequest):
        self._server, self._asked, self._frames = server, asked, 0
        self._session = asked.served.service.session(Outbox(), voice=asked.voice, is_file=True)
        self._session.say(asked.input)
        self._session.finish()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file as the sound is made."""
        served = self._asked.served
        encoder = SoundEncoder(self._asked.format, served.model.sample_rate)
        try:
            async with contextlib.aclosing(spoken(self._server, served, self._session, "openai")) as messages:
                async for pcm_T in sound_of(messages):
                    self._frames += 1
                    if data := await _encoded(encoder, pcm_T):
                        yield data
            if data := encoder.finish():
                yield data
        finally:
            encoder.finish()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a speech: the file's bytes, and what the speech counts as."""
        has_begun = False
        async with contextlib.aclosing(self.pieces()) as pieces:
            try:
                async for data in pieces:
                    has_begun = True
                    yield server_event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
            except DsmError as error:
                if not has_begun:
                    raise
                yield server_event({"error": api_error(error).fields()})
                return
        tokenizer = self._asked.served.model.tokenizer
        assert tokenizer is not None
        tokens = len(tokenizer.encode(self._asked.input))
        counts = {"input_tokens": tokens, "output_tokens": self._frames, "total_tokens": tokens + self._frames}
        yield server_event({"type": "speech.audio.done", "usage": counts})


async def _encoded(encoder: SoundEncoder, pcm_T: np.ndarray) -> bytes:
    return await asyncio.to_thread(encoder.encode, pcm_T) if encoder.is_slow else encoder.encode(pcm_T)


# Lists.


async def voices(request: Request, server: Server) -> Response:
    """List the voices of all models, or of the one that is named."""
    name = request.query_params.get("model")
    speaking = [served for served in server.models if served.kind == "tts"]
    if name is not None:
        found = server.find("tts", name)
        if found is None:
            raise unknown_model(name, [served.name for served in speaking])
        speaking = [found]
    listed = [
        {"id": voice, "object": "voice", "name": voice, "model": served.name,
         "default": voice == served.service.default_voice}
        for served in speaking
        for voice in served.service.voices
    ]  # fmt: skip
    return json_response({"object": "list", "data": listed})


def _model(served: Served, created: int) -> dict[str, Any]:
    owner, _, rest = served.name.partition("/")
    return {"id": served.name, "object": "model", "created": created, "owned_by": owner if rest else "dsm-jax"}
