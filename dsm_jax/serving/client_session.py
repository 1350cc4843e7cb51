"""A session over a websocket, read in the background: the ground of the clients of moshi-server's dialect."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from dsm_jax.errors import ConfigError, ServerError, WireError
from dsm_jax.serving import client_links as links
from dsm_jax.serving import wire, wire_client

READY_S = 60.0  # in which a server that is not full is ready; recordings may wait half of it for a slot
_Item = TypeVar("_Item")


class Session(Generic[_Item]):
    """A websocket whose messages are read in the background.

    Args:
      url: address of the server.
      kind: "stt" or "tts".
      query: of the websocket's address.
      model: name of the model; None for the server's first.
      api_key: key of the client; None for none.

    Attributes:
      model: name of the model, once connected.
    """

    def __init__(self, url: str, kind: str, query: dict[str, str | None], *, model: str | None, api_key: str | None):
        self.server, self.model = links.address(url), model
        self._kind, self._query, self._api_key = kind, query, api_key
        self._stack = contextlib.AsyncExitStack()
        self._socket: ClientConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._items: deque[_Item] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: ServerError | None = None

    async def __aenter__(self) -> Self:
        path, self.model = await links.find_path(self.server, self._kind, self.model, api_key=self._api_key)
        opening = links.socket(self.server, path, query=self._query, api_key=self._api_key)
        async with contextlib.AsyncExitStack() as stack:
            self._socket = socket = await stack.enter_async_context(opening)
            try:
                first = self._decoded(await asyncio.wait_for(socket.recv(), READY_S))
            except TimeoutError:
                raise ServerError(
                    f"{self.server}{path} said nothing for {READY_S:.0f} s; try again, or another server"
                ) from None
            if isinstance(first, wire.Error):
                raise self._refused(first.message)
            if not isinstance(first, wire.Ready):
                raise ServerError(f"{self.server}{path} began with {type(first).__name__}; expected Ready")
            self._stack = stack.pop_all()
        self._reading = asyncio.create_task(self._read(socket))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._reading is not None
        await self._stack.aclose()
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    def __aiter__(self) -> AsyncIterator[_Item]:
        return self

    async def __anext__(self) -> _Item:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._items.popleft()

    async def ready(self) -> list[_Item]:
        """Return what was received since it was last taken, without waiting.

        Raises:
          ServerError: nothing was received, and the session has failed.
        """
        if not self._items and self._error is not None:
            raise self._error
        items = list(self._items)
        self._items.clear()
        return items

    async def _send(self, message: wire.Incoming) -> None:
        if self._socket is None:
            raise ConfigError("the session is not open; use it in `async with`, or in `with` for the plain one")
        try:
            await self._socket.send(wire_client.encode(message))
        except ConnectionClosed:
            await self._wait_for_end()
            raise self._error or ServerError(f"{self.server} has ended the session; open another one") from None

    async def _wait_for_end(self) -> None:
        """Wait until all that the server has said is read, which may tell why it closed the connection."""
        assert self._reading is not None
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(self._reading)

    async def _read(self, socket: ClientConnection) -> None:
        try:
            async for data in socket:
                self._take(self._decoded(data))
                self._changed.set()
            raise socket.protocol.close_exc
        except ConnectionClosed as error:
            self._close(links.closed(self.server, error))
        except ServerError as error:
            self._close(error)
        except BaseException:
            self._close(ServerError(f"the session with {self.server} was given up"))  # nobody waits for it any longer
            raise
        finally:
            self._changed.set()

    def _decoded(self, data: str | bytes) -> wire.Outgoing:
        if isinstance(data, str):
            raise ServerError(f"{self.server} sent a text message; expected MessagePack: it is another kind of server")
        try:
            return wire_client.decode(data)
        except WireError as error:
            raise ServerError(f"{self.server} is another kind of server: {error}") from None

    def _refused(self, reason: str) -> ServerError:
        if reason == "no free channels":
            return ServerError(f"{self.server} has no free slot; try again later, or wait for one with wait=True")
        return ServerError(f"{self.server} ended the session: {reason}")

    def _take(self, message: wire.Outgoing) -> None:
        """Turn a message into items."""
        raise NotImplementedError

    def _close(self, error: ServerError) -> None:
        """Note how the connection ended: `error`, unless a reason or the end was told before."""
        if not self._ended and self._error is None:
            self._error = error
