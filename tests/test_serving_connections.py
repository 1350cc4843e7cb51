"""Clients that do not send, do not read, break the protocol or just leave: what they are told, and that they go."""

import asyncio
import contextlib
import http.client
import json
import logging
import socket as sockets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

import dsm_jax
from dsm_jax import audio
from dsm_jax.serving import connections
from dsm_jax.serving.connections import PatientHttp, PatientSocket
from dsm_jax.serving.moshi import routes as moshi
from tests.benchmarks.server import handshake
from tests.helpers.serving import running, served, wait_for

pytestmark = pytest.mark.slow
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
ASR, TTS, REALTIME = "/api/asr-streaming", "/api/tts_streaming", "/v1/realtime?intent=transcription"
SPOKEN = " ".join(["seven"] * 200)
SPEECHES = {
    "moshi": (TTS, {"text": SPOKEN, "voice": "jackson"}),
    "OpenAI": (
        "/v1/audio/speech",
        {"model": "digits-tts", "input": SPOKEN, "voice": "jackson", "response_format": "wav"},
    ),
}


def pack(type: str, **fields) -> bytes:
    return msgpack.packb({"type": type, **fields}, use_single_float=True)


@pytest.fixture(scope="module")
def small_buffers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsm_jax.serving.run._KERNEL_BUFFER", 2048)
        yield


@pytest.fixture(scope="module")
def server(small_buffers):
    """Run a server whose sockets hold little, and which sends a ping all the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsm_jax.serving.run.PING_S", 0.2)
        patch.setattr("dsm_jax.serving.run.PONG_S", 1.0)
        patch.setattr(connections, "_PLAYED", 1e6)
        with running(served("stt", "digits"), served("tts", "digits-tts"), page=False) as found:
            yield found


@pytest.fixture(autouse=True)
def no_faults(caplog):
    """No client makes the server log an error."""
    with caplog.at_level(logging.WARNING):
        yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@contextlib.contextmanager
def connected(found, *, buffer: int | None = None) -> Iterator[sockets.socket]:
    """Connect without a client's library, with a small buffer for what is received."""
    host, port = found.address.split(":")
    with contextlib.closing(sockets.socket()) as raw:
        if buffer is not None:
            raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, buffer)
        raw.settimeout(30)
        raw.connect((host, int(port)))
        yield raw


@contextlib.contextmanager
def opened(found, path: str, *, buffer: int | None = None) -> Iterator[sockets.socket]:
    """Connect a websocket without a client's library."""
    with connected(found, buffer=buffer) as raw:
        raw.sendall(handshake(found.address, path))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += raw.recv(1)  # what comes behind is for whoever reads on
        assert head.startswith(b"HTTP/1.1 101")
        yield raw


def read_all(raw: sockets.socket) -> bytes:
    """Return all that comes until the connection ends."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(1 << 16):
            data += piece
    return data


def read_to_close(raw: sockets.socket) -> bytes:
    """Return all that comes up to a close frame, which nobody answers."""
    data = b""
    while not any(opcode == Opcode.CLOSE for opcode, _ in frames(data)):
        piece = raw.recv(1 << 16)
        assert piece, "the connection has ended without a close frame"
        data += piece
    return data


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Return opcode and content of each frame that a server has sent; a part of one is dropped."""
    found = []
    while len(data) >= 2:
        size, at = data[1] & 127, 2
        if size >= 126:
            at = 4 if size == 126 else 10
            size = int.from_bytes(data[2:at], "big")
        if len(data) < at + size:
            break
        found.append((data[0] & 15, data[at : at + size]))
        data = data[at + size :]
    return found


def end_of(data: bytes) -> tuple[dict, int]:
    """Return the last message and the close code of a server."""
    *others, (opcode, content) = [one for one in frames(data) if one[0] in (Opcode.TEXT, Opcode.BINARY, Opcode.CLOSE)]
    assert opcode == Opcode.CLOSE
    kind, message = others[-1]
    return (json.loads if kind == Opcode.TEXT else msgpack.unpackb)(message), int.from_bytes(content[:2], "big")


# Requests.


def ask(found, path: str, body: dict) -> bytes:
    sent = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {found.address}\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(sent)}\r\n\r\n".encode() + sent


@pytest.mark.parametrize(("path", "body"), SPEECHES.values(), ids=SPEECHES.keys())
def test_a_client_that_does_not_read_its_speech_gives_up_its_slot(server, monkeypatch, path, body):
    monkeypatch.setattr(PatientHttp, "send_s", 1.0)
    engine = server.server.find("tts").engine
    with connected(server, buffer=2048) as raw:
        raw.sendall(ask(server, path, body))
        wait_for(lambda: engine.used == 1)
        wait_for(lambda: engine.used == 0)
        assert len(read_all(raw)) < 1 << 20, "all of the speech came: it was no test of one that does not read"


@pytest.mark.parametrize(("path", "body"), SPEECHES.values(), ids=SPEECHES.keys())
def test_a_client_that_reads_slowly_gets_all_of_its_speech(server, monkeypatch, path, body):
    monkeypatch.setattr(PatientHttp, "send_s", 1.0)
    brief = {key: "seven " * 12 if value is SPOKEN else value for key, value in body.items()}
    found = []
    for every_s in (0.0, 0.02):
        with connected(server, buffer=2048) as raw:
            raw.sendall(ask(server, path, brief))
            start = time.monotonic()
            found.append(read_all_chunks(raw, every_s=every_s))
    assert time.monotonic() - start > 2.0, "nothing was held up for long"
    assert found[0] == found[1]
    assert len(found[0]) > 1 << 17


def read_all_chunks(raw: sockets.socket, *, every_s: float = 0.0) -> bytes:
    """Return the body of an answer in chunks; `every_s` seconds pass before each two kilobytes are read."""
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    data = b""
    while piece := answer.read1(2048):
        data += piece
        time.sleep(every_s)
    return data


def head(found, line: str = f"POST {ASR}") -> bytes:
    return f"{line} HTTP/1.1\r\nHost: {found.address}\r\n".encode()


def sending(found, first: bytes, rest: bytes, *, pieces_s: float, piece: int) -> float:
    """Send something and then the rest in pieces; return the seconds after which the server closes."""
    start = time.monotonic()
    with connected(found) as raw:
        raw.sendall(first)
        raw.settimeout(pieces_s)
        for at in range(0, len(rest), piece):
            try:
                raw.sendall(rest[at : at + piece])
                if not raw.recv(1 << 16):
                    break
            except TimeoutError:
                continue
            except OSError:  # it is closed
                break
        return time.monotonic() - start


@pytest.mark.parametrize("slow", ["nothing", "request", "handshake", "body", "second request"])
def test_a_client_that_sends_its_request_a_byte_at_a_time_is_closed(server, monkeypatch, slow):
    monkeypatch.setattr(PatientHttp, "patience_s", 0.5)
    begun = head(server)
    first, rest = {
        "nothing": (b"", begun),
        "request": (begun, b"X-Header: " + b"x" * 1000),
        "handshake": (b"", handshake(server.address, ASR)),
        "body": (begun + b"Content-Length: 1000\r\n\r\n", b"x" * 1000),
        "second request": (head(server, "GET /livez") + b"\r\n", begun + b"x" * 1000),
    }[slow]
    # Each byte comes well within the patience, which is for all of them.
    assert 0.4 < sending(server, first, rest, pieces_s=0.1, piece=1) < 4.0


def test_a_long_upload_on_a_slow_line_is_taken(server, monkeypatch):
    monkeypatch.setattr(PatientHttp, "patience_s", 0.3)
    body = (AUDIO / "digits_jackson.flac").read_bytes()
    with connected(server) as raw:
        raw.sendall(head(server) + f"Content-Length: {len(body)}\r\n\r\n".encode())
        for at in range(0, len(body), len(body) // 20):
            raw.sendall(body[at : at + len(body) // 20])
            time.sleep(0.1)
        assert raw.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_waits_in_a_session_is_not_closed_as_one_that_sends_no_request(server, monkeypatch):
    monkeypatch.setattr(PatientHttp, "patience_s", 0.3)

    async def wait() -> int:
        async with connect(server.socket_url + ASR) as socket:
            assert msgpack.unpackb(await socket.recv())["type"] == "Ready"
            await asyncio.sleep(1.5)
            await socket.send(pack("Marker", id=7))
            while (message := msgpack.unpackb(await asyncio.wait_for(socket.recv(), 30)))["type"] != "Marker":
                pass
            return message["id"]

    assert asyncio.run(wait()) == 7


def test_a_client_that_leaves_within_its_recording_is_no_fault(server):
    with connected(server) as raw:
        raw.sendall(head(server) + b"Content-Length: 10\r\n\r\nabc")
    answer = http.client.HTTPConnection(server.address)
    answer.request("GET", "/livez")
    assert answer.getresponse().status == 200
    answer.close()


# Websockets.


def transcribed(found, clip_T: np.ndarray, *, query: str = "") -> str:
    async def run() -> str:
        async with connect(f"{found.socket_url}{ASR}{query}", max_size=None) as socket:
            await socket.send(pack("Audio", pcm=clip_T.tolist()))
            await socket.send(pack("Marker", id=1, flush=True))
            words = []
            async for data in socket:
                message = msgpack.unpackb(data)
                if message["type"] == "Word":
                    words.append(message["text"])
                if message["type"] == "Marker":
                    break
            return " ".join(words)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def clip_T():
    return audio.read(AUDIO / "digits_jackson.flac")


@pytest.fixture(scope="module")
def wanted(clip_T):
    return dsm_jax.transcribe(dsm_jax.load("digits"), clip_T).text


SILENCE = {
    ASR: pack("Audio", pcm=np.zeros(4800, np.float32).tolist()),
    TTS + "?format=PcmMessagePack": pack("Text", text=SPOKEN),
    REALTIME: json.dumps({"type": "input_audio_buffer.append", "audio": "AAAA"}).encode(),
}


def masked(data: bytes, opcode: int) -> bytes:
    return Frame(opcode, data).serialize(mask=True)


@pytest.mark.parametrize("path", SILENCE)
def test_a_client_that_does_not_read_is_told_and_closed_with_1008_and_others_go_on(server, clip_T, wanted, path):
    with opened(server, path, buffer=2048) as raw:
        frame = masked(SILENCE[path], Opcode.TEXT if path == REALTIME else Opcode.BINARY)
        raw.sendall(frame)
        engine = server.server.find("tts" if TTS in path else "stt").engine
        wait_for(lambda: engine.used == 1)
        assert transcribed(server, clip_T) == wanted
        wait_for(lambda: engine.used == 0)
        message, code = end_of(read_to_close(raw))
    sentence = message["error"]["message"] if path == REALTIME else message["message"]
    assert (sentence, code) == ("the client does not read: it has not answered a ping for 1 s", 1008)
    name = server.server.find("tts" if TTS in path else "stt").name
    text = server.server.metrics.text().decode()
    assert f'dsm_sessions_ended_total{{model="{name}",reason="slow"}}' in text


def test_a_client_that_answers_pings_and_reads_no_messages_is_closed_with_1008(small_buffers, monkeypatch):
    monkeypatch.setattr("dsm_jax.serving.sockets.SEND_S", 1.0)
    monkeypatch.setattr("dsm_jax.serving.run.PING_S", 300.0)  # as if each were answered
    body = pack("Audio", pcm=np.zeros(24_000 * 4, np.float32).tolist())
    with running(served("stt", "digits"), page=False) as found, opened(found, ASR, buffer=2048) as raw:

        def send_all() -> None:
            with contextlib.suppress(OSError):  # closed by the server
                for _ in range(400):
                    raw.sendall(masked(body, Opcode.BINARY))

        sending = threading.Thread(target=send_all)
        sending.start()
        engine = found.server.models[0].engine
        wait_for(lambda: engine.used == 1)
        wait_for(lambda: engine.used == 0)
        assert end_of(read_to_close(raw)) == ({"type": "Error", "message": "the client reads too slowly"}, 1008)
        sending.join(60)
        assert 'reason="slow"} 1.0' in found.server.metrics.text().decode()


def test_a_client_that_is_not_read_need_not_answer_pings(server, monkeypatch, clip_T, wanted):
    """A client that waits for a slot is read no further once enough waits, so that its answers lie behind its audio."""
    monkeypatch.setattr("dsm_jax.serving.sockets.QUEUED_S", 1.0)
    engine = server.server.find("stt").engine

    async def hold(free: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(engine.total):
                await (await stack.enter_async_context(connect(server.socket_url + ASR))).recv()
            waiting = asyncio.ensure_future(asyncio.to_thread(transcribed, server, clip_T, query="?wait=1"))
            while not engine.queued:
                await asyncio.sleep(0.01)
            await asyncio.sleep(4.0)  # four times as long as a ping may be unanswered
            assert engine.queued == 1
        assert await waiting == wanted

    server.wait_until_idle()
    asyncio.run(hold(asyncio.Event()))


def test_a_ping_may_be_answered_as_late_as_a_client_reads_that_plays_the_sound(monkeypatch):
    monkeypatch.setattr(connections, "_PLAYED", 4_000)
    told, timers = [], []
    loop = asyncio.new_event_loop()
    monkeypatch.setattr(loop, "call_later", lambda seconds, call: timers.append(seconds))
    monkeypatch.setattr(loop, "time", lambda: now)
    socket = object.__new__(PatientSocket)
    socket.loop, socket.ping_timeout, socket.ping_sent_at = loop, 20.0, 100.0
    socket._sent, socket._paused_at, socket._paused_s, now = 0, None, 0.0, 119.0
    monkeypatch.setattr(socket, "_tell", lambda *fault: told.append(fault), raising=False)
    socket.keepalive_timeout()
    assert (told, timers.pop()) == ([], 1.0)
    socket._sent, now = 40_000, 125.0  # ten seconds of Opus
    socket.keepalive_timeout()
    assert (told, timers.pop()) == ([], 5.0)
    socket._sent, socket._paused_s, socket._paused_at, now = 0, 10.0, 129.0, 135.0  # 16 s in which it was not read
    socket.keepalive_timeout()
    assert (told, timers) == ([], [1.0])
    now = socket._paused_at = 151.0
    socket._paused_s = 30.0
    socket.keepalive_timeout()
    assert told == [(1008, "the client does not read: it has not answered a ping for 20 s", "slow")]
    loop.close()


def test_the_time_in_which_a_client_was_not_read_is_counted_until_it_is_read_again():
    async def read() -> tuple[float, float | None]:
        socket = object.__new__(PatientSocket)
        socket.loop = SimpleNamespace(time=lambda: 8.0)
        socket.queue, socket.transport = asyncio.Queue(), SimpleNamespace(resume_reading=lambda: None)
        socket.queue.put_nowait({"type": "websocket.receive", "bytes": b""})
        socket.read_paused, socket._paused_at, socket._paused_s = True, 5.0, 1.0
        await socket.receive()
        return socket._paused_s, socket._paused_at

    assert asyncio.run(read()) == (4.0, None)


LARGE = bytes(connections.MESSAGE_BYTES + 1)
BROKEN = {
    "text that is none": (masked(b"\xff\xfe", Opcode.TEXT), 1007, "a text message is no UTF-8"),
    "large": (masked(LARGE, Opcode.BINARY), 1009, "a message has more than 4 MiB; send what it holds in several"),
    "large text": (masked(LARGE, Opcode.TEXT), 1009, "a message has more than 4 MiB; send what it holds in several"),
    "no mask": (Frame(Opcode.BINARY, b"x").serialize(mask=False), 1002, "the websocket's protocol was broken"),
    "no frame": (b"\xff" * 32, 1002, "the websocket's protocol was broken"),
}


@pytest.mark.parametrize("path", SILENCE)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("data", "code", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_read_is_answered_by_message_and_code(server, path, begun, data, code, sentence):
    with opened(server, path) as raw:
        if begun:
            raw.sendall(masked(SILENCE[path], Opcode.TEXT if path == REALTIME else Opcode.BINARY))
        raw.sendall(data)
        message, found = end_of(read_to_close(raw))
        if code != 1007:  # what the client answers to that cannot be read either, and is not waited for
            start = time.monotonic()
            read_all(raw)
            assert time.monotonic() - start < 5.0
    assert (message["error"]["message"] if path == REALTIME else message["message"], found) == (sentence, code)
    server.wait_until_idle()


def test_messages_before_one_that_cannot_be_read_are_answered(server):
    with opened(server, REALTIME) as raw:
        update = json.dumps({"type": "session.update", "session": {}}).encode()
        raw.sendall(masked(update, Opcode.TEXT) + b"\xff" * 32)  # in one piece
        kinds = [json.loads(content)["type"] for opcode, content in frames(read_to_close(raw)) if opcode == Opcode.TEXT]
    assert kinds == ["session.created", "session.updated", "error"]


def test_what_breaks_the_protocol_before_the_handshakes_answer_is_told_after_it(server, monkeypatch):
    async def later(*arguments) -> bool:
        await asyncio.sleep(0.5)
        return await admitted(*arguments)

    admitted = moshi.admitted
    monkeypatch.setattr(moshi, "admitted", later)
    with connected(server) as raw:
        raw.sendall(handshake(server.address, ASR))
        time.sleep(0.2)
        raw.sendall(b"\xff" * 32)
        told = read_all(raw)
    head, _, rest = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101")
    assert end_of(rest) == ({"type": "Error", "message": "the websocket's protocol was broken"}, 1002)


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_does_not_leave_is_dropped(server, monkeypatch, reads):
    monkeypatch.setattr(PatientSocket, "linger_s", 0.5)
    with opened(server, ASR) as raw:
        raw.sendall(masked(b"\xc1", Opcode.BINARY))
        start = time.monotonic()
        if not reads:
            time.sleep(2.0)
        read_all(raw)
        assert time.monotonic() - start < 5.0


@pytest.mark.parametrize("path", SILENCE)
def test_a_client_that_leaves_with_its_handshake_is_no_fault(server, path):
    for _ in range(5):
        with opened(server, path) as raw:
            raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset in place of an end
    server.wait_until_idle()


@pytest.mark.parametrize(("path", "body"), SPEECHES.values(), ids=SPEECHES.keys())
def test_a_speech_that_the_servers_end_cuts_off_is_no_fault_and_its_client_can_tell(small_buffers, path, body):
    with running(served("tts", "digits-tts"), page=False) as found, connected(found, buffer=2048) as raw:
        raw.sendall(ask(found, path, body))
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert answer.read1(100)
        asyncio.run_coroutine_threadsafe(found.server.drain(0.0), found.server.loop)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            answer.read()


def test_a_full_realtime_server_tells_a_client_that_has_left_without_a_fault(server):
    engine = server.server.find("stt").engine

    async def crowd() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(engine.total):
                await (await stack.enter_async_context(connect(server.socket_url + ASR))).recv()
            for leaves in (True, False):
                async with connect(server.socket_url + REALTIME) as socket:
                    await socket.recv()
                    await socket.send(json.dumps({"type": "input_audio_buffer.clear"}))
                    if leaves:
                        socket.transport.abort()
                        continue
                    error = json.loads(await asyncio.wait_for(socket.recv(), 20))["error"]
                    assert error["message"] == "no free channels"
                    with pytest.raises(ConnectionClosed):
                        await asyncio.wait_for(socket.recv(), 20)
                    assert socket.close_code == 1013

    server.wait_until_idle()
    asyncio.run(crowd())
