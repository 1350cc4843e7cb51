"""Live audio: words and pauses as chunks of any size arrive."""

from collections.abc import Iterable, Iterator

import numpy as np

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import AudioError, StreamError
from dsm_jax.stt.options import Options
from dsm_jax.stt.transcriber import RecordingSession, Transcriber
from dsm_jax.stt.transcript import Event


class Listener:
    """One live stream.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      options: how to transcribe.
    """

    def __init__(self, model: Model, options: Options = Options()):
        self._transcriber = Transcriber(model, 1, 1, [options], behind=0)
        self._session = RecordingSession(self._transcriber, options)
        self._transcriber.slots.admit([self._session])

    def feed(self, samples: np.ndarray) -> list[Event]:
        """Transcribes more audio, every frame of 80 ms as soon as it is complete.

        Args:
          samples: mono, float or int16, at the model's rate; any number, none included.

        Returns:
          Words that started or ended, and pauses, in the order they were found.

        Raises:
          AudioError: samples that are not numbers, or not mono.
          StreamError: the stream has been finished.
        """
        if self._session.buffer.ended:
            raise StreamError("audio was fed to a stream that has been finished; make a new Listener")
        if np.ndim(samples) != 1:
            raise AudioError(f"live audio has the shape {np.shape(samples)}; feed mono samples [T]")
        if np.size(samples):
            self._session.buffer.push(audio.read(samples))
        return self._step()

    def finish(self) -> list[Event]:
        """Ends the audio: feeds the silence in which the last words come out, and ends the last word.

        Raises:
          StreamError: the stream has been finished before.
        """
        if self._session.buffer.ended:
            raise StreamError("the stream has been finished already; make a new Listener")
        self._session.buffer.end()
        return self._step()

    @property
    def text(self) -> str:
        """All text so far."""
        return self._session.reader.text

    def _step(self) -> list[Event]:
        while self._session.buffer.ready:
            self._transcriber.slots.step()
        return self._session.take_events()


def stream(model: Model, chunks: Iterable[np.ndarray], options: Options = Options()) -> Iterator[Event]:
    """Yields words and pauses as audio arrives; the words are those of `transcribe` on the joined chunks.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      chunks: mono samples at the model's rate, float or int16, in pieces of any size.
      options: how to transcribe.

    Yields:
      WordStarted, WordEnded and Pause, in the order they are found.
    """
    listener = Listener(model, options)
    for samples in chunks:
        yield from listener.feed(samples)
    yield from listener.finish()
