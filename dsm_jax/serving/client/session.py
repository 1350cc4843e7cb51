"""A session over a websocket, read in the background: the ground of the live clients of every dialect."""

import abc
import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from dsm_jax.errors import ConfigError, ServerError, ServerFullError
from dsm_jax.serving.client import links

NOT_OPEN = "the session is not open; use it in `async with`, or in `with` for the plain one"
READY_S = 60.0  # in which a server that is not full is ready; also the longest wait of a recording in its queue
_Item = TypeVar("_Item")
_Message = TypeVar("_Message")


class Session(abc.ABC, Generic[_Message, _Item]):
    """A websocket whose messages are read in the background, and turned into items.

    Args:
      url: address of the server.
      query: of the websocket's address.
      model: name of the model; None for the server's first.
      api_key: key of the client; None for none.

    Attributes:
      model: name of the model, once connected.
    """

    def __init__(self, url: str, query: dict[str, str | None], *, model: str | None, api_key: str | None):
        self.server, self.model = links.address(url), model
        self._query, self._api_key = query, api_key
        self._stack = contextlib.AsyncExitStack()
        self._socket: ClientConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._items: deque[_Item] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: ServerError | None = None

    def check_new(self) -> None:
        """Refuse a session that was opened before.

        Raises:
          ConfigError: it was.
        """
        if self._socket is not None:
            raise ConfigError("the session was opened before, and one is opened once; make another one")

    async def __aenter__(self) -> Self:
        self.check_new()
        path = await self._path()
        opening = links.socket(self.server, path, query=self._query, api_key=self._api_key)
        async with contextlib.AsyncExitStack() as stack:
            socket = await stack.enter_async_context(opening)
            try:
                async with asyncio.timeout(READY_S):
                    await self._begin(socket, path)
            except TimeoutError:
                kind = ServerFullError if self._query.get("wait") else ServerError  # in a queue, silence is of no fault
                raise kind(
                    f"{self.server}{path} said nothing for {READY_S:.0f} s; try again, or another server"
                ) from None
            self._stack = stack.pop_all()
        self._socket = socket
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
        self._open_socket()
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
          ConfigError: the session was not opened.
          ServerError: nothing was received, and the session has failed.
        """
        self._open_socket()
        if not self._items and self._error is not None:
            raise self._error
        items = list(self._items)
        self._items.clear()
        return items

    def _open_socket(self) -> ClientConnection:
        if self._socket is None:
            raise ConfigError(NOT_OPEN)
        return self._socket

    async def _send_data(self, data: str | bytes) -> None:
        socket = self._open_socket()
        try:
            await socket.send(data)
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

    @abc.abstractmethod
    async def _path(self) -> str:
        """Return the path of the websocket."""

    @abc.abstractmethod
    async def _begin(self, socket: ClientConnection, path: str) -> None:
        """Wait until the server is ready.

        Raises:
          ServerError: it refuses the session, or is another kind of server.
        """

    @abc.abstractmethod
    def _decoded(self, data: str | bytes) -> _Message:
        """Read a message of the dialect.

        Raises:
          ServerError: it is none.
        """

    @abc.abstractmethod
    def _take(self, message: _Message) -> None:
        """Turn a message into items.

        Raises:
          ServerError: the message tells that the session has failed.
        """

    def _close(self, error: ServerError) -> None:
        """Note how the connection ended: `error`, unless a reason or the end was told before."""
        if not self._ended and self._error is None:
            self._error = error
