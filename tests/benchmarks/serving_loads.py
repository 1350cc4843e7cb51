"""Loads of a server: live streams, uploads, speech, clients that come and go, and hours of audio."""

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping

import msgpack
import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from dsm_jax import audio
from dsm_jax.serving import client
from dsm_jax.serving.load import Load, packed_frames, run
from tests.benchmarks.mutations import attack
from tests.benchmarks.server import CLIP, SLOTS, ServerProcess

Figures = Mapping[str, float | None]
_WORD_FRAMES = 13  # of the clip: its first word and half a second


async def latency(server: ServerProcess, streams: int, seconds: float) -> Figures:
    """Measure live streams."""
    report = await run(Load(url=server.url, streams=streams, seconds=seconds, recording=str(CLIP)))
    tail = report.latency
    return {"p95_ms": tail.p95, "p99_ms": tail.p99, "errors": sum(report.errors.values()), "dropped": report.dropped}


async def _upload(server: ServerProcess) -> float:
    """Upload a minute as fast as it is taken; return the seconds that it took."""
    clip_T = audio.read(CLIP)
    pcm_T = np.resize(clip_T, 60 * 24_000)
    start = time.perf_counter()
    await client.transcribe_async(server.url, pcm_T)
    return time.perf_counter() - start


async def fairness(server: ServerProcess, seconds: float) -> Figures:
    """Measure live streams beside uploads that follow each other, and two uploads beside each other."""
    live = asyncio.create_task(run(Load(url=server.url, streams=SLOTS - 1, seconds=seconds, recording=str(CLIP))))
    await asyncio.sleep(1.0)
    uploads = []
    while not live.done():
        uploads.append(await _upload(server))
    report = await live
    one, two = await asyncio.gather(_upload(server), _upload(server))
    return {
        "uploads": len(uploads),
        "upload_s": max(uploads),
        "live_p95_ms": report.latency.p95,
        "unfairness": abs(one - two) / max(one, two),
        "errors": sum(report.errors.values()),
    }


async def _marked(server: ServerProcess, frames: list[bytes]) -> tuple[float, str, int]:
    """Send frames at once and a marker, and then nothing.

    Returns:
      Seconds up to the marker's answer, the words before it, and the number of words after it.
    """
    async with connect(f"{server.socket_url}/api/asr-streaming?wait=1") as socket:
        for frame in frames:
            await socket.send(frame)
        start = time.perf_counter()
        await socket.send(msgpack.packb({"type": "Marker", "id": 1}))
        words, after, late = [], 0, 0.0
        async for data in socket:
            message = msgpack.unpackb(data)
            if message["type"] == "Word":
                words.append(message["text"])
                after += bool(late)
            elif message["type"] == "Marker" and not late:
                late = time.perf_counter() - start
                await socket.send(msgpack.packb({"type": "Marker", "id": 2, "flush": True}))
            elif message["type"] == "Marker":
                return late, " ".join(words), after
    raise RuntimeError("the server has closed the connection")


async def markers(server: ServerProcess, count: int) -> Figures:
    """Measure the answers to markers of a client that sends no more, beside live streams in all other slots."""
    frames = packed_frames(str(CLIP))[:_WORD_FRAMES]
    _, wanted, _ = await _marked(server, frames)
    live = asyncio.create_task(run(Load(url=server.url, streams=SLOTS - 1, seconds=0.8 * count, recording=str(CLIP))))
    await asyncio.sleep(1.0)
    late, differ, early = [], 0, 0
    for _ in range(count):
        seconds, words, after = await _marked(server, frames)
        late.append(seconds)
        differ += words != wanted
        early += after > 0
        if live.done():
            break
    live.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await live
    return {"markers": len(late), "words": len(wanted.split()), "late_ms": 1e3 * max(late), "early": early,
            "differ": differ}  # fmt: skip


async def _bad(server: ServerProcess, chance: random.Random) -> None:
    """Connect, send some noise, and leave at some moment without a word."""
    with contextlib.suppress(WebSocketException, OSError, TimeoutError):
        async with connect(f"{server.socket_url}/api/asr-streaming", open_timeout=10) as socket:
            for _ in range(chance.randrange(6)):
                await socket.send(chance.randbytes(chance.randrange(1, 4000)))
            await asyncio.sleep(chance.random() * 0.2)
            if chance.random() < 0.5:
                socket.transport.abort()


async def good(server: ServerProcess) -> str:
    """Return the words of a well-behaved client."""
    return (await client.transcribe_async(server.url, str(CLIP))).text


async def churn(server: ServerProcess, seconds: float) -> Figures:
    """Mix good clients with such as abort or send noise, and compare the good ones' texts."""
    wanted, chance, end = await good(server), random.Random(0), time.monotonic() + seconds
    count = differ = failed = 0
    while time.monotonic() < end:
        results = await asyncio.gather(
            good(server), good(server), *(_bad(server, chance) for _ in range(4)), return_exceptions=True
        )
        for result in results[:2]:
            count += 1
            failed += isinstance(result, BaseException)
            differ += isinstance(result, str) and result != wanted
    await asyncio.sleep(1.0)
    used = server.metric("dsm_slots_used")
    return {"good": count, "differ": differ, "failed": failed, "used_slots": used, "logged": server.errors()}


async def mutations(server: ServerProcess, messages: int) -> Figures:
    """Send mutated messages in every dialect beside a good client; measure the memory that stays."""
    before = server.resident_mb()
    figures = await attack(server.url, messages, lambda: good(server))
    await asyncio.sleep(1.0)
    figures["used_slots"] = server.metric("dsm_slots_used")
    return figures | {"memory_mb": server.resident_mb() - before, "logged": server.errors()}


async def soak(server: ServerProcess, seconds: float, hours: float) -> Figures:
    """Keep all slots busy with uploads; compare memory and speed of the first fifth and of the end.

    Args:
      server: to be kept busy.
      seconds: at least so long.
      hours: of audio, at least so much unless it takes twice as long.
    """
    wanted, start, rounds = await good(server), time.monotonic(), []
    compiled, before = server.metric("dsm_compiles_total"), server.metric("dsm_audio_seconds_total")
    first_mb, differ, heard = None, 0, 0.0
    while time.monotonic() < start + seconds or (heard < hours and time.monotonic() < start + 2 * seconds):
        began = time.perf_counter()
        texts = await asyncio.gather(*(good(server) for _ in range(SLOTS)))
        rounds.append(time.perf_counter() - began)
        differ += sum(text != wanted for text in texts)
        if first_mb is None and time.monotonic() > start + seconds / 5:
            first_mb = server.resident_mb()
        heard = (server.metric("dsm_audio_seconds_total") - before) / 3600
    fifth = max(1, len(rounds) // 5)
    last_mb = server.resident_mb()
    return {
        "hours_of_audio": heard,
        "memory_mb": last_mb,
        "memory_growth": None if first_mb is None else last_mb / first_mb - 1,
        "compilations": server.metric("dsm_compiles_total") - compiled,
        "differ": differ,
        "slowdown": sum(rounds[-fifth:]) / sum(rounds[:fifth]),
    }


async def speech(server: ServerProcess) -> Figures:
    """Measure the first sound of one text alone, and of texts in all slots."""
    alone = [await run(Load(url=server.url, streams=1, seconds=4, tts=True)) for _ in range(3)]
    all_slots = await run(Load(url=server.url, streams=SLOTS, seconds=4, tts=True))
    firsts = [report.first.max for report in alone if report.first.max is not None]
    return {
        "first_alone_ms": sorted(firsts)[1] if len(firsts) == len(alone) else None,
        "first_of_eight_ms": all_slots.first.max,
        "slowest_real_time_factor": all_slots.real_time_factor.max,
        "errors": sum(sum(report.errors.values()) for report in (*alone, all_slots)),
    }
