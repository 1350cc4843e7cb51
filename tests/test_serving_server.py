"""The server's books without a model: which engine a model gets, who is let in, and what a session is counted as."""

import asyncio
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.requests import HTTPConnection

from dsm_jax.errors import FullError
from dsm_jax.serving.config import ServedModel, ServerConfig
from dsm_jax.serving.hearing import Heard
from dsm_jax.serving.outbox import Ended, Outbox, Started
from dsm_jax.serving.server import Server, Ticket
from dsm_jax.serving.speaking import Said, Sound
from dsm_jax.stt.events import Word, WordEnded

FRAME_S = 0.08


def loaded(monkeypatch, *models: tuple[str, str, int], **settings) -> Server:
    """Return a server of models of a kind, a name and so many slots; nothing is behind them."""

    def service_of(settings: ServedModel, model: SimpleNamespace) -> SimpleNamespace:
        slots = SimpleNamespace(program=SimpleNamespace(slots=settings.slots), sessions=[])
        return SimpleNamespace(slots=slots, model=model, step_seconds={1: 0.01})

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


class Client:
    """A session that takes a slot and does nothing."""

    def __init__(self, *, is_file: bool = False):
        self.is_file, self.outbox = is_file, Outbox()


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


@pytest.mark.parametrize(("slots", "reserve", "begin"), [(4, 1, 3), (4, 0, 4), (2, 9, 1), (1, 1, 1)])
def test_slots_are_reserved_for_live_sessions_but_recordings_keep_one(monkeypatch, slots, reserve, begin):
    engine = loaded(monkeypatch, ("stt", "ears", slots), reserve_live=reserve).models[0].engine
    assert [engine.hold(Client(is_file=True)) for _ in range(slots)].count(True) == begin


def test_a_server_whose_engine_has_ended_takes_no_sessions_and_says_so(monkeypatch):
    server = loaded(monkeypatch, ("stt", "ears", 2))
    connection = HTTPConnection({"type": "http", "headers": [(b"host", b"localhost")], "query_string": b""})
    refusal = server.refusal(connection, begins=True)
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (503, "not ready")
    server.ready = True
    assert server.refusal(connection, begins=True) is None
    server.models[0].engine.fault = RuntimeError("the device is gone")
    assert (server.alive(), server.accepting, server.refusal(connection)) == (False, False, None)
    refusal = server.refusal(connection, begins=True)
    assert refusal is not None
    assert refusal.reason == "not ready"

    async def begin() -> None:
        async with server.session(server.models[0], Client(), "moshi"):
            raise AssertionError("a session has begun")

    with pytest.raises(FullError, match="the server takes no more sessions"):
        asyncio.run(begin())
    asyncio.run(server.drain(0.0))
    refusal = server.refusal(connection, begins=True)
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


def ticket(server: Server, *, queued: bool = False, **session) -> Ticket:
    return Ticket(server, server.models[0], SimpleNamespace(outbox=Outbox(), **session), "moshi", queued=queued)


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
