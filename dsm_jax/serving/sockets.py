"""Websockets of every dialect: refusals before the handshake, reading with back-pressure, and one way to close.

A socket that the server ends gets a message of its dialect and a close code, never a dropped connection alone.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from dsm_jax.errors import DsmError
from dsm_jax.serving.access import Refusal
from dsm_jax.serving.server import INBOX_S, QUEUED_S, Server
from dsm_jax.serving.tickets import Ticket

LAST_WORDS_S = 4.0  # that a session has for its last words when the server drains
SEND_S = 60.0  # that a client may take to read a message
# Keys of messages between a handler and its connection: a close code, sentence and kind of a fault that the connection
# has found, and a message after which comes the close, which waits for no client that does not read.
FAULT, LAST = "dsm_jax.fault", "dsm_jax.last"
_log = logging.getLogger("dsm_jax.serving")


class ClosedError(Exception):
    """End a session with a close code and a sentence.

    Attributes:
      code: close code.
      reason: sentence for the client; None for none.
      kind: word for the reason, for logs and metrics.
    """

    def __init__(self, code: int, reason: str | None, kind: str):
        super().__init__(reason)
        self.code, self.reason, self.kind = code, reason, kind


async def admitted(server: Server, socket: WebSocket, answer: Callable[[Refusal], Response]) -> bool:
    """Check key, origin and readiness before the handshake; refuse the socket otherwise.

    Args:
      server: server.
      socket: not accepted.
      answer: makes the dialect's answer to a client that is not let in.
    """
    refused = server.refusal(socket, begins=True)
    if refused is not None:
        await socket.send_denial_response(answer(refused))
    return refused is None


async def received(socket: WebSocket, server: Server, ticket: Ticket) -> AsyncIterator[str | bytes]:
    """Yield a client's messages while it keeps up and is kept up with.

    A session is idle once it has neither received nor sent anything for a while: a client that has sent all of its text
    may listen to the speech for as long as that lasts, and one that waits for a slot may wait.

    Raises:
      ClosedError: the session was idle, or has lasted as long as any may, or the server drains.
    """
    config, session, loop = server.config, ticket.session, asyncio.get_running_loop()
    ends, heard_at = loop.time() + config.max_session_s, loop.time()
    while True:
        # A session in the queue is read further ahead, or its client's leaving would not be noticed.
        while (
            getattr(session, "waiting", 0.0) > (QUEUED_S if ticket.queued else INBOX_S)
            and not ticket.hurried
            and loop.time() < ends
        ):
            await asyncio.sleep(0.05)
            heard_at = loop.time()
        idle_at = (loop.time() if ticket.queued else max(heard_at, ticket.told_at)) + config.idle_s
        try:
            # No task for each message: with many streams that would be most of the event loop's work.
            async with asyncio.timeout_at(min(idle_at, ends)) as limit:
                ticket.reading = limit
                if ticket.hurried:
                    limit.reschedule(loop.time())
                message = await socket.receive()
        except TimeoutError:
            if ticket.hurried:
                raise ClosedError(1001, "the server is shutting down", "drain") from None
            if loop.time() >= ends:
                raise ClosedError(1000, f"a session lasts at most {config.max_session_s:.0f} s", "limit") from None
            if ticket.queued or ticket.told_at + config.idle_s > idle_at:
                continue
            raise ClosedError(1000, f"nothing was received for {config.idle_s:.0f} s", "idle") from None
        finally:
            ticket.reading = None
        heard_at = loop.time()
        if message["type"] == "websocket.disconnect":
            return
        yield data_of(message)


def data_of(message: Mapping[str, Any]) -> str | bytes:
    """Return the data of a received message.

    Raises:
      ClosedError: the connection has found a fault.
    """
    if (fault := message.get(FAULT)) is not None:
        raise ClosedError(*fault)
    data = message.get("bytes")
    return message["text"] if data is None else data


async def send(socket: WebSocket, data: str | bytes) -> None:
    """Send a message.

    Raises:
      ClosedError: the client does not read.
      WebSocketDisconnect: it has left.
    """
    sent = socket.send_text(data) if isinstance(data, str) else socket.send_bytes(data)
    try:
        async with asyncio.timeout(SEND_S):
            await sent
    except TimeoutError:
        raise ClosedError(1008, "the client reads too slowly", "slow") from None


async def close(socket: WebSocket, code: int, reason: str | None = None) -> None:
    """Close a socket that may have been closed already."""
    if WebSocketState.DISCONNECTED in (socket.client_state, socket.application_state):
        return
    with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError, TimeoutError):
        await asyncio.wait_for(socket.close(code, _short(reason)), 5.0)


def _short(reason: str | None) -> str:
    """Cut a reason to what a close frame holds: 123 bytes."""
    return (reason or "").encode()[:120].decode(errors="ignore")


async def converse(
    socket: WebSocket,
    ticket: Ticket,
    hear: Callable[[], Awaitable[None]],
    tell: Callable[[], Awaitable[tuple[int, str | None]]],
    error: Callable[[str], Any],
) -> None:
    """Run both directions of a socket until one ends, then close it.

    Args:
      socket: accepted.
      ticket: of its session.
      hear: reads the client to its end; raises `ClosedError` or a `DsmError` for a message that it refuses.
      tell: sends the session's messages to `Ended`; returns its code and reason.
      error: makes the dialect's message of an error; None for a dialect without.
    """
    hearing, telling = asyncio.ensure_future(hear()), asyncio.ensure_future(tell())
    code, reason = 1000, None
    try:
        await asyncio.wait({hearing, telling}, return_when="FIRST_COMPLETED")
        if hearing.done() and not telling.done():
            fault = hearing.exception()
            if isinstance(fault, ClosedError) and fault.kind == "drain":
                # What was received is still transcribed or spoken; a session without any text just ends.
                with contextlib.suppress(DsmError):
                    ticket.session.finish()
                    ticket.start()  # a turn of a conversation begins once its text is whole
                    ticket.served.engine.wake()
                    await asyncio.wait({telling}, timeout=LAST_WORDS_S)
                raise fault
            if fault is not None:
                raise fault
            return  # the client has left
        code, reason = await telling
        if reason is not None:
            raise ClosedError(code, reason, ticket.reason)
    except ClosedError as closed:
        code, reason = closed.code, closed.reason
        ticket.end(code, closed.kind)
        await send_last(socket, error(reason) if reason is not None else None)
    except WebSocketDisconnect:
        ticket.end(1005, "client")
    except DsmError as fault:
        code, reason = 1007, str(fault)
        ticket.end(code, "bad message")
        await send_last(socket, error(reason))
    except Exception:
        _log.exception("session %s failed", ticket.id)
        code, reason = 1011, "the server has failed"
        ticket.end(code, "fault")
        await send_last(socket, error(reason))
    finally:
        for task in (hearing, telling):
            task.cancel()
        await asyncio.gather(hearing, telling, return_exceptions=True)
        await close(socket, code, reason)


async def send_last(socket: WebSocket, message: str | bytes | None) -> None:
    """Send the message before a close, without waiting for a client that does not read; None sends nothing."""
    if message is not None:
        kind = "text" if isinstance(message, str) else "bytes"
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
            await socket.send({"type": "websocket.send", kind: message, LAST: True})
