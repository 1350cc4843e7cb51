"""Plain calls of async clients: their event loop runs in a thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dsm_jax.errors import ConfigError
from dsm_jax.serving.client.session import NOT_OPEN, Session

_T = TypeVar("_T")
_Item = TypeVar("_Item")


class Loop:
    """An event loop in a thread, so that plain calls work where a loop runs already, as in a notebook."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dsm_jax client", daemon=True)
        self._thread.start()
        return self

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Wait for a call in the loop; Ctrl-C cancels it.

        Raises:
          ConfigError: the loop does not run.
        """
        if self._loop is None:
            call.close()  # else Python would complain that it was never awaited
            raise ConfigError(NOT_OPEN)
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def __exit__(self, *_: object) -> None:
        loop, self._loop = self._loop, None
        assert loop is not None
        asyncio.run_coroutine_threadsafe(self._settle(loop), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    async def _settle(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let what was cancelled end."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=5.0)
        await loop.shutdown_default_executor()


class PlainSession(Generic[_Item]):
    """A session whose event loop runs in a thread."""

    def __init__(self, session: Session[Any, _Item]):
        self._session = session
        self._loop = Loop()

    @property
    def model(self) -> str | None:
        """Name of the model, once connected."""
        return self._session.model

    def __enter__(self) -> Self:
        self._session.check_new()  # before the loop, as one within the block would replace the loop that runs
        self._loop.__enter__()
        try:
            self._loop.run(self._session.__aenter__())
        except BaseException:
            self._loop.__exit__()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._loop.run(self._session.__aexit__(kind, error, trace))
        finally:
            self._loop.__exit__()

    def __iter__(self) -> Iterator[_Item]:
        items: AsyncIterator[_Item] = aiter(self._session)
        while (found := self._loop.run(_next(items))) is not None:
            yield found[0]

    def ready(self) -> list[_Item]:
        """Return what was received since it was last taken, without waiting."""
        return self._loop.run(self._session.ready())


async def _next(items: AsyncIterator[_Item]) -> tuple[_Item] | None:
    try:
        return (await anext(items),)
    except StopAsyncIteration:
        return None
