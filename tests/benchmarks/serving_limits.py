"""Limits of a server: how soon it is ready, full, free again and ended, and how long a slow client can stay."""

import asyncio
import contextlib
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

import msgpack
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from dsm_jax import audio
from dsm_jax.serving import client
from dsm_jax.serving.load import Load, packed_frames, run
from tests.benchmarks.server import CLIP, MODELS, SLOTS, ServerProcess, handshake, serving

Figures = Mapping[str, float | None]
_ASR = "/api/asr-streaming"
_TRIES = 20
_SLOW_S = 80.0  # in which each slow client must be gone
_DRAINED = 4  # streams


async def _ready(socket: ClientConnection) -> None:
    message = msgpack.unpackb(await asyncio.wait_for(socket.recv(), 30))
    if message["type"] != "Ready":
        raise RuntimeError(message.get("message", message["type"]))


async def full(server: ServerProcess) -> Figures:
    """Measure how soon a client is refused by a full server, and taken once another has left."""
    url, refused, taken, wrong = server.socket_url + _ASR, [], [], 0
    async with contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(connect(url)) for _ in range(SLOTS)]
        for socket in held:
            await _ready(socket)
        for _ in range(_TRIES):
            start = time.perf_counter()
            async with connect(url) as socket:
                message = msgpack.unpackb(await socket.recv())
                with contextlib.suppress(ConnectionClosed):
                    await socket.recv()
                refused.append(time.perf_counter() - start)
            wrong += (message, socket.close_code) != ({"type": "Error", "message": "no free channels"}, 1013)
        for _ in range(_TRIES):
            await held.pop(0).close()
            start = time.perf_counter()
            while len(held) < SLOTS:
                socket = await stack.enter_async_context(connect(url))
                with contextlib.suppress(RuntimeError):
                    await _ready(socket)
                    held.append(socket)
            taken.append(time.perf_counter() - start)
    return {"refused_ms": 1e3 * max(refused), "taken_ms": 1e3 * max(taken), "wrong": wrong}


async def _open(server: ServerProcess, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.address.partition(":")
    # With a small limit, what the client does not read stays in the kernel's buffers.
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 12)
    writer.write(sent)
    return reader, writer


async def _until(condition, start: float) -> float | None:
    """Return the seconds after which a condition holds; None if it never does."""
    while time.monotonic() < start + _SLOW_S:
        if await asyncio.to_thread(condition):
            return time.monotonic() - start
        await asyncio.sleep(0.25)
    return None


async def _slow_reader(server: ServerProcess) -> tuple[float | None, int]:
    """Send audio in real time and read nothing until the server has ended the session; return seconds and code."""
    start, frames = time.monotonic(), packed_frames(str(CLIP))
    reader, writer = await _open(server, handshake(server.address, _ASR))
    await reader.readuntil(b"\r\n\r\n")
    reader._transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]

    async def send() -> None:
        with contextlib.suppress(OSError):
            for number in range(round(_SLOW_S / 0.08)):
                writer.write(Frame(Opcode.BINARY, frames[number % len(frames)]).serialize(mask=True))
                await writer.drain()
                await asyncio.sleep(0.08)

    sending = asyncio.create_task(send())
    seconds = await _until(lambda: server.metric("dsm_sessions_ended_total", reason="slow") >= 1, start)
    sending.cancel()
    if seconds is None:
        writer.close()
        return None, 0
    reader._transport.resume_reading()  # pyright: ignore[reportAttributeAccessIssue]
    data = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(20.0):
            while piece := await reader.read(1 << 16):
                data += piece
    writer.close()
    # A close frame ends what is sent; its sentence comes after its code.
    at = data.rfind(b"\x88")
    return seconds, int.from_bytes(data[at + 2 : at + 4], "big") if at >= 0 else 0


async def _slow_writer(server: ServerProcess, first: bytes, rest: bytes) -> float | None:
    """Send ten bytes a second and read all that comes; return the seconds until the server ends the connection."""
    start = time.monotonic()
    reader, writer = await _open(server, first)
    if first:
        await reader.readuntil(b"\r\n\r\n")  # what came with a handshake would be none of its frames

    async def read() -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1 << 16):
                pass

    reading = asyncio.create_task(read())
    for byte in rest:
        if reading.done() or time.monotonic() > start + _SLOW_S:
            break
        with contextlib.suppress(OSError):
            writer.write(bytes([byte]))
            await writer.drain()
        await asyncio.sleep(0.1)
    seconds = time.monotonic() - start if reading.done() else None
    reading.cancel()
    writer.close()
    return seconds


async def _unread_speech(server: ServerProcess) -> float | None:
    """Ask for a long speech and read nothing of it; return the seconds until its slot is free."""
    body = b'{"model": "digits-tts", "input": "%s", "voice": "jackson", "response_format": "wav"}' % (b"seven " * 600)
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: {server.address}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    start = time.monotonic()
    reader, writer = await _open(server, head + body)
    await reader.readuntil(b"\r\n\r\n")
    reader._transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]
    seconds = await _until(lambda: server.metric("dsm_slots_used", model="digits-tts") == 0, start)
    writer.close()
    return seconds


async def slow(server: ServerProcess) -> Figures:
    """Measure how long clients stay that do not read or hardly send, and live streams beside them."""
    live = asyncio.create_task(run(Load(url=server.url, streams=SLOTS - 2, seconds=_SLOW_S, recording=str(CLIP))))
    await asyncio.sleep(1.0)
    frame = Frame(Opcode.BINARY, bytes(4_000)).serialize(mask=True)
    (reader_s, code), writer_s, request_s, speech_s, report = await asyncio.gather(
        _slow_reader(server),
        _slow_writer(server, handshake(server.address, _ASR), frame),
        _slow_writer(server, b"", b"POST / HTTP/1.1\r\nx: " + b"x" * 2_000),
        _unread_speech(server),
        live,
    )
    return {
        "reader_s": reader_s,
        "wrong_codes": int(code != 1008),
        "writer_s": writer_s,
        "request_s": request_s,
        "speech_s": speech_s,
        "live_p95_ms": report.latency.p95,
        "errors": sum(report.errors.values()),
    }


def _status(server: ServerProcess, path: str) -> int:
    try:
        with urllib.request.urlopen(server.url + path, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


async def _live_frames(server: ServerProcess, count: int) -> list[float]:
    """Return the seconds after which each frame of a live stream is answered, from the first on."""
    found = []
    async with connect(server.socket_url + _ASR) as socket:
        await _ready(socket)
        for frame in packed_frames(str(CLIP))[:count]:
            start = time.perf_counter()
            await socket.send(frame)
            while msgpack.unpackb(await asyncio.wait_for(socket.recv(), 30))["type"] != "Step":
                pass
            found.append(time.perf_counter() - start)
            await asyncio.sleep(max(0.0, start + 0.08 - time.perf_counter()))
    return found


def readiness() -> Figures:
    """Measure the start of a server whose programs were compiled before, and its first live frame."""
    with serving():
        pass
    start = time.monotonic()
    with serving() as server:
        while _status(server, "/readyz") != 200:
            time.sleep(0.01)
        ready_s = time.monotonic() - start
        compiled = server.metric("dsm_compiles_total")
        first, *others = asyncio.run(_live_frames(server, 40))
        return {
            "ready_s": ready_s,
            "first_frame_ms": 1e3 * first,
            "steady_ms": 1e3 * float(np.quantile(others, 0.95)),
            "compilations": server.metric("dsm_compiles_total") - compiled,
        }


async def _drained(server: ServerProcess, signals: int) -> dict[str, float]:
    """Stop a server under live streams that have sent all they have, by one signal or more."""
    clip_T, url = audio.read(CLIP), server.socket_url + _ASR
    spoken = await client.transcribe_async(server.url, clip_T)
    clip_T = clip_T[: round(spoken.words[-1].end * 24_000)]  # so that the last word is heard in the end alone
    wanted = await client.transcribe_async(server.url, clip_T)

    async def stream(heard: asyncio.Event) -> tuple[str, int | None]:
        words, steps = [], 0
        async with connect(url, max_size=None) as socket:
            await socket.send(msgpack.packb({"type": "Audio", "pcm": clip_T.tolist()}, use_single_float=True))
            with contextlib.suppress(ConnectionClosed):
                while True:
                    message = msgpack.unpackb(await socket.recv())
                    steps += message["type"] == "Step"
                    words += [message["text"]] if message["type"] == "Word" else []
                    if steps == clip_T.size // 1920:
                        heard.set()
            return " ".join(words), socket.close_code

    heard = [asyncio.Event() for _ in range(_DRAINED)]
    streams = [asyncio.create_task(stream(event)) for event in heard]
    for event in heard:
        await event.wait()
    start = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    while await asyncio.to_thread(_status, server, "/readyz") == 200:
        pass
    unready = time.perf_counter() - start
    refused = 101
    try:
        async with connect(url):
            pass
    except InvalidStatus as error:
        refused = error.response.status_code
    for _ in range(signals - 1):
        start = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
    ends = await asyncio.gather(*streams)
    code = await asyncio.to_thread(server.process.wait, 60)
    return {
        "unready_ms": 1e3 * unready,
        "seconds": time.perf_counter() - start,
        "wrong": sum(end != (wanted.text, 1001) for end in ends) + (refused != 503) + (code != 0),
    }


def drain() -> Figures:
    """Measure the end of a server under live streams, by one signal and by two."""
    with serving((*MODELS[:4], "--drain-s", "3")) as server:
        once = asyncio.run(_drained(server, 1))
    with serving((*MODELS[:4], "--drain-s", "60")) as server:
        twice = asyncio.run(_drained(server, 2))
    return {
        "unready_ms": max(once["unready_ms"], twice["unready_ms"]),
        "drained_s": once["seconds"],
        "hurried_s": twice["seconds"],
        "wrong": once["wrong"] + twice["wrong"],
    }
