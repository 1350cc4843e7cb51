"""OpenAI's realtime dialect for transcription, over a websocket."""

import asyncio
import binascii
import json
import logging
import os
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
import soxr
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from dsm_jax.errors import DsmError, FullError
from dsm_jax.serving.hearing import Heard, LiveHearing, Marked
from dsm_jax.serving.openai.errors import ApiError, api_error, error_response, parse_object, refusal_error
from dsm_jax.serving.openai.realtime_settings import Settings
from dsm_jax.serving.openai.realtime_turns import Items
from dsm_jax.serving.openai.requests import check_language, find_model, read_options
from dsm_jax.serving.outbox import Ended, Outbox
from dsm_jax.serving.server import OUTBOX, Server
from dsm_jax.serving.services import Served
from dsm_jax.serving.sockets import ClosedError, admitted, close, converse, data_of, received, send, send_last
from dsm_jax.serving.tickets import Ticket
from dsm_jax.serving.waiting import unless
from dsm_jax.stt.events import WordEnded, WordStarted
from dsm_jax.stt.transcriber import Utterance

PROTOCOL = "realtime"
# What clients send to change the session, and the answer's type.
_UPDATES = {
    "session.update": "session.updated",
    "transcription_session.update": "transcription_session.updated",
}
_KNOWN = (*_UPDATES, "input_audio_buffer.append", "input_audio_buffer.commit", "input_audio_buffer.clear")
_log = logging.getLogger("dsm_jax.serving")


def routes(server: Server) -> list[BaseRoute]:
    """Return the routes of a server."""

    async def endpoint(socket: WebSocket) -> None:
        await transcribe_socket(socket, server)

    return [WebSocketRoute("/v1/realtime", endpoint)]


async def transcribe_socket(socket: WebSocket, server: Server) -> None:
    """Transcribe a live stream in turns."""
    if not await admitted(server, socket, lambda refusal: error_response(refusal_error(refusal))):
        return
    try:
        if (intent := socket.query_params.get("intent", "transcription")) != "transcription":
            raise ApiError(
                f"the intent is {intent!r}; this server transcribes: connect with intent=transcription",
                param="intent",
                code="invalid_value",
            )
        name = socket.query_params.get("model")
        first = server.find("stt") if name is None else find_model(server, "stt", name)
        if first is None:
            raise ApiError("this server has no model that transcribes; start it with one", status=404)
    except ApiError as error:
        await socket.send_denial_response(error_response(error))
        return
    await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
    await _Session(socket, server, first).run()


class _Session:
    """One client's session.

    The slot is taken at the client's first event, which tells the model and the prompt if the client cares.
    """

    def __init__(self, socket: WebSocket, server: Server, served: Served):
        self._socket, self._server, self._served = socket, server, served
        self._id = f"sess_{os.urandom(10).hex()}"
        self._settings = Settings()
        self._hearing: LiveHearing | None = None
        self._utterance: Utterance | None = None
        self._items: Items | None = None
        self._samples = PcmReader(self._settings.rate, served.model.sample_rate)

    async def run(self) -> None:
        """Run the session to its end."""
        await self._send([self._told("session.created", flat=False)])
        with self._server.guest():
            try:
                idle = asyncio.wait_for(self._first(), self._server.config.idle_s)
                first = await unless(idle, self._server_ends())
            except TimeoutError:
                return await self._end(1000, "idle", f"nothing was received for {self._server.config.idle_s:.0f} s")
            except ClosedError as closed:
                return await self._end(closed.code, closed.kind, str(closed))
            except WebSocketDisconnect:
                return
            except Exception:
                _log.exception("session %s failed", self._id)
                return await self._end(1011, "fault", "the server has failed")
        self._hearing = hearing = LiveHearing(self._served.service, Outbox(OUTBOX), self._utterance)
        self._items = items = Items(self._mark, self._served.model.config.stt.audio_delay_seconds)
        self._use_settings(items)
        try:
            async with self._server.session(self._served, hearing, "realtime") as ticket:
                ticket.start()
                await converse(
                    self._socket,
                    ticket,
                    lambda: self._hear(ticket, hearing, first),
                    lambda: self._tell(ticket, items),
                    lambda reason: error_event(ApiError(reason, status=500, code="session_ended")),
                )
        except FullError as error:
            await send_last(self._socket, error_event(api_error(error)))
            await close(self._socket, 1013, "no free channels")

    async def _end(self, code: int, kind: str, reason: str) -> None:
        """Tell the client why the socket closes, and close it."""
        await send_last(self._socket, error_event(ApiError(reason, status=500 if code == 1011 else 400, code=kind)))
        await close(self._socket, code, reason)

    async def _server_ends(self) -> NoReturn:
        await self._server.until_draining()
        raise ClosedError(1001, "the server is shutting down", "drain")

    async def _first(self) -> str | bytes | None:
        """Return the first message if it is no update of the session, or None after an update.

        Raises:
          WebSocketDisconnect: the client has left.
          ClosedError: the connection has found a fault.
        """
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            data = data_of(message)
            event = _parsed(data)
            if event is None or event.get("type") not in list(_UPDATES):
                return data
            if await self._answered(data):
                return None

    async def _hear(self, ticket: Ticket, hearing: LiveHearing, first: str | bytes | None) -> None:
        if first is not None:
            await self._answered(first)
        async for data in received(self._socket, self._server, ticket):
            await self._answered(data)

    async def _answered(self, data: str | bytes) -> bool:
        """Do what a client's event asks for, or tell the client why not; return whether it was done."""
        event_id = None
        try:
            if isinstance(data, bytes):
                raise ApiError("a binary message was received; send JSON in text messages", code="invalid_json")
            event = parse_object(data, "the event")
            event_id = event.get("event_id")
            await self._send(await self._act(event))
        except DsmError as error:
            await send(self._socket, error_event(api_error(error), event_id))
            return False
        return True

    async def _act(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        kind, hearing, items = event.get("type"), self._hearing, self._items
        if kind not in _KNOWN:
            shown = repr(kind)[:100]
            raise ApiError(
                f"the event's type is {shown}; expected one of {', '.join(_KNOWN)}", param="type", code="invalid_value"
            )
        if kind in _UPDATES:
            return await self._update(event, kind)
        assert hearing is not None
        assert items is not None
        if kind == "input_audio_buffer.append":
            self._push(hearing, self._samples.read(event.get("audio")))
            return []
        self._push(hearing, self._samples.finish())
        received_s = hearing.received / self._served.model.sample_rate
        return items.commit(received_s) if kind.endswith("commit") else items.clear(received_s)

    def _push(self, hearing: LiveHearing, pcm_T: np.ndarray) -> None:
        if pcm_T.size:
            hearing.push(pcm_T)
            self._served.engine.wake()

    def _mark(self, number: int) -> None:
        assert self._hearing is not None
        self._hearing.mark(number, flush=True)
        self._served.engine.wake()

    async def _update(self, event: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        """Change the settings, all or none of them."""
        settings = self._settings.updated(event.get("session"))
        param = "session.audio.input.transcription"
        served = self._served
        if settings.model is not None:
            served = find_model(self._server, "stt", settings.model, f"{param}.model")
        if settings.language is not None:
            check_language(settings.language, served, f"{param}.language")
        begun = self._hearing is not None
        for name, is_same in (("model", served is self._served), ("prompt", settings.prompt == self._settings.prompt)):
            if begun and not is_same:
                raise ApiError(
                    f"the {name} of a session cannot change once it has begun; connect again",
                    param=f"{param}.{name}",
                    code="invalid_value",
                )
        if not begun:
            self._utterance = await read_options(served, prompt=settings.prompt) if settings.prompt else None
        if settings.rate != self._settings.rate or served is not self._served:
            if self._hearing is not None:
                self._push(self._hearing, self._samples.finish())
            self._samples = PcmReader(settings.rate, served.model.sample_rate)
        self._served, self._settings = served, settings
        if self._items is not None:
            self._use_settings(self._items)
        return [self._told(_UPDATES[kind], flat=kind.startswith("transcription"))]

    def _use_settings(self, items: Items) -> None:
        items.turns, items.with_logprobs = self._settings.turns, self._settings.with_logprobs

    def _told(self, type: str, *, flat: bool) -> dict[str, Any]:
        model = self._settings.model or self._served.name
        return {"type": type, "session": self._settings.to_dict(self._id, model, flat=flat)}

    async def _tell(self, ticket: Ticket, items: Items) -> tuple[int, str | None]:
        rate = self._served.model.sample_rate
        async for message in ticket.messages():
            match message:
                case Ended():
                    if message.reason is None:
                        await self._send(items.finish())
                    return message.code, message.reason
                case Heard():
                    await self._send(items.heard(message, rate))
                case WordStarted() | WordEnded():
                    await self._send(items.word(message))
                case Marked():
                    await self._send(items.marked())
        raise AssertionError("a session ends with Ended")

    async def _send(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            await send(self._socket, _encoded(event))


class PcmReader:
    """Read the samples of a client's events, at the model's rate.

    Args:
      rate: of the client's samples, Hz.
      model_rate: Hz.
    """

    def __init__(self, rate: int, model_rate: int):
        self._rate, self._model_rate = rate, model_rate
        self._resampler = self._fresh()

    def _fresh(self) -> soxr.ResampleStream | None:
        if self._rate == self._model_rate:
            return None
        return soxr.ResampleStream(self._rate, self._model_rate, 1, dtype="float32", quality="HQ")

    def read(self, encoded: object) -> np.ndarray:
        """Return the samples [T] of base64's text; the last ones may come with the next call.

        Raises:
          ApiError: no base64, or no whole number of 16-bit samples.
        """
        try:
            if not isinstance(encoded, str):
                raise TypeError
            data = binascii.a2b_base64(encoded, strict_mode=True)
        except (TypeError, ValueError):
            raise ApiError(
                "audio is no base64; send 16-bit little-endian samples in base64", param="audio", code="invalid_value"
            ) from None
        if len(data) % 2:
            raise ApiError(
                f"audio has {len(data)} bytes; expected an even number: 16-bit samples of one channel",
                param="audio",
                code="invalid_value",
            )
        pcm_T = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        return pcm_T if self._resampler is None else self._resampler.resample_chunk(pcm_T)

    def finish(self) -> np.ndarray:
        """Return the samples that are left in the resampler, and begin anew."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        rest_T = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        self._resampler = self._fresh()
        return rest_T


def _parsed(data: str | bytes) -> dict[str, Any] | None:
    try:
        return parse_object(data, "the event")
    except ApiError:
        return None


def error_event(error: ApiError, event_id: object = None) -> str:
    """Return the event of an error; `event_id` is that of the client's event."""
    told = error.fields() | {"event_id": event_id if isinstance(event_id, str) else None}
    return _encoded({"type": "error", "error": told})


def _encoded(event: dict[str, Any]) -> str:
    return json.dumps({"event_id": f"event_{os.urandom(10).hex()}", **event})
