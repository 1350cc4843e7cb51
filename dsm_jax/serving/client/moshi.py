"""Clients of a server in moshi-server's dialect: live and whole recordings to text, text to speech, async and plain.

Shape letters: T samples.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from dsm_jax import audio
from dsm_jax.errors import ServerError, ServerFullError
from dsm_jax.serving.client.moshi_sessions import AsyncSpeech, AsyncTranscription
from dsm_jax.serving.client.plain import Loop, PlainSession
from dsm_jax.serving.client.sound import SAMPLE_RATE, joined_speech, with_part
from dsm_jax.speech import Speech as FinishedSpeech
from dsm_jax.speech import SpokenWord, no_words
from dsm_jax.stt.events import Event
from dsm_jax.stt.transcript import Transcript

_BLOCK_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0  # before a full server is tried again
_T = TypeVar("_T")
_log = logging.getLogger("dsm_jax.serving")


async def transcribe_async(
    url: str,
    recording: audio.Source,
    *,
    model: str | None = None,
    api_key: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    patience_s: float = 0.0,
    needs_pauses: bool = False,
) -> Transcript:
    """Transcribe a recording over a server; it waits for a slot if none is free.

    Args:
      url: address of the server, such as "http://127.0.0.1:8080".
      recording: as for `audio.blocks`; it is read here, so the server need not have its file.
      model: name of the model; None for the server's first.
      api_key: key of the client; None for none.
      on_event: called with each word and pause as it is found.
      patience_s: seconds in which a server that has no room in its queue either is tried again.
      needs_pauses: refuse a model that predicts no pauses.

    Returns:
      The transcript, as `dsm_jax.transcribe` makes it.

    Raises:
      AudioError: the recording cannot be read.
      ServerFullError: the server has no room in all that time.
      ServerError: the server cannot be reached, refuses, or fails.
    """
    blocks = audio.blocks(recording, SAMPLE_RATE, _BLOCK_S)
    block_T = await asyncio.to_thread(next, blocks)  # what cannot be read takes no slot
    async with contextlib.AsyncExitStack() as stack:
        session = await _patiently(
            lambda: stack.enter_async_context(
                AsyncTranscription(url, model=model, api_key=api_key, wait=True, needs_pauses=needs_pauses)
            ),
            patience_s,
        )

        async def send(block_T: np.ndarray | None) -> None:
            while block_T is not None:
                await session.send(block_T)
                block_T = await asyncio.to_thread(next, blocks, None)
            await session.finish()

        sending = asyncio.create_task(send(block_T))
        try:
            async for event in session:
                if on_event is not None:
                    on_event(event)
                if sending.done():
                    sending.result()
            await sending
        finally:
            await _ended(sending)
        found = session.transcript
    return dataclasses.replace(found, audio=audio.path_of(recording))


async def _patiently(call: Callable[[], Awaitable[_T]], patience_s: float) -> _T:
    """Return what a call returns, which is made again while the server is full and there is time."""
    ends = asyncio.get_running_loop().time() + patience_s
    longest_s = _FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except ServerFullError as full:
            # At random: clients that were refused at once would come back at once.
            pause_s = random.uniform(0.5, 1.0) * longest_s if full.retry_after_s is None else full.retry_after_s
            longest_s = min(1.5 * longest_s, _LONGEST_PAUSE_S)
            if asyncio.get_running_loop().time() + pause_s > ends:
                raise
            _log.info("%s (again in %.1f s)", full, pause_s)
            await asyncio.sleep(pause_s)


async def _ended(task: "asyncio.Task[None]") -> None:
    """Cancel a task unless it has ended, and wait for its end."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # else asyncio would log it; it was told already, or follows from what was told


async def synthesize_async(
    url: str,
    text: str,
    *,
    voice: str | None = None,
    seed: int | None = None,
    model: str | None = None,
    api_key: str | None = None,
) -> FinishedSpeech:
    """Say a whole text over a server.

    Args:
      url: address of the server, such as "http://127.0.0.1:8080".
      text: text.
      voice: name of the voice; None for the server's default.
      seed: seed of the sampling; None for the server's.
      model: name of the model; None for the server's first.
      api_key: key of the client; None for none.

    Returns:
      The speech, as `dsm_jax.synthesize` makes it, but clipped to 0.99 and without frames.

    Raises:
      ServerError: the server cannot be reached, refuses the text or the voice, or fails; if some sound came before, the
        error is an `IncompleteSpeechError` too, which carries that.
      SpeechError: the text has no word.
      TextError: the text has half of a character in it.
    """
    pieces: list[np.ndarray] = []
    words: list[SpokenWord] = []

    def said(*, complete: bool) -> FinishedSpeech:
        return joined_speech(
            pieces, " ".join(word.text for word in words), session.model or "", words, complete=complete
        )

    async with AsyncSpeech(url, voice=voice, seed=seed, model=model, api_key=api_key) as session:
        await session.say(text)
        await session.finish()
        try:
            async for item in session:
                if isinstance(item, SpokenWord):
                    words.append(item)
                else:
                    pieces.append(item)
        except ServerError as error:
            raise with_part(error, said(complete=False)) from None
    if not pieces:  # a session over which no word was sent ends well
        raise no_words(1)
    return said(complete=True)


def transcribe(
    url: str,
    recording: audio.Source,
    *,
    model: str | None = None,
    api_key: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    patience_s: float = 0.0,
    needs_pauses: bool = False,
) -> Transcript:
    """Transcribe a recording over a server; as `transcribe_async`."""
    call = transcribe_async(
        url,
        recording,
        model=model,
        api_key=api_key,
        on_event=on_event,
        patience_s=patience_s,
        needs_pauses=needs_pauses,
    )
    with Loop() as loop:
        return loop.run(call)


def synthesize(
    url: str,
    text: str,
    *,
    voice: str | None = None,
    seed: int | None = None,
    model: str | None = None,
    api_key: str | None = None,
) -> FinishedSpeech:
    """Say a whole text over a server; as `synthesize_async`."""
    with Loop() as loop:
        return loop.run(synthesize_async(url, text, voice=voice, seed=seed, model=model, api_key=api_key))


class Transcription(PlainSession[Event]):
    """Transcribe live audio: as `AsyncTranscription`, with plain calls.

    Iterate in another thread than the one that sends, or after `finish`; `ready` returns what is there at any time.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        wait: bool = False,
        horizon: float = 2.0,
        threshold: float = 0.5,
        needs_pauses: bool = False,
    ):
        self._async = AsyncTranscription(
            url,
            model=model,
            api_key=api_key,
            wait=wait,
            horizon=horizon,
            threshold=threshold,
            needs_pauses=needs_pauses,
        )
        super().__init__(self._async)

    @property
    def transcript(self) -> Transcript:
        """Return the transcript so far."""
        return self._async.transcript

    def send(self, pcm: ArrayLike) -> None:
        """Send samples; as `AsyncTranscription.send`."""
        self._loop.run(self._async.send(pcm))

    def mark(self, *, flush: bool = False) -> None:
        """Wait until all audio sent so far is transcribed; as `AsyncTranscription.mark`."""
        self._loop.run(self._async.mark(flush=flush))

    def flush(self) -> None:
        """Wait until all audio sent so far is transcribed, without more audio."""
        self._loop.run(self._async.flush())

    def finish(self) -> None:
        """End the audio: the iteration ends after its last word."""
        self._loop.run(self._async.finish())


class Speech(PlainSession["np.ndarray | SpokenWord"]):
    """Say text while it arrives: as `AsyncSpeech`, with plain calls."""

    def __init__(
        self,
        url: str,
        *,
        voice: str | None = None,
        seed: int | None = None,
        model: str | None = None,
        api_key: str | None = None,
    ):
        self._async = AsyncSpeech(url, voice=voice, seed=seed, model=model, api_key=api_key)
        super().__init__(self._async)

    def say(self, text: str) -> None:
        """Send text, of which every word is whole."""
        self._loop.run(self._async.say(text))

    def finish(self) -> None:
        """End the text: the iteration ends with its sound."""
        self._loop.run(self._async.finish())
