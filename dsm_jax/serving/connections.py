"""Connections of the web server that nobody can hold for ever: clients that do not send, do not read, or have gone.

uvicorn itself waits for the rest of a request and for a client that does not read for as long as the client likes, and
closes a websocket that it can read no further without a word to the application.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Close, Frame, Opcode

from dsm_jax.serving.sockets import FAULT, LAST, SEND_S

MESSAGE_BYTES = 4 << 20  # 35 s of samples as MessagePack
PING_S = 10.0  # between pings
PONG_S = 20.0  # that a client has to answer one
_PLAYED = 4_000  # bytes a second that a client reads which plays Opus as it comes
_QUIET_S = 0.5  # without bytes of a client that was told why it is read no further
_FAULTS = {
    1007: "a text message is no UTF-8",
    1009: f"a message has more than {MESSAGE_BYTES >> 20} MiB; send what it holds in several",
}


class PatientHttp(H11Protocol):
    """uvicorn's HTTP connection, closed where a client neither sends its request nor reads its answer.

    Attributes:
      patience_s: seconds that a client has to send a request, or to leave once the connection is closed.
      pace: bytes that give a client one second more to send a request, so that a long one may come on a slow line.
      send_s: seconds in which a client may read nothing of an answer.
    """

    patience_s = 30.0
    pace = 500
    send_s = SEND_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to look at the client."""
        super().connection_made(transport)
        self._unread: asyncio.TimerHandle | None = None
        self._was_closing = False
        self._wait()
        self._looking = self.loop.call_later(self.patience_s, self._look)

    def _wait(self) -> None:
        """Give the client all its time for what it is to send now."""
        self._since, self._received = self.loop.time(), 0

    def data_received(self, data: bytes) -> None:
        """Give the client more time for what it has sent."""
        self._received += len(data)
        super().data_received(data)

    def handle_websocket_upgrade(self, event: Any) -> None:
        """Leave the client to its websocket, which has limits of its own."""
        self._looking.cancel()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Wait for the client's next request."""
        self._wait()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Note that the client does not read."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that the client reads."""
        super().resume_writing()
        self._forget_unread()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        self._looking.cancel()
        self._forget_unread()
        super().connection_lost(exc)

    def _look(self) -> None:
        cycle, closing = self.cycle, self.transport.is_closing()
        if closing and self._was_closing:
            self.transport.abort()  # what is left to send is not read
            return
        self._was_closing = closing
        if self.flow.read_paused:
            self._wait()  # it is not the client that keeps the server waiting
        left_s = self._since + self.patience_s + self._received / self.pace - self.loop.time()
        waits = cycle is None or cycle.response_complete or cycle.more_body
        if waits and left_s <= 0:
            self.transport.close()
        self._looking = self.loop.call_later(left_s if waits and left_s > 0 else self.patience_s, self._look)


class PatientSocket(WebSocketsSansIOProtocol):
    """uvicorn's websocket, whose faults the application is told, so that it can answer them in its dialect.

    The application receives a message with the key `FAULT`: close code, sentence and kind. It has the last word: a
    message with the key `LAST`, and a close, do not wait for a client that does not read.

    Attributes:
      linger_s: seconds that a client has to leave once the application is done with it.
    """

    linger_s = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count what the client is sent and for how long it is not read."""
        super().connection_made(transport)
        self._broken = False
        self._sent = 0  # bytes since the client's last pong
        self._paused_at: float | None = None
        self._paused_s = 0.0  # since the last ping
        self._leaving: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        super().connection_lost(exc)
        if self._leaving is not None:
            self._leaving.cancel()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """Drop a connection whose client does not leave."""
        super().on_task_complete(task)
        if not self.disconnected:
            self._leaving = self.loop.call_later(self.linger_s, self.transport.abort)

    # Receiving.

    def data_received(self, data: bytes) -> None:
        """Take messages, up to one that cannot be read."""
        self.conn.receive_data(data)
        if self.conn.parser_exc is None:
            self.handle_events()
        elif not self._broken:
            # The library's own close frame comes no sooner than the application's last message.
            self.conn.data_to_send()
            self._broken = True
            self.handle_events()
            closed = self.conn.close_sent
            code = closed.code if closed is not None else 1002
            self._tell(code, _FAULTS.get(code, "the websocket's protocol was broken"), "bad message")
        elif self.close_sent:
            self._close_soon()

    def send_receive_event_to_app(self) -> None:
        """Hand a message to the application; note that no more is read until it has been taken."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self._tell(1007, _FAULTS[1007], "bad message")
                return
        super().send_receive_event_to_app()
        if self.read_paused and self._paused_at is None:
            self._paused_at = self.loop.time()

    async def receive(self) -> Any:
        """Return the client's next message."""
        message = await super().receive()
        if self._paused_at is not None and not self.read_paused:
            self._paused_s += self.loop.time() - self._paused_at
            self._paused_at = None
        return message

    def _tell(self, code: int, sentence: str, kind: str) -> None:
        self.stop_keepalive()
        told: Any = {"type": "websocket.receive", FAULT: (code, sentence, kind)}
        self.queue.put_nowait(told)

    # Sending.

    async def send(self, message: Any) -> None:
        """Send a message; the last ones at once."""
        if message["type"] == "websocket.close" or message.get(LAST):
            self.writable.set()
        text, data = message.get("text"), message.get("bytes") or b""
        self._sent += len(text or data)
        if not self._broken or self.disconnected or not self.handshake_complete:
            await super().send(message)
        elif message["type"] == "websocket.close":
            closed = Close(message.get("code", 1000), message.get("reason") or "")
            self._write(Frame(Opcode.CLOSE, closed.serialize()))
            self.close_sent = True
            self.transport.resume_reading()
            self._close_soon()
        elif text is None:
            self._write(Frame(Opcode.BINARY, data))
        else:
            self._write(Frame(Opcode.TEXT, text.encode()))

    def _close_soon(self) -> None:
        """Close once the client sends no more: bytes that nobody reads would reset the connection, last words and all.

        Its own close frame cannot be waited for, as nothing that it sends can be read any more.
        """
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(_QUIET_S, self.transport.close)

    def _write(self, frame: Frame) -> None:
        """Write a frame on a connection for which the library writes no more."""
        self.transport.write(frame.serialize(mask=False))

    # Keepalive.

    def handle_pong(self, event: Frame) -> None:
        """Note that the client has read all up to the ping."""
        super().handle_pong(event)
        if self.pending_ping_payload is None:
            self._sent = 0

    def send_keepalive_ping(self) -> None:
        """Send a ping, and begin to count the time in which the client's answer can be read."""
        super().send_keepalive_ping()
        self._paused_s = 0.0
        if self._paused_at is not None:
            self._paused_at = self.ping_sent_at

    def keepalive_timeout(self) -> None:
        """Tell the application of a ping that was not answered; wait on if the answer may lie unread on either side."""
        assert self.ping_timeout is not None
        now, patience_s = self.loop.time(), self.ping_timeout
        paused_s = self._paused_s + (0.0 if self._paused_at is None else now - self._paused_at)
        left_s = self.ping_sent_at + paused_s + patience_s + self._sent / _PLAYED - now
        if left_s > 0:
            self.pong_timer = self.loop.call_later(max(left_s, 1.0), self.keepalive_timeout)
            return
        self.pong_timer = None
        self._tell(1008, f"the client does not read: it has not answered a ping for {patience_s:.0f} s", "slow")
