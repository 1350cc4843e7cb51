"""Hand messages over from an engine's thread to the event loop.

The engine posts the messages of all sessions of one step at once, so that a step wakes the loop once.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Started:
    """The session has a slot."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The session's last message.

    Attributes:
      code: close code of a websocket.
      reason: sentence for the client; None where the session ended as its client asked.
    """

    code: int = 1000
    reason: str | None = None


class Outbox:
    """Messages that wait for their client, in order; the event loop's own.

    Args:
      limit: messages that may wait; None for any number. With more, `overflowed` is set and later ones are dropped.
    """

    def __init__(self, limit: int | None = None):
        self.overflowed = False
        self._limit, self._closed = limit, False
        self._waiting: deque[Any] = deque()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, messages: Iterable[Any]) -> None:
        """Add messages; nothing is added after `Ended`."""
        for message in messages:
            if self._closed:
                break
            self._closed = isinstance(message, Ended)
            if self._limit is not None and len(self._waiting) >= self._limit and not self._closed:
                self.overflowed = True
                continue
            self._waiting.append(message)
        self._filled.set()

    async def take(self) -> list[Any]:
        """Return all messages that wait; wait for one if there is none. `Ended` is the last message ever."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        taken = list(self._waiting)
        self._waiting.clear()
        return taken


Posted = list[tuple[Outbox, list[Any]]]


def put_all(posted: Posted) -> None:
    """Put messages into their outboxes."""
    for outbox, messages in posted:
        outbox.put(messages)
