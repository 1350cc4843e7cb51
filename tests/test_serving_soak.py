"""The run under load that `make soak` is: a figure beyond its bound is a fault, and planted faults are found."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import msgpack
import pytest
from websockets.asyncio.server import serve
from websockets.frames import Close

from dsm_jax.serving.connections import PatientHttp, PatientSocket
from dsm_jax.serving.moshi import routes as moshi
from dsm_jax.serving.moshi import wire
from tests.benchmarks import mutations, serving, serving_limits, serving_loads
from tests.benchmarks.server import SLOTS, ServerProcess
from tests.helpers.serving import Running, running, served

MODELS = served("stt", "digits", slots=SLOTS), served("tts", "digits-tts")


@pytest.mark.parametrize("part", serving.BOUNDS)
def test_a_figure_beyond_its_bound_is_a_fault_and_so_is_a_missing_one(part):
    bounds, least = serving.BOUNDS[part], serving.LEAST.get(part, {})
    good = {**bounds, **least}
    assert serving.faults(part, good) == []
    wrong = {name: (most + 0.001, "most", most) for name, most in bounds.items()}
    wrong |= {name: (few - 0.001, "least", few) for name, few in least.items()}
    for name, (beyond, word, bound) in wrong.items():
        for planted in (beyond, None, float("nan")):
            (fault,) = serving.faults(part, {**good, name: planted})
            assert fault == f"{part}: {name} is {planted}; expected at {word} {bound}"
        assert len(serving.faults(part, {key: value for key, value in good.items() if key != name})) == 1


def test_of_a_shorter_run_less_is_asked():
    good = {**serving.BOUNDS["soak"], "hours_of_audio": 3.0}
    assert serving.faults("soak", good, 0.125) == []
    assert serving.faults("soak", good, 0.126) == ["soak: hours_of_audio is 3.0; expected at least 3.024"]


def test_errors_and_tracebacks_of_a_log_are_counted(tmp_path):
    log = tmp_path / "log"
    lines = ('{"level": "info"}', '{"level": "error", "error": "Traceback (most"}', "Traceback (most recent")
    log.write_text("\n".join(lines))
    assert ServerProcess("", None, log).errors() == 2


@contextlib.contextmanager
def looked_at(tmp_path, **settings) -> Iterator[tuple[Running, ServerProcess]]:
    """Run a server in this process, as the parts of the run see it."""
    log = tmp_path / "log"
    log.touch()
    with running(*MODELS, page=False, **settings) as found:
        yield found, ServerProcess(found.url, SimpleNamespace(pid=os.getpid()), log)


@pytest.mark.slow
def test_churn_counts_texts_that_differ_and_metrics_are_summed(monkeypatch, tmp_path):
    with looked_at(tmp_path) as (_, server):
        figures = asyncio.run(serving_loads.churn(server, 1.0))
        assert serving.faults("churn", figures, 0.0) == []
        assert figures["good"] >= 2
        assert server.metric("dsm_slots") == SLOTS + 2
        assert server.metric("dsm_slots", model="digits") == SLOTS
        texts = iter(["wanted", *["another"] * 1_000])

        async def wrong(_) -> str:
            await asyncio.sleep(0.2)
            return next(texts)

        monkeypatch.setattr(serving_loads, "good", wrong)
        figures = asyncio.run(serving_loads.churn(server, 0.1))
        assert figures["differ"] == figures["good"] > 0
        assert serving.faults("churn", figures, 0.0)


def test_mutated_messages_differ_and_come_from_their_seed():
    data = mutations.SOCKETS["/api/asr-streaming"][0]
    made = [mutations.mutated(data, random.Random(seed)) for seed in range(200)]
    assert sum(message != data for message in made) > 190
    assert made[7] == mutations.mutated(data, random.Random(7))
    assert mutations.mutated(b"", random.Random(1)) is not None


@pytest.mark.parametrize(
    ("closed", "last", "counted"),
    [
        (None, None, {"dropped"}),
        (Close(1011, ""), msgpack.packb({"type": "Error", "message": "why"}), {"faults"}),
        (Close(1007, ""), msgpack.packb({"type": "Error", "message": "why"}), {"refused"}),
        (Close(1007, ""), json.dumps({"type": "error"}), {"refused"}),
        (Close(1007, ""), msgpack.packb({"type": "Ready"}), {"refused", "silent"}),
        (Close(1003, ""), json.dumps({"type": "session.created"}), {"refused", "silent"}),
        (Close(1013, ""), None, {"refused", "silent"}),
        (Close(1000, ""), None, set()),
    ],
)
def test_the_end_of_an_attackers_connection_is_judged(closed, last, counted):
    counts = Counter[str]()
    mutations._judge(SimpleNamespace(close_rcvd=closed, close_rcvd_then_sent=True), last, counts)
    assert {name for name, count in counts.items() if count} == counted
    if closed is not None and closed.code != 1011:  # the client has closed first: the code is its own
        counts.clear()
        mutations._judge(SimpleNamespace(close_rcvd=closed, close_rcvd_then_sent=False), last, counts)
        assert not counts


@pytest.mark.slow
def test_mutated_messages_are_answered_and_faults_are_counted(monkeypatch, tmp_path):
    with looked_at(tmp_path) as (_, server):
        figures = asyncio.run(serving_loads.mutations(server, 60))
        assert serving.faults("mutations", {**figures, "memory_mb": 0}, 60 / 10_000) == []
        assert figures["messages"] >= 60
        assert figures["status_400"] + figures["good"] >= 2

        def broken(data: bytes, kinds: object) -> wire.Init:
            raise RuntimeError("planted")

        monkeypatch.setattr(moshi.wire, "decode", broken)
        texts = iter(["one", "two", *["one"] * 1_000])

        async def changing() -> str:
            return next(texts)

        figures = asyncio.run(mutations.attack(server.url, 20, changing))
        assert figures["faults"] >= 1
        assert figures["differ"] == 1


@pytest.mark.parametrize("early", [False, True])
def test_a_word_behind_its_marker_is_found(early, tmp_path):
    async def answers(socket) -> None:
        await socket.send(msgpack.packb({"type": "Word", "text": "one"}))
        async for data in socket:
            marker = msgpack.unpackb(data)
            if early and marker["id"] == 2:
                await socket.send(msgpack.packb({"type": "Word", "text": "two"}))
            await socket.send(msgpack.packb(marker))

    async def run() -> tuple[float, str, int]:
        async with serve(answers, "127.0.0.1", 0) as web:
            port = web.sockets[0].getsockname()[1]
            return await serving_loads._marked(ServerProcess(f"http://127.0.0.1:{port}", None, tmp_path), [])

    seconds, words, after = asyncio.run(run())
    assert 0 < seconds < 10
    assert (words, after) == (("one two", 1) if early else ("one", 0))


@pytest.mark.slow
def test_markers_are_measured_beside_live_streams(tmp_path):
    with looked_at(tmp_path) as (_, server):
        figures = asyncio.run(serving_loads.markers(server, 2))
    assert serving.faults("markers", {**figures, "late_ms": 0}, 2 / 100) == []
    assert figures["late_ms"] > 300


@pytest.mark.slow
def test_a_wrong_code_of_a_full_server_is_found(monkeypatch, tmp_path):
    with looked_at(tmp_path) as (found, server):
        figures = asyncio.run(serving_limits.full(server))
        assert figures["wrong"] == 0
        assert figures["refused_ms"] > 0
        assert figures["taken_ms"] > 0
        found.wait_until_idle()
        close = moshi.close
        monkeypatch.setattr(moshi, "close", lambda socket, code, reason: close(socket, 1008, reason))
        assert asyncio.run(serving_limits.full(server))["wrong"] == serving_limits._TRIES


@pytest.mark.slow
@pytest.mark.parametrize("patient", [False, True])
def test_slow_clients_that_stay_are_found(monkeypatch, tmp_path, patient):
    monkeypatch.setattr(serving_limits, "_SLOW_S", 4.0 if patient else 12.0)
    if not patient:
        monkeypatch.setattr("dsm_jax.serving.run.PING_S", 0.2)
        monkeypatch.setattr("dsm_jax.serving.run.PONG_S", 1.0)
        monkeypatch.setattr(PatientHttp, "patience_s", 1.0)
        monkeypatch.setattr(PatientHttp, "send_s", 1.0)
        monkeypatch.setattr(PatientSocket, "linger_s", 1.0)
        # A sound in the buffers of a patient client's kernel is none that its server waits for.
        monkeypatch.setattr("dsm_jax.serving.run._KERNEL_BUFFER", 2048)
    with looked_at(tmp_path) as (_, server):
        figures = asyncio.run(serving_limits.slow(server))
    slow = ("reader_s", "writer_s", "request_s", "speech_s")
    if patient:
        assert [figures[name] for name in slow] == [None] * 4
        assert figures["wrong_codes"] == 1
    else:
        assert all(0.9 < (figures[name] or 0) < 12.0 for name in slow), figures
        assert figures["wrong_codes"] == 0
    assert figures["errors"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["nothing", "exit code", "last words"])
def test_an_end_that_loses_words_or_fails_is_found(monkeypatch, tmp_path, planted):
    if planted == "last words":
        monkeypatch.setattr("dsm_jax.serving.sockets.LAST_WORDS_S", 0.0)
    with looked_at(tmp_path) as (found, server):

        def stop(number: int) -> None:
            assert number == signal.SIGTERM
            asyncio.run_coroutine_threadsafe(found.server.drain(0.0), found.server.loop)

        process = SimpleNamespace(send_signal=stop, wait=lambda seconds: int(planted == "exit code"))
        ended = asyncio.run(serving_limits._drained(ServerProcess(server.url, process, server.log), 1))
    assert ended["wrong"] == {"nothing": 0, "exit code": 1, "last words": serving_limits._DRAINED}[planted]
    assert ended["unready_ms"] > 0


@pytest.mark.slow
def test_a_start_is_measured_with_its_first_frame(monkeypatch, tmp_path):
    monkeypatch.setattr(serving_limits, "serving", lambda: contextlib.nullcontext(server))
    with looked_at(tmp_path) as (_, server):
        figures = serving_limits.readiness()
        assert figures["compilations"] == 0
        assert figures["first_frame_ms"] > 0
        assert figures["ready_s"] > 0
        compiled = iter([3.0, 5.0])
        monkeypatch.setattr(ServerProcess, "metric", lambda *_: next(compiled))
        assert serving_limits.readiness()["compilations"] == 2.0


def test_a_server_that_does_not_start_is_told_with_its_log():
    words = r"the server has not started: .*there is no configuration file"
    with pytest.raises(RuntimeError, match=words), serving_limits.serving(("--config", "/no/file.toml")):
        raise AssertionError("it has started")
    assert subprocess.run([sys.executable, "-m", "tests.benchmarks.serving", "--help"], check=True).returncode == 0
