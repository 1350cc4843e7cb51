"""Answers over HTTP that are sent as they are made."""

import logging
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dsm_jax.errors import DsmError
from dsm_jax.serving.waiting import client_leaves, unless

_log = logging.getLogger("dsm_jax.serving")


async def begun(request: Request, content: AsyncGenerator[bytes, None], media_type: str) -> Response:
    """Return an answer whose first piece, which may be empty, is made: an error before it still has a status.

    Args:
      request: request; its body has been read.
      content: makes the pieces; it is closed in the end, whoever ended the answer.
      media_type: of the answer.

    Raises:
      ClientDisconnect: the client has left.
      What the content raises.
    """
    try:
        return _Stream(await unless(anext(content), client_leaves(request)), content, media_type)
    except BaseException:
        await content.aclose()
        raise


class _Stream(StreamingResponse):
    """An answer that is sent as it is made.

    Args:
      first: first piece.
      content: makes the others; it is closed in the end, whoever ended the answer.
      media_type: of the answer.
    """

    def __init__(self, first: bytes, content: AsyncGenerator[bytes, None], media_type: str):
        # A proxy that gathered the pieces would hold up the first sound.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_joined(first, content), headers=headers, media_type=media_type)
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all pieces; an answer that cannot be finished is cut off, which its client can tell from an end."""
        try:
            await super().__call__(scope, receive, send)
        except DsmError as error:
            _log.warning("an answer was cut off: %s", type(error).__name__)
        finally:
            await self._content.aclose()


async def _joined(first: bytes, content: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    if first:
        yield first
    async for piece in content:
        yield piece
