"""The state of a server: its models with their engines, who is connected, and whether it takes more."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.requests import HTTPConnection

from dsm_jax.checkpoints import Model
from dsm_jax.errors import FullError
from dsm_jax.serving.access import Keys, Refusal, allowed_host, allowed_origin
from dsm_jax.serving.config import ServedModel, ServerConfig
from dsm_jax.serving.engine import Device, Engine
from dsm_jax.serving.hearing import Heard, HearingService
from dsm_jax.serving.metrics import Metrics
from dsm_jax.serving.outbox import Ended, Outbox, Posted, Started, put_all
from dsm_jax.serving.services import load_settings, service_of
from dsm_jax.serving.speaking import Said, Sound
from dsm_jax.stt.events import WordEnded

OUTBOX = 1_000  # messages to a listener, about 80 s of frames, after which a client reads too slowly
QUEUED_S = 180.0  # of audio that may wait with a session that waits for a slot
INBOX_S = 60.0  # of audio that may wait, after which a client is not read: Kyutai's scripts end with 40 s of silence
QUEUE_S = 30.0  # that a recording waits for a slot
_WATCH_S = 1.0  # between two looks at the engines
FRAME_S = 0.080  # between live frames, within which a step must be over
# The most of a frame's time that a step may take: with 71 of 80 ms, stt-1b in one slot lags behind one stream.
_STEPS_SHARE = 0.8

_log = logging.getLogger("dsm_jax.serving")


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A model that is served: its name, its service and its engine."""

    settings: ServedModel
    name: str
    kind: str
    service: Any
    engine: Engine

    @property
    def model(self) -> Model:
        """The model."""
        return self.service.model

    @property
    def keeps_up(self) -> bool:
        """Tell whether all slots together are served in real time, with time left for the connections."""
        frames, seconds = min(self.service.step_seconds.items())
        return seconds < _STEPS_SHARE * frames * FRAME_S

    def capacity(self) -> str:
        """Return a sentence on the slots and the time of a step."""
        frames, seconds = min(self.service.step_seconds.items())
        verdict = "keeps up"
        if not self.keeps_up:
            remedy = "use fewer" if self.engine.total > 1 else "use a smaller model or a faster device"
            if self.model.quantize is None and self.model.devices[0].platform == "cpu":
                remedy += ", or int8 weights (--quantize int8)"
            verdict = f"does not keep up with {FRAME_S * 1000:.0f} ms a frame: {remedy}"
        if self.kind == "tts":
            verdict += f", {self.engine.total * frames * FRAME_S / seconds:.1f} times real time in all"
        steps = "a step" if frames == 1 else f"for {frames} steps"
        slots = f"{self.engine.total} slot" + "s" * (self.engine.total != 1)
        return f"{self.name}: {slots} at {seconds * 1000:.0f} ms {steps}; {verdict}"


class Server:
    """All that handlers share.

    Args:
      config: settings.
      version: of the library.

    Attributes:
      loop: the event loop, once it runs.
      end: ends the web server at once; set by whoever runs it, and called on the event loop.
    """

    def __init__(self, config: ServerConfig, version: str):
        config.check_access()
        self.config, self.version, self.keys = config, version, Keys(config.keys)
        self.metrics = Metrics(version)
        self.models: list[Served] = []
        self.ready = self.faulty = False
        self._draining, self._guests, self._deadline = asyncio.Event(), 0, math.inf
        self.loop: asyncio.AbstractEventLoop | None = None
        self._device, self._tickets = Device(), set[Ticket]()
        self.end: Callable[[], None] = lambda: None
        self._watching: asyncio.Future[None] | None = None

    # Start and end.

    def load(self, load_model: Callable[[ServedModel], Model] | None = None) -> None:
        """Load and warm up all models; before the event loop runs, or on another thread.

        Raises:
          DsmError: a model cannot be loaded or served as its settings say.
        """
        # All of them first: one that cannot be served is told of before any is warmed up.
        loaded = [(settings, (load_model or load_settings)(settings)) for settings in self.config.models]
        for settings, model in loaded:
            start = time.perf_counter()
            service = service_of(settings, model)
            hearing = settings.kind == "stt"
            name = self._free_name(model.name)
            engine = Engine(
                name,
                service.slots,
                post=self._post,
                plan=service.plan if isinstance(service, HearingService) else lambda sessions: None,
                device=self._device,
                urgent=hearing,
                min_step=self.config.min_step_ms / 1000 if hearing else 0.0,
                hurry=(lambda session: session.behind) if hearing else (lambda session: False),
                reserve=min(self.config.reserve_live, service.slots.program.slots - 1),
                on_step=lambda seconds, rows, name=name: self._count_step(name, seconds, rows),
                on_fault=self._fault,
            )
            served = Served(settings, name, settings.kind, service, engine)
            self.models.append(served)
            self.metrics.models.append(served)
            _log.info("%s (warm after %.1f s)", served.capacity(), time.perf_counter() - start)

    def _free_name(self, name: str) -> str:
        """Return a model's name, with a number if another model has the name."""
        taken, number = {served.name for served in self.models}, 2
        free = name
        while free in taken:
            free, number = f"{name}-{number}", number + 1
        return free

    def start(self) -> None:
        """Start the engines; on the event loop."""
        self.loop = asyncio.get_running_loop()
        for served in self.models:
            served.engine.run()
        self._watching = asyncio.ensure_future(self._watch())
        self.ready = True

    def stop(self) -> None:
        """End the engines."""
        self.ready = False
        if self._watching is not None:
            self._watching.cancel()
        for served in self.models:
            served.engine.close()

    async def _watch(self) -> None:
        """End the sessions of an engine that is stuck, and the server with them."""
        while True:
            await asyncio.sleep(_WATCH_S)
            for served in self.models:
                served.engine.give_up_if_stuck()

    @property
    def stuck(self) -> bool:
        """Tell whether an engine's thread is in a step that has not ended, so that the process would wait for it."""
        return any(served.engine.stuck for served in self.models)

    async def drain(self, seconds: float) -> None:
        """Take no more sessions, let those that run end for some seconds, then end them with their last words."""
        self._draining.set()
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        await self._until_empty()
        for ticket in list(self._tickets):
            ticket.hurry()
        self._deadline = time.monotonic() + 5.0
        await self._until_empty()

    def hurry(self) -> None:
        """Let sessions end no longer by themselves: a drain goes on to their last words."""
        self._deadline = time.monotonic()

    async def _until_empty(self) -> None:
        while (self._tickets or self._guests) and time.monotonic() < self._deadline:
            await asyncio.sleep(0.02)

    @property
    def draining(self) -> bool:
        """Tell whether the server is ending, and takes no more sessions."""
        return self._draining.is_set()

    async def until_draining(self) -> None:
        """Wait until the server takes no more sessions, because it is ending."""
        await self._draining.wait()

    @contextlib.contextmanager
    def guest(self) -> Iterator[None]:
        """Count a client that has connected and has no session yet, so that the server ends after it."""
        self._guests += 1
        try:
            yield
        finally:
            self._guests -= 1

    def _post(self, posted: Posted) -> None:
        loop = self.loop
        if loop is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop has closed in this moment
                loop.call_soon_threadsafe(put_all, posted)

    def _fault(self, error: BaseException) -> None:
        self.faulty = True
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.end)

    def _count_step(self, name: str, seconds: float, rows: int) -> None:
        self.metrics.step.labels(name).observe(seconds)
        self.metrics.rows.labels(name).observe(rows)

    def alive(self) -> bool:
        """Tell whether all engines run."""
        return all(served.engine.alive() for served in self.models)

    @property
    def accepting(self) -> bool:
        """Tell whether sessions can begin."""
        return self.ready and not self.draining and self.alive()

    # Requests.

    def refusal(self, connection: HTTPConnection, *, begins: bool = False) -> Refusal | None:
        """Return why a client is not let in, and count it; None for one that is.

        Args:
          connection: of the client.
          begins: whether a session begins with the connection, as with a websocket.
        """
        if (refused := self.refusal_of_host(connection)) is not None:
            return refused
        if not allowed_origin(connection, self.config.origins):
            return self._refused(403, "origin", "pages of this origin may not connect")
        if not self.keys.allow(connection):
            return self._refused(401, "key", "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        return self._not_accepting() if begins else None

    def refusal_of_host(self, connection: HTTPConnection) -> Refusal | None:
        """Return why a client is not answered that means another host, and count it; None for one that is."""
        if allowed_host(connection, self.config):
            return None
        return self._refused(
            403,
            "host",
            "the Host header names another host than this machine, for which alone the server listens without "
            "keys; behind a proxy, start it with --origin and the address that the proxy's clients use, or with "
            "keys",
        )

    def _not_accepting(self) -> Refusal | None:
        if self.accepting:
            return None
        reason = "draining" if self.draining else "not ready"
        return self._refused(503, reason, "the server takes no more sessions; try another one, or later")

    def _refused(self, status: int, reason: str, sentence: str) -> Refusal:
        self.metrics.refused.labels(reason).inc()
        return Refusal(status, reason, sentence)

    def find(self, kind: str, name: str | None = None) -> Served | None:
        """Return the model of a kind that a client names, by its name or an alias; None takes the first."""
        of_kind = [served for served in self.models if served.kind == kind]
        if name is None:
            return of_kind[0] if of_kind else None
        name = self.own_name(name)
        return next((served for served in of_kind if name in (served.name, served.settings.model)), None)

    def own_name(self, name: str) -> str:
        """Return the name here of a model or voice, of which a client may have named an alias."""
        return self.config.aliases.get(name, name)

    @contextlib.asynccontextmanager
    async def session(self, served: Served, session: Any, dialect: str) -> AsyncIterator["Ticket"]:
        """Hold a slot, or a place in the queue, for a session of a client; give it back in the end.

        Raises:
          FullError: there is none.
        """
        if (refused := self._not_accepting()) is not None:
            raise FullError(refused.sentence)
        try:
            holds = served.engine.hold(session)
        except FullError:
            self.metrics.refused.labels("full").inc()
            raise
        ticket = Ticket(self, served, session, dialect, queued=not holds)
        self._tickets.add(ticket)
        self.metrics.started.labels(served.name, dialect).inc()
        self.metrics.sessions.labels(served.name, dialect).inc()
        _line("session", ticket, event="start")
        try:
            yield ticket
        finally:
            served.engine.leave(session)
            self._tickets.discard(ticket)
            self.metrics.sessions.labels(served.name, dialect).dec()
            self.metrics.ended.labels(served.name, ticket.reason).inc()
            self.metrics.frames.labels(served.name).observe(ticket.frames)
            _line("session", ticket, event="end")


class Ticket:
    """One client's session in the server's books.

    Attributes:
      id: for the log.
      code: close code that the session ended with; None while it runs.
      reason: word for the reason of the end, for logs and metrics, such as "client", "finished", "idle" or "drain".
      is_whole: whether the client waits for all of a recording or text, of which a part would be a wrong answer.
      told_at: time of the session's last message to the client, or of its start.
    """

    def __init__(self, server: Server, served: Served, session: Any, dialect: str, *, queued: bool):
        self.server, self.served, self.session, self.dialect = server, served, session, dialect
        self.id, self.began, self.queued = os.urandom(6).hex(), time.monotonic(), queued
        self.told_at = self.began
        self.code: int | None = None
        self.reason = "client"
        self.frames = self.words = 0
        self.hurried = self.is_whole = False
        self._begun = queued  # a session from the queue begins by itself
        self.reading: asyncio.Timeout | None = None  # of the wait for the client's next message
        metrics = server.metrics
        # Looked up once: a label is searched for under a lock.
        self._audio, self._words = metrics.audio.labels(served.name), metrics.words.labels(served.name)
        self._latency = metrics.latency.labels(served.name)

    def start(self) -> None:
        """Put the session into its slot, unless it has begun."""
        if not self._begun:
            self._begun = True
            self.served.engine.start(self.session)

    def hurry(self) -> None:
        """Ask the session to end: what was heard is transcribed, and no more is taken.

        Whole recordings and texts are given up.
        """
        self.reason, self.hurried = "drain", True
        if self.is_whole:
            self.session.outbox.put([Ended(1013, "the server is shutting down; send the request again, or to another")])
        if self.reading is not None:
            self.reading.reschedule(asyncio.get_running_loop().time())

    async def messages(self) -> AsyncIterator[Any]:
        """Yield the session's messages up to `Ended`, which is the last; count them on the way.

        The messages of a client that does not read them are limited: `Ended` with 1008 comes early then.
        """
        outbox: Outbox = self.session.outbox
        while True:
            for message in await outbox.take():
                self.told_at = time.monotonic()
                self._count(message)
                yield message
                if isinstance(message, Ended):
                    return
            if outbox.overflowed:
                self.end(1008, "slow")
                yield Ended(1008, "the client reads too slowly")
                return
            self.served.engine.wake()  # a listener that lagged may have caught up

    def end(self, code: int, reason: str) -> None:
        """Note how the session ends; a drain counts as the reason though the session's own end comes before."""
        if self.code is None or reason == "drain":
            self.code = code
            self.reason = self.reason if self.reason == "drain" else reason

    def _count(self, message: Any) -> None:
        metrics, name = self.server.metrics, self.served.name
        match message:
            case Started():
                if self.queued:
                    metrics.queue.labels(name).observe(time.monotonic() - self.began)
                    self.queued = False
            case Heard():
                self.frames += 1
                self._audio.inc(FRAME_S)
                latencies, self.session.latencies = self.session.latencies, []
                for seconds in latencies:
                    self._latency.observe(seconds)
            case Sound():
                if self.frames == 0 and self.session.first_sound is not None:
                    metrics.first_sound.labels(name).observe(self.session.first_sound)
                self.frames += 1
                self._audio.inc(FRAME_S)
            case WordEnded() | Said():
                self.words += 1
                self._words.inc()
            case Ended():
                self.end(message.code, "finished" if message.reason is None else "error")


def _line(kind: str, ticket: Ticket, *, event: str) -> None:
    """Log the start or the end of a session: numbers alone, never what was said, nor a key."""
    facts: dict[str, Any] = {
        "kind": kind,
        "event": event,
        "id": ticket.id,
        "model": ticket.served.name,
        "dialect": ticket.dialect,
    }
    if event == "end":
        facts |= {
            "seconds": round(time.monotonic() - ticket.began, 3),
            "frames": ticket.frames,
            "words": ticket.words,
            "code": ticket.code,
            "reason": ticket.reason,
        }
    _log.info(json.dumps(facts))
