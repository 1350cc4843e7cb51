"""The state of a server: its models with their engines, who is connected, and whether it takes more."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.requests import HTTPConnection

from dsm_jax.checkpoints import Model
from dsm_jax.errors import FullError
from dsm_jax.serving.access import Keys, Refusal, allowed_host, allowed_origin
from dsm_jax.serving.config import ServedModel, ServerConfig
from dsm_jax.serving.engine import Device, Engine
from dsm_jax.serving.hearing import HearingService
from dsm_jax.serving.metrics import Metrics
from dsm_jax.serving.outbox import Posted, put_all
from dsm_jax.serving.services import Served, load_settings, service_of
from dsm_jax.serving.tickets import Ticket

OUTBOX = 1_000  # messages to a listener, about 80 s of frames, after which a client reads too slowly
QUEUED_S = 180.0  # of audio that may wait with a session that waits for a slot
INBOX_S = 60.0  # of audio that may wait, after which a client is not read: Kyutai's scripts end with 40 s of silence
QUEUE_S = 30.0  # that a recording waits for a slot
_WATCH_S = 1.0  # between two looks at the engines

_log = logging.getLogger("dsm_jax.serving")


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
                service.groups,
                total=service.total,
                post=self._post,
                plan=service.plan if isinstance(service, HearingService) else lambda sessions: None,
                device=self._device,
                urgent=hearing,
                min_step=self.config.min_step_ms / 1000 if hearing else 0.0,
                hurry=(lambda session: session.behind) if hearing else (lambda session: False),
                reserve=min(self.config.reserve_live, service.total - 1),
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
        ticket = Ticket(self.metrics, served, session, dialect, queued=not holds)
        self._tickets.add(ticket)
        self.metrics.started.labels(served.name, dialect).inc()
        self.metrics.sessions.labels(served.name, dialect).inc()
        ticket.log("start")
        try:
            yield ticket
        finally:
            served.engine.leave(session)
            self._tickets.discard(ticket)
            self.metrics.sessions.labels(served.name, dialect).dec()
            self.metrics.ended.labels(served.name, ticket.reason).inc()
            self.metrics.frames.labels(served.name).observe(ticket.frames)
            ticket.log("end")
