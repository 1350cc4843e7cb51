"""Run a server under load for a while, and fail where it breaks a promise: `python -m tests.benchmarks.serving`.

The server is `dsm-jax serve` in a process of its own, with the embedded models. Each part prints its figures as a line
of JSON; a figure beyond its bound is a fault, and so is one that is missing. Client and server share this machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from dsm_jax import audio
from dsm_jax.serving import client
from dsm_jax.serving.load import Load, run
from tests.benchmarks.mutations import attack

SLOTS = 8
MODELS = ("--stt", "digits", "--slots", str(SLOTS), "--tts", "digits-tts", "--tts-slots", str(SLOTS))
CLIP = Path(__file__).resolve().parents[2] / "examples/audio/digits_jackson.flac"
# By part, the most that each figure may be.
BOUNDS: Mapping[str, Mapping[str, float]] = {
    "latency": {"p95_ms": 80, "p99_ms": 200, "errors": 0, "dropped": 0},
    "fairness": {"upload_s": 15, "live_p95_ms": 120, "unfairness": 0.25, "errors": 0},
    "mutations": {"faults": 0, "unanswered": 0, "differ": 0, "used_slots": 0, "memory_mb": 150},
    "churn": {"differ": 0, "used_slots": 0, "failed": 0},
    "soak": {"memory_growth": 0.05, "compilations": 0, "differ": 0, "slowdown": 1.5},
    "speech": {"first_alone_ms": 300, "first_of_eight_ms": 600, "errors": 0},
}


def faults(part: str, figures: Mapping[str, float | None]) -> list[str]:
    """Return the bounds that figures break; a figure that is missing breaks its own."""
    found = []
    for name, most in BOUNDS[part].items():
        value = figures.get(name)
        if value is None or not value <= most:
            found.append(f"{part}: {name} is {value}; expected at most {most}")
    return found


@contextlib.contextmanager
def serving(models: Sequence[str] = MODELS, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """Run a server while the block runs; yield its address and the number of its process."""
    command = [sys.executable, "-m", "dsm_jax", "serve", "--port", "0", "--no-page", "--log-format", "json", *models]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"at (http://\S+)", line):
                    break
            else:
                raise RuntimeError("the server has not started")
            # Its log would fill the pipe.
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
            yield found[1], process.pid
        finally:
            process.terminate()
            process.wait(60)
        drain.wait(10)


def metric(url: str, name: str) -> float:
    """Return the sum of a metric's samples."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def resident_mb(pid: int) -> float:
    """Return the memory that a process holds, in 10^6 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def latency(url: str, seconds: float) -> dict[str, float | None]:
    """Measure live streams in all slots."""
    report = await run(Load(url=url, streams=SLOTS, seconds=seconds, recording=str(CLIP)))
    tail = report.latency
    return {"p95_ms": tail.p95, "p99_ms": tail.p99, "errors": sum(report.errors.values()), "dropped": report.dropped}


async def _upload(url: str, minutes: int = 1) -> float:
    """Upload a recording as fast as it is taken; return the seconds that it took."""
    pcm_T = _samples(minutes)
    start = time.perf_counter()
    await client.transcribe_async(url, pcm_T)
    return time.perf_counter() - start


def _samples(minutes: int) -> np.ndarray:
    """Return the clip again and again, for some minutes: samples [T]."""
    clip_T = audio.read(CLIP)
    return np.tile(clip_T, -(-minutes * 60 * 24_000 // clip_T.size))[: minutes * 60 * 24_000]


async def fairness(url: str, seconds: float) -> dict[str, float | None]:
    """Measure live streams beside an upload, and two uploads beside each other."""
    live = asyncio.create_task(run(Load(url=url, streams=SLOTS - 1, seconds=seconds, recording=str(CLIP))))
    await asyncio.sleep(1.0)
    upload = await _upload(url)
    report = await live
    one, two = await asyncio.gather(_upload(url), _upload(url))
    unfairness = abs(one - two) / max(one, two)
    errors = sum(report.errors.values())
    return {"upload_s": upload, "live_p95_ms": report.latency.p95, "unfairness": unfairness, "errors": errors}


async def _bad(url: str, chance: random.Random) -> None:
    """Connect, send some noise, and leave at some moment without a word."""
    socket_url = url.replace("http", "ws", 1) + "/api/asr-streaming"
    with contextlib.suppress(WebSocketException, OSError, TimeoutError):
        async with connect(socket_url, open_timeout=10) as socket:
            for _ in range(chance.randrange(6)):
                await socket.send(chance.randbytes(chance.randrange(1, 4000)))
            await asyncio.sleep(chance.random() * 0.2)
            if chance.random() < 0.5:
                socket.transport.abort()


async def _good(url: str) -> str:
    return (await client.transcribe_async(url, str(CLIP))).text


async def churn(url: str, seconds: float) -> dict[str, float | None]:
    """Mix good clients with such as abort or send noise, and compare the good ones' texts."""
    wanted, chance, end = await _good(url), random.Random(0), time.monotonic() + seconds
    good = differ = failed = 0
    while time.monotonic() < end:
        results = await asyncio.gather(
            _good(url), _good(url), *(_bad(url, chance) for _ in range(4)), return_exceptions=True
        )
        for result in results[:2]:
            good += 1
            failed += isinstance(result, BaseException)
            differ += isinstance(result, str) and result != wanted
    await asyncio.sleep(1.0)
    used = metric(url, "dsm_slots_used")
    return {"good": good, "differ": differ, "failed": failed, "used_slots": used}


async def mutations(url: str, pid: int, messages: int) -> dict[str, float | None]:
    """Send mutated messages in every dialect beside a good client; measure the memory that stays."""
    before = resident_mb(pid)
    figures = await attack(url, messages, lambda: _good(url))
    await asyncio.sleep(1.0)
    figures["used_slots"] = metric(url, "dsm_slots_used")
    return figures | {"memory_mb": resident_mb(pid) - before}


async def soak(url: str, pid: int, seconds: float) -> dict[str, float | None]:
    """Keep all slots busy with uploads; compare memory and speed of the first fifth and of the end."""
    wanted, start, rounds = await _good(url), time.monotonic(), []
    compiled, first_mb, differ, heard = (
        metric(url, "dsm_compiles_total"),
        None,
        0,
        metric(url, "dsm_audio_seconds_total"),
    )
    while time.monotonic() < start + seconds:
        began = time.perf_counter()
        texts = await asyncio.gather(*(_good(url) for _ in range(SLOTS)))
        rounds.append(time.perf_counter() - began)
        differ += sum(text != wanted for text in texts)
        if first_mb is None and time.monotonic() > start + seconds / 5:
            first_mb = resident_mb(pid)
    fifth = max(1, len(rounds) // 5)
    last_mb = resident_mb(pid)
    return {
        "hours_of_audio": (metric(url, "dsm_audio_seconds_total") - heard) / 3600,
        "memory_mb": last_mb,
        "memory_growth": None if first_mb is None else last_mb / first_mb - 1,
        "compilations": metric(url, "dsm_compiles_total") - compiled,
        "differ": differ,
        "slowdown": sum(rounds[-fifth:]) / sum(rounds[:fifth]),
    }


async def speech(url: str) -> dict[str, float | None]:
    """Measure the first sound of one text alone, and of texts in all slots."""
    alone = [await run(Load(url=url, streams=1, seconds=4, tts=True)) for _ in range(3)]
    all_slots = await run(Load(url=url, streams=SLOTS, seconds=4, tts=True))
    firsts = [report.first.max for report in alone if report.first.max is not None]
    errors = sum(sum(report.errors.values()) for report in (*alone, all_slots))
    factor = all_slots.real_time_factor.max
    return {
        "first_alone_ms": sorted(firsts)[1] if len(firsts) == len(alone) else None,
        "first_of_eight_ms": all_slots.first.max,
        "slowest_real_time_factor": factor,
        "errors": errors,
    }  # fmt: skip


async def measure(url: str, pid: int, seconds: float) -> list[str]:
    """Run all parts and print their figures; return the faults."""
    found: list[str] = []
    parts = {
        "speech": lambda: speech(url),
        "latency": lambda: latency(url, min(20.0, seconds)),
        "fairness": lambda: fairness(url, 20.0),
        "mutations": lambda: mutations(url, pid, 10_000 if seconds >= 60 else 500),
        "churn": lambda: churn(url, seconds),
        "soak": lambda: soak(url, pid, seconds),
    }
    for part, call in parts.items():
        figures = await call()
        print(json.dumps({"part": part, **figures}), flush=True)
        found += faults(part, figures)
    return found


def main() -> int:
    """Run the parts; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of churn, and of the soak (default: %(default)s)")
    args = parser.parse_args()
    with serving() as (url, pid):
        found = asyncio.run(measure(url, pid, args.seconds))
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
