"""Load a server with live streams and measure how late each frame is answered, and what fails.

Frames are packed before the measurement and answers are told apart by their first bytes, so that the generator costs
little; its own lag is reported, as a busy generator must not be taken for a slow server.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from dsm_jax import audio
from dsm_jax.errors import ConfigError, ServerError, ServerFullError
from dsm_jax.serving.client import links
from dsm_jax.serving.client import wire as wire_client
from dsm_jax.serving.client.moshi_sessions import FRAME
from dsm_jax.serving.client.sound import SAMPLE_RATE
from dsm_jax.serving.moshi import wire

FRAME_S = FRAME / SAMPLE_RATE
BUSY_MS = 10.0  # of the generator's lag, beyond which its figures say little of the server
_PATIENCE_S = 30.0  # for answers after the last frame
_READY_S = 60.0
_FREE_S = 5.0  # in which the slot of a stream's last text is free for its next one
_TEXT = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_STEP, _WORD, _MARKER, _ERROR, _READY, _AUDIO = (
    b"\xa4type" + bytes([0xA0 | len(name)]) + name.encode()
    for name in ("Step", "Word", "Marker", "Error", "Ready", "Audio")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Streams to run at once, in real time.

    Attributes:
      url: address of the server.
      streams: how many.
      seconds: of audio in each stream; for speech, after which no further text begins: texts follow each other.
      recording: what is sent, again and again; None for quiet noise.
      tts: let the server speak, in place of transcribing.
      model: name of the model; None for the server's first.
      api_key: key of the client; None for none.

    Raises:
      ConfigError: a number that is not above 0.
    """

    url: str
    streams: int = 8
    seconds: float = 20.0
    recording: str | None = None
    tts: bool = False
    model: str | None = None
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.streams < 1 or not self.seconds > 0:
            raise ConfigError(f"{self.streams} streams of {self.seconds} s were asked for; expected numbers above 0")


@dataclasses.dataclass(frozen=True)
class Tail:
    """Percentiles of durations, in milliseconds, or of ratios; None of nothing."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Sequence[float], *, scale: float = 1e3, digits: int = 2) -> "Tail":
        """Return the percentiles of durations in seconds, or with a scale of 1, of ratios.

        Args:
          values: the durations or ratios.
          scale: factor of the percentiles.
          digits: digits after the point that are kept.
        """
        if not values:
            return cls(None, None, None, None)
        return cls(*(round(scale * float(np.quantile(values, at)), digits) for at in (0.5, 0.95, 0.99, 1.0)))


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of a load.

    Attributes:
      streams: how many were run at once.
      seconds: the measurement took.
      frames: frames sent, or of sound received.
      dropped: frames that were not answered.
      errors: number of streams that failed, by reason.
      latency: from the send of a frame to its step; of speech, from one frame of sound to the next.
      first: from the first frame to the first word; of speech, from each text to its first sound.
      marker: from the last marker to its answer.
      real_time_factor: of speech, seconds of computation over seconds of sound, by stream.
      lag: of the generator itself, behind its schedule.
      tts: whether the server spoke.
    """

    streams: int
    seconds: float
    frames: int
    dropped: int
    errors: dict[str, int]
    latency: Tail
    first: Tail
    marker: Tail
    real_time_factor: Tail
    lag: Tail
    tts: bool = False

    @property
    def busy(self) -> bool:
        """Tell whether the generator itself was too late for its figures to be the server's."""
        return self.lag.p95 is not None and self.lag.p95 > BUSY_MS

    def holds(self, target_ms: float, percentile: str = "p95") -> bool:
        """Tell whether nothing failed and a percentile of the latency is within a target."""
        value = getattr(self.latency, percentile)
        return not self.errors and not self.dropped and value is not None and value <= target_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values that `json` can write."""
        return dataclasses.asdict(self) | {"busy": self.busy}

    def text(self) -> str:
        """Return the figures as a table."""
        names = ("frame to frame", "text to first sound") if self.tts else ("frame to step", "first word")
        rows = [*zip(names, (self.latency, self.first), strict=True), ("marker", self.marker)]
        rows.append(("generator's own lag", self.lag))
        lines = [f"{self.streams} streams, {self.seconds:.1f} s, {self.frames} frames, {self.dropped} dropped"]
        lines.append(f"{'milliseconds':<22}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}")
        for name, tail in rows:
            if tail.p50 is not None:
                figures = dataclasses.astuple(tail)
                lines.append(f"{name:<22}" + "".join(f"{figure:>9.1f}" for figure in figures))
        factor = self.real_time_factor
        if factor.p50 is not None and factor.max is not None:
            lines.append(f"real-time factor of a stream: {factor.p50:.3f}, of the slowest {factor.max:.3f}")
        lines += [f"{count} streams failed: {reason}" for reason, count in self.errors.items()]
        if self.busy:
            lines.append(f"the generator itself was late (over {BUSY_MS:.0f} ms): these figures are not the server's")
        return "\n".join(lines) + "\n"


@dataclasses.dataclass
class _Found:
    """Collect what the streams have measured, in seconds."""

    frames: int = 0
    answered: int = 0
    latency: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    marker: list[float] = dataclasses.field(default_factory=list)
    factors: list[float] = dataclasses.field(default_factory=list)
    lag: list[float] = dataclasses.field(default_factory=list)
    errors: Counter[str] = dataclasses.field(default_factory=Counter)


def packed_frames(recording: str | None) -> list[bytes]:
    """Return the messages of a recording's frames, or of a second of quiet noise."""
    if recording is None:
        pcm_T = 1e-3 * np.random.default_rng(0).standard_normal(13 * FRAME).astype(np.float32)
    else:
        pcm_T = audio.read(recording, SAMPLE_RATE)
    pcm_T = np.pad(pcm_T, (0, -pcm_T.size % FRAME))
    return [wire_client.encode(wire.Audio(frame_T)) for frame_T in pcm_T.reshape(-1, FRAME)]


async def run(load: Load) -> Report:
    """Run a load and return its figures; streams that fail are counted.

    Raises:
      AudioError: the recording cannot be read.
      ServerError: the server cannot be reached, or has no such model.
    """
    server, found = links.address(load.url), _Found()
    kind = "tts" if load.tts else "stt"
    path, _ = await links.find_path(server, kind, load.model, api_key=load.api_key)
    frames = [] if load.tts else await asyncio.to_thread(packed_frames, load.recording)
    ready = [asyncio.Event() for _ in range(load.streams)]
    begin: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[links.ClientConnection]:
        query = {"format": "PcmMessagePack"} if load.tts else {}
        async with links.socket(server, path, query=query, api_key=load.api_key) as socket:
            _check(await asyncio.wait_for(socket.recv(), _READY_S), _READY)
            yield socket

    async def speak_again() -> tuple[float, int]:
        ends = time.perf_counter() + _FREE_S
        while True:
            try:
                async with opened() as socket:
                    return await _speak(socket, load.seconds, found)
            except ServerFullError:  # the slot of the last text is free some milliseconds after its end
                if time.perf_counter() > ends:
                    raise
                await asyncio.sleep(0.02)

    async def stream(number: int) -> None:
        try:
            async with opened() as socket:
                ready[number].set()
                start = await begin + number * FRAME_S / load.streams
                if not load.tts:
                    return await _listen(socket, start, round(load.seconds / FRAME_S), frames, found)
                await asyncio.sleep(max(0.0, start - time.perf_counter()))
                found.lag.append(time.perf_counter() - start)
                spoken = [await _speak(socket, load.seconds, found)]
            while time.perf_counter() < start + load.seconds:
                spoken.append(await speak_again())
            if count := sum(frames for _, frames in spoken):
                found.factors.append(sum(seconds for seconds, _ in spoken) / (count * FRAME_S))
        except (ServerError, TimeoutError) as error:
            found.errors[str(error) or "no answer came in time"] += 1
        finally:
            ready[number].set()

    running = [asyncio.create_task(stream(number)) for number in range(load.streams)]
    try:
        await asyncio.gather(*(event.wait() for event in ready))
        started = time.perf_counter()
        begin.set_result(started + 0.1)
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return Report(
        load.streams,
        round(time.perf_counter() - started, 2),
        found.frames,
        found.frames - found.answered,
        dict(found.errors),
        Tail.of(found.latency),
        Tail.of(found.first),
        Tail.of(found.marker),
        Tail.of(found.factors, scale=1.0, digits=5),
        Tail.of(found.lag),
        load.tts,
    )


def _check(data: str | bytes, expected: bytes) -> None:
    """Refuse a first message that is another one, an error above all."""
    if isinstance(data, str) or not data.startswith(expected, 1):
        reason = _reason(data)
        raise (ServerFullError if reason.startswith("no free channels") else ServerError)(reason)


def _reason(data: str | bytes) -> str:
    message = wire_client.decode(data.encode() if isinstance(data, str) else data)
    return message.message if isinstance(message, wire.Error) else f"{type(message).__name__} was not expected"


async def _listen(socket: links.ClientConnection, start: float, count: int, frames: list[bytes], found: _Found) -> None:
    """Send frames in real time and measure their steps."""
    sent: list[float] = []
    marked = 0.0

    async def receive() -> None:
        step = 0
        has_word = False
        async for data in socket:
            now = time.perf_counter()
            assert isinstance(data, bytes)
            if data.startswith(_STEP, 1):
                if step < len(sent):
                    found.latency.append(now - sent[step])
                    found.answered += 1
                step += 1
            elif data.startswith(_WORD, 1):
                if not has_word:
                    found.first.append(now - sent[0])
                has_word = True
            elif data.startswith(_MARKER, 1):
                found.marker.append(now - marked)
                return
            elif data.startswith(_ERROR, 1):
                raise ServerError(_reason(data))
        raise ServerError("the server closed the connection midway")

    receiving = asyncio.create_task(receive())
    try:
        for number in range(count):
            due = start + number * FRAME_S
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if receiving.done():
                break
            now = time.perf_counter()
            found.lag.append(now - due)
            sent.append(now)
            found.frames += 1
            await socket.send(frames[number % len(frames)])
        else:
            marked = time.perf_counter()
            await socket.send(wire_client.encode(wire.Marker(0, flush=True)))
        await asyncio.wait_for(receiving, _PATIENCE_S)
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


async def _speak(socket: links.ClientConnection, seconds: float, found: _Found) -> tuple[float, int]:
    """Send a text, and measure its sound; return the seconds up to its last frame, and the number of frames."""
    began = last = time.perf_counter()
    text = " ".join(_TEXT[: max(1, round(seconds))])
    await socket.send(wire_client.encode(wire.Text(text)))
    await socket.send(wire_client.encode(wire.Eos()))
    count = 0
    async for data in socket:
        assert isinstance(data, bytes)
        if data.startswith(_ERROR, 1):
            raise ServerError(_reason(data))
        if data.startswith(_AUDIO, 1):
            now = time.perf_counter()
            (found.latency if count else found.first).append(now - (last if count else began))
            last, count = now, count + 1
    found.frames += count
    found.answered += count
    return last - began, count


async def find_highest(load: Load, target_ms: float, percentile: str = "p95") -> tuple[int, list[Report]]:
    """Bisect for the most streams, up to those of a load, that hold a target; return them and all reports."""
    holds, fails, reports = 0, load.streams + 1, []
    streams = load.streams
    while fails - holds > 1:
        reports.append(await run(dataclasses.replace(load, streams=streams)))
        if reports[-1].holds(target_ms, percentile):
            holds = streams
        else:
            fails = streams
        streams = (holds + fails) // 2
    return holds, reports
