"""The server without a model: which engine a model gets, who is let in, what a session is counted as, how it ends."""

import asyncio
import dataclasses
import itertools
import math
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect, WebSocketState

from dsm_jax.errors import AudioError, DsmError, FullError, SpeechError
from dsm_jax.serving import sockets, uploads
from dsm_jax.serving.access import Keys, allowed_host, allowed_origin
from dsm_jax.serving.app import make_app
from dsm_jax.serving.config import ServedModel, ServerConfig
from dsm_jax.serving.hearing import Heard
from dsm_jax.serving.outbox import Ended, Outbox, Started
from dsm_jax.serving.server import INBOX_S, Server
from dsm_jax.serving.sockets import ClosedError
from dsm_jax.serving.speaking import Said, Sound
from dsm_jax.serving.tickets import Ticket
from dsm_jax.stt.events import Word, WordEnded

FRAME_S = 0.08


def loaded(monkeypatch, *models: tuple[str, str, int], **settings) -> Server:
    """Return a server of models of a kind, a name and so many slots; nothing is behind them."""

    def service_of(settings: ServedModel, model: SimpleNamespace) -> SimpleNamespace:
        slots = SimpleNamespace(program=SimpleNamespace(slots=settings.slots), sessions=[])
        return SimpleNamespace(groups=[slots], total=settings.slots, model=model, step_seconds={1: 0.01})

    def load(settings: ServedModel) -> SimpleNamespace:
        return SimpleNamespace(name=settings.model.rpartition("/")[2], quantize="int8", devices=[])

    monkeypatch.setattr("dsm_jax.serving.server.service_of", service_of)
    served = [
        ServedModel(kind=kind, model=model, slots=slots, path=f"/{number}")
        for number, (kind, model, slots) in enumerate(models)
    ]
    server = Server(ServerConfig(models=tuple(served), **settings), "0")
    server.load(load)
    return server


def test_every_model_is_loaded_before_the_first_is_warmed_up(monkeypatch):
    done = []

    def load(settings: ServedModel) -> None:
        done.append(settings.model)
        if settings.model == "wrong":
            raise DsmError("wrong is of another kind")

    monkeypatch.setattr("dsm_jax.serving.server.service_of", lambda *_: done.append("warm"))
    models = tuple(ServedModel(kind="stt", model=name, path=f"/{name}") for name in ("right", "wrong"))
    with pytest.raises(DsmError, match="wrong is of another kind"):
        Server(ServerConfig(models=models), "0").load(load)
    assert done == ["right", "wrong"]


def connection(query: str = "", **headers: str) -> HTTPConnection:
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "headers": given, "query_string": query.encode()})


class Client:
    """A session that takes a slot and does nothing."""

    def __init__(self, *, is_file: bool = False):
        self.is_file, self.outbox, self.first_sound, self.waiting = is_file, Outbox(), None, 0.0


def value(server: Server, name: str, **labels: str) -> float:
    return server.metrics.registry.get_sample_value(name, labels) or 0.0


def test_models_of_one_name_are_told_apart_and_found_by_name_folder_or_alias(monkeypatch):
    models = ("stt", "here/digits", 2), ("stt", "there/digits", 2), ("tts", "elsewhere/digits", 2), ("tts", "talker", 2)
    server = loaded(monkeypatch, *models, aliases={"whisper-1": "digits-2"})
    listener, second, speaker, talker = server.models
    assert [served.name for served in server.models] == ["digits", "digits-2", "digits-3", "talker"]
    assert (server.find("stt"), server.find("tts"), server.find("stt", "whisper-1")) == (listener, speaker, second)
    assert (server.find("stt", "there/digits"), server.find("tts", "digits-3")) == (second, speaker)
    assert (server.find("tts", "digits"), server.find("stt", "talker"), server.find("tts", "talker")) == (
        *(None, None),
        talker,
    )


def test_engines_that_hear_gather_frames_and_go_first_and_those_that_speak_do_not(monkeypatch):
    server = loaded(monkeypatch, ("stt", "ears", 2), ("tts", "mouth", 2), min_step_ms=50.0)
    ears, mouth = (served.engine for served in server.models)
    assert (ears.min_step, ears._urgent, mouth.min_step, mouth._urgent) == (0.05, True, 0.0, False)
    assert ears._device is mouth._device
    late, early = SimpleNamespace(behind=True), SimpleNamespace(behind=False)
    assert [engine._hurry(one) for engine in (ears, mouth) for one in (late, early)] == [True, False, False, False]
    ears._on_step(0.5, 2)
    assert value(server, "dsm_step_seconds_sum", model="ears") == 0.5
    assert value(server, "dsm_step_seconds_count", model="mouth") == 0.0


def test_moshis_numbers_of_steps_are_those_of_all_models_of_a_kind(monkeypatch):
    server = loaded(monkeypatch, ("stt", "ears", 2), ("stt", "more ears", 2), ("tts", "mouth", 2))
    ears, more, mouth = server.models

    async def run() -> None:
        for served, frames in ((ears, 3), (more, 30), (mouth, 200)):
            async with server.session(served, Client(), "moshi") as ticket:
                ticket.frames = frames
                served.engine._on_step(0.5, 1)
                served.engine._on_step(0.5, 1)

    server.ready = True
    monkeypatch.setattr(server, "alive", lambda: True)
    asyncio.run(run())
    assert value(server, "asr_connection_num_steps_sum") == 33
    bounds = {"2.0": 0, "25.0": 1, "125.0": 2, "+Inf": 2}
    assert {le: value(server, "asr_connection_num_steps_bucket", le=le) for le in bounds} == bounds
    assert value(server, "py_model_connection_num_steps_sum") == 200
    assert value(server, "asr_model_step_duration_bucket", le="+Inf") == 4
    assert value(server, "asr_model_step_duration_sum") == 2.0
    assert value(server, "py_total_steps", handler="all") == value(server, "py_active_steps", handler="all") == 2
    assert value(server, "dsm_session_frames_sum", model="more ears") == 30


@pytest.mark.parametrize(("slots", "reserve", "begin"), [(4, 1, 3), (4, 0, 4), (2, 9, 1), (1, 1, 1)])
def test_slots_are_reserved_for_live_sessions_but_recordings_keep_one(monkeypatch, slots, reserve, begin):
    engine = loaded(monkeypatch, ("stt", "ears", slots), reserve_live=reserve).models[0].engine
    assert [engine.hold(Client(is_file=True)) for _ in range(slots)].count(True) == begin


def test_a_server_whose_engine_has_ended_takes_no_sessions_and_says_so(monkeypatch):
    server = loaded(monkeypatch, ("stt", "ears", 2))
    client = connection(host="localhost")
    refusal = server.refusal(client, begins=True)
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (503, "not ready")
    server.ready = True
    assert server.refusal(client, begins=True) is None
    server.models[0].engine.fault = RuntimeError("the device is gone")
    assert (server.alive(), server.accepting, server.refusal(client)) == (False, False, None)
    refusal = server.refusal(client, begins=True)
    assert refusal is not None
    assert refusal.reason == "not ready"

    async def begin() -> None:
        async with server.session(server.models[0], Client(), "moshi"):
            raise AssertionError("a session has begun")

    with pytest.raises(FullError, match="the server takes no more sessions"):
        asyncio.run(begin())
    asyncio.run(server.drain(0.0))
    refusal = server.refusal(client, begins=True)
    assert refusal is not None
    assert refusal.reason == "draining"


def test_a_session_that_is_not_admitted_is_counted_and_leaves_nothing_behind(monkeypatch):
    server = loaded(monkeypatch, ("stt", "ears", 1))
    server.ready, engine = True, server.models[0].engine

    async def hold() -> None:
        async with server.session(server.models[0], Client(), "moshi"):
            assert value(server, "dsm_sessions", model="ears", dialect="moshi") == 1.0
            async with server.session(server.models[0], Client(), "moshi"):
                raise AssertionError("there is no slot for it")

    with pytest.raises(FullError, match="no free channels"):
        asyncio.run(hold())
    assert value(server, "dsm_refused_total", reason="full") == 1.0
    assert value(server, "dsm_sessions_started_total", model="ears", dialect="moshi") == 1.0
    assert value(server, "dsm_sessions", model="ears", dialect="moshi") == 0.0
    assert (len(server._tickets), len(engine._leaving)) == (0, 1)


def test_a_key_lets_in_from_the_first_of_its_places_alone():
    keys = Keys(["one", "right", "of a name that is no \udcff text"])
    protocols = "realtime, openai-insecure-api-key.right"
    for headers in ({"kyutai_api_key": "right"}, {"authorization": "bearer  right "}, {"x_api_key": "one"}):
        assert keys.allow(connection(**headers))
    assert keys.allow(connection(sec_websocket_protocol=protocols))
    assert keys.allow(connection("auth_id=right"))
    for headers in ({}, {"authorization": "Basic right"}, {"authorization": "right"}, {"x_api_key": "Right"}):
        assert not keys.allow(connection(**headers))
    assert not keys.allow(connection("auth_id=right", kyutai_api_key="", x_api_key="right"))
    assert not keys.allow(connection("auth_id=right", x_api_key="", sec_websocket_protocol=protocols))
    assert Keys([]).allow(connection())


def test_pages_are_let_in_from_their_own_or_a_listed_origin_by_names_in_any_case():
    listed = ("https://Listed.example",)
    for origin, let_in in (
        ("http://Here.example:80", True),
        ("https://Listed.example", True),
        ("http://here.example", False),
        ("null", False),
    ):
        assert allowed_origin(connection(origin=origin, host="here.EXAMPLE:80"), listed) == let_in
    assert allowed_origin(connection(), listed)
    local = ServerConfig(host="127.0.0.1", origins=listed)
    for host, let_in in (
        ("LISTED.example", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("evil.example", False),
        ("[::1", False),
        ("", False),
    ):
        assert allowed_host(connection(host=host), local) == let_in, host
    for other in (dataclasses.replace(local, host="0.0.0.0"), dataclasses.replace(local, keys=("key of this server",))):
        assert allowed_host(connection(host="evil.example"), other)


LISTED, UNLISTED = "https://app.example", "https://evil.example"


def asked(method: str, origin: str, *, origins: tuple[str, ...] = (LISTED,), **headers: str) -> httpx.Response:
    """Return what a page of an origin gets from a server with a key."""

    async def ask() -> httpx.Response:
        server = Server(ServerConfig(keys=("right",), origins=origins), "0")
        web = httpx.ASGITransport(make_app(server))
        async with httpx.AsyncClient(transport=web, base_url="http://here.example") as client:
            return await client.request(method, "/v1/models", headers={"origin": origin, **headers})

    return asyncio.run(ask())


PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    "access-control-request-private-network": "true",
}


def test_a_page_of_a_listed_origin_may_ask_and_read_the_answer():
    question = asked("OPTIONS", LISTED, **PREFLIGHT)
    assert question.status_code == 200
    assert question.headers["access-control-allow-origin"] == LISTED
    assert "POST" in question.headers["access-control-allow-methods"]
    assert question.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert question.headers["access-control-allow-private-network"] == "true"
    assert question.headers["x-content-type-options"] == "nosniff"
    for key, code in (("right", 200), ("wrong", 401)):
        answer = asked("GET", LISTED, authorization=f"Bearer {key}")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (code, LISTED)
        assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(("origin", "origins"), [(UNLISTED, (LISTED,)), (UNLISTED, ()), ("null", (LISTED,))])
def test_a_page_of_another_origin_is_told_nothing(origin, origins):
    question = asked("OPTIONS", origin, origins=origins, **PREFLIGHT)
    answer = asked("GET", origin, origins=origins, authorization="Bearer right")
    assert (question.status_code, answer.status_code) == (400 if origins else 403, 403)
    for told in (question, answer):
        assert "access-control-allow-origin" not in told.headers


def ticket(server: Server, *, queued: bool = False, **session) -> Ticket:
    return Ticket(server.metrics, server.models[0], SimpleNamespace(outbox=Outbox(), **session), "moshi", queued=queued)


def test_frames_words_and_waits_are_each_counted_once(monkeypatch):
    server = loaded(monkeypatch, ("stt", "ears", 2))
    hearing = ticket(server, queued=True, latencies=[0.1, 0.2])
    word, sound = WordEnded(Word("one", 0.1, 0.4, 0.9)), Sound(np.zeros(4, np.float32))
    for message in (Started(), Started(), Heard(0, (), 0, 0.08), Heard(1, (), 0, 0.16), word):
        hearing._count(message)
    assert (hearing.frames, hearing.words) == (2, 1)
    speaking = ticket(server, first_sound=0.25)
    for message in (Started(), sound, sound, Said("one", 0.1, 0.4)):
        speaking._count(message)
    assert (speaking.frames, speaking.words) == (2, 1)
    counted = {
        name: value(server, f"dsm_{name}", model="ears")
        for name in ("queue_seconds_count", "frame_latency_seconds_count", "words_total", "first_audio_seconds_count")
    }
    assert list(counted.values()) == [1.0, 2.0, 2.0, 1.0], counted
    assert value(server, "dsm_audio_seconds_total", model="ears") == pytest.approx(4 * FRAME_S)
    assert value(server, "dsm_first_audio_seconds_sum", model="ears") == 0.25


def test_a_session_is_started_once_and_one_from_the_queue_by_the_engine_alone(monkeypatch):
    server, started = loaded(monkeypatch, ("stt", "ears", 2)), []
    monkeypatch.setattr(server.models[0].engine, "start", started.append)
    direct, queued = ticket(server), ticket(server, queued=True)
    for one in (direct, queued, direct):
        one.start()
    assert started == [direct.session]


@pytest.mark.parametrize("order", list(itertools.permutations(["first", "drain", "last"])))
def test_a_drain_is_the_reason_of_an_end_and_otherwise_the_first_end_is(monkeypatch, order):
    server = loaded(monkeypatch, ("stt", "ears", 2))
    drained, plain, hurried = ticket(server), ticket(server), ticket(server)
    hurried.hurry()
    for code, reason in enumerate(order):
        drained.end(code, reason)
        if reason != "drain":
            plain.end(code, reason)
            hurried.end(code, reason)
    assert (drained.code, drained.reason) == (order.index("drain"), "drain")
    assert (hurried.code, hurried.reason) == (plain.code, "drain")
    assert plain.reason == next(reason for reason in order if reason != "drain")


def test_an_end_with_a_reason_is_an_error_and_one_without_has_finished(monkeypatch):
    server = loaded(monkeypatch, ("stt", "ears", 2))
    good, bad = ticket(server), ticket(server)
    good._count(Ended())
    bad._count(Ended(1007, "the text cannot be said"))
    assert (good.code, good.reason, bad.code, bad.reason) == (1000, "finished", 1007, "error")


# Sockets.


class Socket:
    """A socket whose client sends some messages and then waits.

    Args:
      messages: of the client.
      refuses: what sending to the client does.
    """

    def __init__(self, *messages: dict, refuses: Callable[[], Awaitable[None]] | None = None):
        self.client_state = self.application_state = WebSocketState.CONNECTED
        self.messages, self.refuses, self.sent, self.closed = list(messages), refuses, [], None

    async def receive(self) -> dict:
        return self.messages.pop(0) if self.messages else await forever()

    async def send_text(self, data: str) -> None:
        if self.refuses is not None:
            await self.refuses()
        self.sent.append(data)

    async def send(self, message: dict) -> None:
        assert message.pop(sockets.LAST), "it would wait for a client that does not read"
        assert message.pop("type") == "websocket.send"
        if self.refuses is not None:
            await self.refuses()
        self.sent += message.values()

    async def close(self, code: int, reason: str) -> None:
        assert self.closed is None
        self.closed = code, reason


async def forever() -> dict:
    await asyncio.Event().wait()
    raise AssertionError


async def soon(awaited: Awaitable):
    return await asyncio.wait_for(awaited, 5.0)


def reading(monkeypatch, *messages: dict, waiting=(), hurried: bool = False, **settings) -> list[str | bytes]:
    """Return the messages that are read; `waiting` is how much of them has not been heard, as it is asked for."""
    server, left = loaded(monkeypatch, ("stt", "ears", 2), **settings), list(waiting)

    class Session:
        outbox = Outbox()

        @property
        def waiting(self) -> float:
            return left.pop(0) if len(left) > 1 else left[0] if left else 0.0

    one = Ticket(server.metrics, server.models[0], Session(), "moshi", queued=False)
    one.hurried = hurried

    async def read() -> list[str | bytes]:
        found = []
        async for data in sockets.received(Socket(*messages), server, one):
            assert len(left) <= 1, "what was heard no more of is read on"
            assert one.reading is None, "a hurry would end a wait that has ended"
            found.append(data)
        return found

    return asyncio.run(soon(read()))


def test_a_clients_messages_are_read_while_it_is_kept_up_with(monkeypatch):
    texts = [
        {"type": "websocket.receive", kind: data} for kind, data in (("text", "one"), ("bytes", b""), ("text", ""))
    ]
    left = {"type": "websocket.disconnect", "code": 1005}
    assert reading(monkeypatch, *texts, left, waiting=[INBOX_S + 1, math.inf, INBOX_S]) == ["one", b"", ""]


@pytest.mark.parametrize(
    ("settings", "code", "reason", "kind"),
    [
        ({"idle_s": 0.02, "max_session_s": 60.0}, 1000, "nothing was received for 0 s", "idle"),
        ({"idle_s": 60.0, "max_session_s": 0.02}, 1000, "a session lasts at most 0 s", "limit"),
        ({"waiting": [math.inf], "max_session_s": 0.02}, 1000, "a session lasts at most 0 s", "limit"),
        ({"hurried": True, "idle_s": 60.0}, 1001, "the server is shutting down", "drain"),
        ({"hurried": True, "waiting": [math.inf]}, 1001, "the server is shutting down", "drain"),
    ],
)
def test_reading_ends_when_the_client_is_idle_the_session_too_long_or_the_server_ending(
    monkeypatch, settings, code, reason, kind
):
    with pytest.raises(ClosedError) as closed:
        reading(monkeypatch, **settings)
    assert (closed.value.code, closed.value.reason, closed.value.kind) == (code, reason, kind)


def conversed(server: Server, hear, tell, **session) -> tuple[Socket, Ticket]:
    """Return socket and ticket of a conversation that has ended, with the message of an error as it is."""
    socket, one = Socket(), ticket(server, **session)

    async def run() -> None:
        before = asyncio.all_tasks()
        await sockets.converse(socket, one, lambda: hear(socket), lambda: tell(socket), str)
        assert asyncio.all_tasks() == before

    asyncio.run(soon(run()))
    return socket, one


def raises(error: Exception):
    async def hear(socket: Socket) -> None:
        raise error

    return hear


async def waits(socket: Socket) -> dict:
    return await forever()


@pytest.mark.parametrize(
    ("error", "code", "said", "ended"),
    [
        (DsmError("no text"), 1007, "no text", (1007, "bad message")),
        (ClosedError(1003, "no bytes", "bad message"), 1003, "no bytes", (1003, "bad message")),
        (ClosedError(1000, None, "finished"), 1000, None, (1000, "finished")),
        (WebSocketDisconnect(), 1000, None, (1005, "client")),
        (RuntimeError("the secret cause"), 1011, "the server has failed", (1011, "fault")),
    ],
)
def test_what_ends_a_conversation_is_told_by_message_and_code_and_noted(monkeypatch, caplog, error, code, said, ended):
    server = loaded(monkeypatch, ("stt", "ears", 2))
    socket, one = conversed(server, raises(error), waits)
    assert (socket.sent, socket.closed) == ([] if said is None else [said], (code, said or ""))
    assert (one.code, one.reason) == ended
    assert [f"session {one.id} failed"] * (code == 1011) == [record.getMessage() for record in caplog.records]


def test_a_conversation_ends_with_its_session_or_its_client_and_leaves_no_task(monkeypatch):
    server, stopped = loaded(monkeypatch, ("stt", "ears", 2)), []

    async def stops(socket: Socket) -> None:
        try:
            await forever()
        finally:
            for _ in range(9):  # what it has to clean up
                await asyncio.sleep(0)
            stopped.append(socket)

    async def leaves(socket: Socket) -> None:
        await asyncio.sleep(0)

    async def fails(socket: Socket) -> tuple[int, str]:
        return 1007, "a" + "é" * 100

    left, _ = conversed(server, leaves, stops)
    failed, _ = conversed(server, stops, fails)
    assert stopped == [left, failed]
    assert (left.sent, left.closed) == ([], (1000, ""))
    # A close frame has room for less than the message has.
    assert (failed.sent, failed.closed) == (["a" + "é" * 100], (1007, "a" + "é" * 59))


@pytest.mark.parametrize("has_text", [True, False])
def test_when_the_server_ends_a_session_is_finished_and_told_before_its_end(monkeypatch, has_text):
    server, called, done = loaded(monkeypatch, ("stt", "ears", 2)), [], asyncio.Event()
    for name in ("start", "wake"):
        monkeypatch.setattr(server.models[0].engine, name, lambda *_, name=name: called.append(name))

    def finish() -> None:
        if not has_text:
            raise SpeechError("there is no text")
        called.append("finish")
        done.set()

    async def tell(socket: Socket) -> tuple[int, None]:
        await done.wait()
        await socket.send_text("last words")
        return 1000, None

    ending = raises(ClosedError(1001, "the server is shutting down", "drain"))
    socket, one = conversed(server, ending, tell, finish=finish)
    assert called == (["finish", "start", "wake"] if has_text else [])
    assert socket.sent == ["last words"] * has_text + ["the server is shutting down"]
    assert (socket.closed, one.reason) == ((1001, "the server is shutting down"), "drain")


async def refuse(error: Exception) -> None:
    raise error


def test_a_client_that_does_not_read_or_has_left_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(sockets, "SEND_S", 0.02)
    with pytest.raises(ClosedError, match="the client reads too slowly") as closed:
        asyncio.run(soon(sockets.send(Socket(refuses=forever), "message")))
    assert (closed.value.code, closed.value.kind) == (1008, "slow")
    gone = WebSocketDisconnect(), RuntimeError("the socket is closed"), OSError("broken pipe")
    for error in gone:
        asyncio.run(soon(sockets.send_last(Socket(refuses=lambda error=error: refuse(error)), "message")))
    for state in ("client_state", "application_state"):
        closed = Socket()
        setattr(closed, state, WebSocketState.DISCONNECTED)
        asyncio.run(sockets.close(closed, 1000))
        assert closed.closed is None


# Whole recordings and texts.


def said(monkeypatch, *messages) -> list:
    """Return what a whole text's client is told."""
    server = loaded(monkeypatch, ("tts", "mouth", 2))
    server.ready, session = True, Client(is_file=True)

    async def listen() -> list:
        session.outbox.put(messages)
        told = [message async for message in uploads.spoken(server, server.models[0], session, "openai")]
        assert not server._tickets
        return told

    return asyncio.run(soon(listen()))


def test_a_whole_text_is_said_to_its_end_or_refused(monkeypatch):
    sound = Sound(np.ones(4, np.float32))
    assert said(monkeypatch, Started(), sound, Ended()) == [sound]
    for code, kind in ((1007, SpeechError), (1011, FullError), (1013, FullError)):
        for messages in ((Started(), sound), (Started(),)):
            with pytest.raises(kind, match="the reason"):
                said(monkeypatch, *messages, Ended(code, "the reason"))
    with pytest.raises(FullError, match="the reason"):
        said(monkeypatch, Ended(1013, "the reason"))


def test_a_whole_request_waits_for_a_slot_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(uploads, "QUEUE_S", 0.02)
    server = loaded(monkeypatch, ("stt", "ears", 2))
    one = ticket(server, queued=True)
    with pytest.raises(FullError, match="no slot has become free in 0 s; try again later"):
        asyncio.run(soon(uploads._begun(one)))
    assert (one.code, one.reason, one.is_whole) == (1013, "full", True)
    assert value(server, "dsm_refused_total", reason="queue") == 1.0


def test_a_recording_is_fed_no_faster_than_it_is_heard(monkeypatch):
    waiting, pushed, threads = [], [], []

    class Session:
        outbox = Outbox()

        @property
        def waiting(self) -> float:
            return waiting.pop() if waiting else 0.0

        def push(self, pcm_T: np.ndarray) -> None:
            assert not waiting
            pushed.append(pcm_T.size)
            waiting.extend([INBOX_S, INBOX_S + 1, math.inf])

        def finish(self) -> None:
            pushed.append("end")

    def blocks(count: int):
        for _ in range(count):
            threads.append(threading.current_thread())
            yield np.zeros(10, np.float32)

    woken = []
    engine = SimpleNamespace(wake=lambda: woken.append(len(pushed)))
    served = SimpleNamespace(engine=engine, model=SimpleNamespace(sample_rate=10))
    first_T = np.zeros(10, np.float32)
    asyncio.run(uploads._feed(Session(), served, first_T, blocks(2), 3.0))
    assert (pushed, woken) == ([10, 10, 10, "end"], [1, 2, 3, 4])
    assert threading.main_thread() not in threads, "decoding would hold up all sessions"
    waiting.clear()
    with pytest.raises(AudioError, match="the recording is longer than 3 s; send it in parts"):
        asyncio.run(uploads._feed(Session(), served, first_T, blocks(3), 3.0))
    (ended,) = asyncio.run(Session.outbox.take())
    assert ended.code == 1007
