"""Whole recordings and whole texts: requests that may wait for a slot."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import IO, Any

import numpy as np

from dsm_jax import audio
from dsm_jax.errors import AudioError, DsmError, FullError, SpeechError
from dsm_jax.serving.hearing import LiveHearing
from dsm_jax.serving.outbox import Ended, Outbox
from dsm_jax.serving.server import INBOX_S, QUEUE_S, Server
from dsm_jax.serving.services import Served
from dsm_jax.serving.speaking import LiveVoice, Sound
from dsm_jax.serving.tickets import Ticket
from dsm_jax.stt.transcriber import Utterance

_BLOCK_S = 1.0
_NO_FAULT_OF_CLIENT = (1011, 1013)  # codes of an engine that has failed, and of a server that is ending
_IN_MEMORY = 1 << 20  # bytes of an upload, beyond which it lies on the disk


class TooLargeError(DsmError):
    """An upload that is larger than the server takes."""


async def spooled(stream: AsyncIterator[bytes], limit_mb: float) -> IO[bytes]:
    """Return a body as a file.

    Raises:
      TooLargeError: it is larger than the limit.
    """
    file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  the caller closes it
    size = 0
    try:
        async for piece in stream:
            size += len(piece)
            if size > limit_mb * 1e6:
                raise TooLargeError(f"the recording is larger than {limit_mb:g} MB; send it in parts")
            file.write(piece)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


async def heard(
    server: Server, served: Served, file: Any, dialect: str, utterance: Utterance | None = None
) -> AsyncGenerator[tuple[LiveHearing, Any], None]:
    """Transcribe a recording, and yield its session with each of the session's messages.

    Args:
      server: with the model.
      served: a speech-to-text model.
      file: open binary file of any audio format.
      dialect: for the log.
      utterance: options, as the service has read them.

    Raises:
      AudioError: the recording cannot be read.
      FullError: no slot has become free in time, the engine has failed, or the server is ending.
    """
    rate = served.model.sample_rate
    blocks = audio.blocks(file, rate, _BLOCK_S)
    first_T = await asyncio.to_thread(next, blocks)  # what cannot be read takes no slot
    session = LiveHearing(served.service, Outbox(), utterance, is_file=True)
    async with server.session(served, session, dialect) as ticket:
        messages = await _begun(ticket)
        feeding = asyncio.ensure_future(_feed(session, served, first_T, blocks, server.config.max_session_s))
        try:
            async for message in messages:
                if isinstance(message, Ended):
                    if message.code in _NO_FAULT_OF_CLIENT:
                        raise FullError(message.reason)
                    break
                yield session, message
            await feeding
        finally:
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError, DsmError):
                await feeding


async def _begun(ticket: Ticket) -> AsyncIterator[Any]:
    """Return the messages of a session that has got its slot; those of a file wait for one.

    Raises:
      FullError: no slot has become free in time, the engine has failed, or the server is ending.
    """
    ticket.is_whole = True
    ticket.start()
    messages = ticket.messages()
    try:
        first = await asyncio.wait_for(anext(messages), QUEUE_S)
    except TimeoutError:
        ticket.end(1013, "full")
        ticket.metrics.refused.labels("queue").inc()
        raise FullError(f"no slot has become free in {QUEUE_S:.0f} s; try again later") from None
    if isinstance(first, Ended):  # the engine has failed meanwhile, or the server is ending
        raise FullError(first.reason)
    return messages


async def _feed(
    session: LiveHearing, served: Served, first_T: np.ndarray, blocks: Iterator[np.ndarray], longest_s: float
) -> None:
    """Push a recording, not much faster than it is transcribed."""
    engine, block_T, seconds = served.engine, first_T, 0.0
    try:
        while block_T is not None:
            seconds += block_T.size / served.model.sample_rate
            if seconds > longest_s:
                raise AudioError(f"the recording is longer than {longest_s:.0f} s; send it in parts")
            session.push(block_T)
            engine.wake()
            while session.waiting > INBOX_S:
                await asyncio.sleep(0.01)
            block_T = await asyncio.to_thread(next, blocks, None)
        session.finish()
        engine.wake()
    except BaseException as error:
        session.outbox.put([Ended(1007, str(error))])
        raise


async def spoken(server: Server, served: Served, session: LiveVoice, dialect: str) -> AsyncGenerator[Any, None]:
    """Yield the messages of a session whose text is whole: `Sound` and `Said`.

    Raises:
      FullError: no slot has become free in time, the engine has failed, or the server is ending.
      SpeechError: the text was not said to its end.
    """
    async with server.session(served, session, dialect) as ticket:
        async for message in await _begun(ticket):
            if isinstance(message, Ended):
                if message.code in _NO_FAULT_OF_CLIENT:
                    raise FullError(message.reason)
                if message.reason is not None:
                    raise SpeechError(message.reason)
                return
            yield message


async def sound_of(messages: AsyncIterator[Any]) -> AsyncIterator[np.ndarray]:
    """Yield the samples [T] among messages."""
    async for message in messages:
        if isinstance(message, Sound):
            yield message.pcm_T
