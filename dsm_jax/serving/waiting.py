"""Wait for one thing, unless another comes first."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


async def unless(answer: Awaitable[T], end: Coroutine[Any, Any, NoReturn]) -> T:
    """Wait for an answer, and give it up if `end` comes first, which raises.

    Returns:
      The answer.

    Raises:
      What the answer raises, or `end`.
    """
    tasks = answering, ending = asyncio.ensure_future(answer), asyncio.ensure_future(end)
    try:
        await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        return await (answering if answering.done() else ending)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def client_leaves(request: Request) -> NoReturn:
    """Wait until the client of a request has left; the request's body has been read.

    Raises:
      ClientDisconnect: the client has left.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect
