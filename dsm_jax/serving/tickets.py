"""Keep the books of one client's session: its times, counts and end, for the log, the metrics and the drain."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from dsm_jax.serving.hearing import Heard
from dsm_jax.serving.metrics import Metrics
from dsm_jax.serving.outbox import Ended, Outbox, Started
from dsm_jax.serving.services import FRAME_S, Served
from dsm_jax.serving.speaking import Said, Sound
from dsm_jax.stt.events import WordEnded

_log = logging.getLogger("dsm_jax.serving")


class Ticket:
    """One client's session in the server's books.

    Attributes:
      id: for the log.
      code: close code that the session ended with; None while it runs.
      reason: word for the reason of the end, for logs and metrics, such as "client", "finished", "idle" or "drain".
      is_whole: whether the client waits for all of a recording or text, of which a part would be a wrong answer.
      told_at: time of the session's last message to the client, or of its start.
    """

    def __init__(self, metrics: Metrics, served: Served, session: Any, dialect: str, *, queued: bool):
        self.metrics, self.served, self.session, self.dialect = metrics, served, session, dialect
        self.id, self.began, self.queued = os.urandom(6).hex(), time.monotonic(), queued
        self.told_at = self.began
        self.code: int | None = None
        self.reason = "client"
        self.frames = self.words = 0
        self.hurried = self.is_whole = False
        self._begun = queued  # a session from the queue begins by itself
        self.reading: asyncio.Timeout | None = None  # of the wait for the client's next message
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

    def log(self, event: str) -> None:
        """Log the start or the end of the session: numbers alone, never what was said, nor a key."""
        facts: dict[str, Any] = {
            "kind": "session",
            "event": event,
            "id": self.id,
            "model": self.served.name,
            "dialect": self.dialect,
        }
        if event == "end":
            facts |= {
                "seconds": round(time.monotonic() - self.began, 3),
                "frames": self.frames,
                "words": self.words,
                "code": self.code,
                "reason": self.reason,
            }
        _log.info(json.dumps(facts))

    def _count(self, message: Any) -> None:
        metrics, name = self.metrics, self.served.name
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
