"""Read a client's messages: how long a session may be idle, and how much of a queued one is read."""

import asyncio
from types import SimpleNamespace

import pytest

from dsm_jax.serving.server import INBOX_S, QUEUED_S
from dsm_jax.serving.sockets import ClosedError, received

IDLE_S = 0.15


class Socket:
    """A client that sends some messages and then nothing, or leaves."""

    def __init__(self, *messages):
        self.messages = list(messages)

    async def receive(self):
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)


def ticket(*, queued=False, **session):
    told_at = asyncio.get_running_loop().time()
    return SimpleNamespace(
        session=SimpleNamespace(**session), queued=queued, told_at=told_at, hurried=False, reading=None
    )


async def read(socket, held, *, max_session_s=60.0):
    server = SimpleNamespace(config=SimpleNamespace(max_session_s=max_session_s, idle_s=IDLE_S))
    return [data async for data in received(socket, server, held)]


async def seconds_until_idle(socket, held):
    start = asyncio.get_running_loop().time()
    with pytest.raises(ClosedError, match="nothing was received for 0 s") as closed:
        await read(socket, held)
    assert (closed.value.code, closed.value.kind) == (1000, "idle")
    return asyncio.get_running_loop().time() - start


def test_a_session_is_idle_once_nothing_was_received_or_told_for_a_while():
    async def run():
        held, loop = ticket(), asyncio.get_running_loop()

        async def tell():
            for _ in range(20):
                await asyncio.sleep(0.02)
                held.told_at = loop.time()

        telling = asyncio.ensure_future(tell())
        seconds = await seconds_until_idle(Socket(), held)
        assert telling.done()  # the client listened all the while
        return seconds

    assert asyncio.run(run()) >= 0.4 + IDLE_S


def test_a_session_that_waits_for_a_slot_is_not_idle():
    async def run():
        held = ticket(queued=True)

        async def begin():
            await asyncio.sleep(3 * IDLE_S)
            held.queued = False

        beginning = asyncio.ensure_future(begin())
        seconds = await seconds_until_idle(Socket(), held)
        assert beginning.done()
        return seconds

    assert asyncio.run(run()) >= 3 * IDLE_S


def test_a_client_that_leaves_while_it_waits_for_a_slot_is_noticed_though_its_audio_waits():
    waiting = (INBOX_S + QUEUED_S) / 2
    sent = [{"type": "websocket.receive", "bytes": b"audio"}, {"type": "websocket.disconnect"}]

    async def run(queued):
        held = ticket(queued=queued, waiting=waiting)
        return await asyncio.wait_for(read(Socket(*sent), held), 0.5)

    assert asyncio.run(run(queued=True)) == [b"audio"]
    with pytest.raises(TimeoutError):  # one that has a slot is not read while its audio waits
        asyncio.run(run(queued=False))
