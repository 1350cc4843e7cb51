"""Live audio: words and pauses as chunks of any size arrive."""

from collections.abc import Iterable, Iterator

import numpy as np

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import AudioError, StreamError
from dsm_jax.stt.recognizer import Options, Recognizer
from dsm_jax.stt.transcript import Event


class Listener:
    """One live stream.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      options: how to listen.
    """

    def __init__(self, model: Model, options: Options = Options()):
        self._recognizer = Recognizer(model, 1, 1, options)
        self._hearing = self._recognizer.hearing()
        self._reader = self._recognizer.reader()
        self._recognizer.start([0])

    def feed(self, samples: np.ndarray) -> list[Event]:
        """Hears more audio; every frame of 80 ms is heard as soon as it is complete.

        Args:
          samples: mono, float or int16, at the model's rate; any number, none included.

        Returns:
          Words that started or ended, and pauses, in the order they were found.

        Raises:
          AudioError: samples that are not numbers, or not mono.
          StreamError: the stream has been finished.
        """
        if self._hearing.ended:
            raise StreamError("audio was fed to a stream that has been finished; make a new Listener")
        if np.ndim(samples) != 1:
            raise AudioError(f"live audio has the shape {np.shape(samples)}; feed mono samples [T]")
        if np.size(samples):
            self._hearing.push(audio.read(samples))
        return self._hear()

    def finish(self) -> list[Event]:
        """Ends the audio: hears the silence that lets the last words out, and ends the last word.

        Raises:
          StreamError: the stream has been finished before.
        """
        if self._hearing.ended:
            raise StreamError("the stream has been finished already; make a new Listener")
        self._hearing.end()
        return [*self._hear(), *self._reader.finish()]

    @property
    def text(self) -> str:
        """All that has been said so far."""
        return self._reader.text

    def _hear(self) -> list[Event]:
        events: list[Event] = []
        while self._hearing.ready:
            outputs = self._recognizer.advance(self._hearing.take(1)[None], np.array([1]))
            columns = (outputs.tokens_BF, outputs.probabilities_BF, outputs.pauses_BFH)
            for token, probability, row in zip(*(np.asarray(a)[0].tolist() for a in columns), strict=True):
                events += self._reader.read(token, probability, tuple(row))
        return events


def stream(model: Model, chunks: Iterable[np.ndarray], options: Options = Options()) -> Iterator[Event]:
    """Yields words and pauses as audio arrives; the words are those of `transcribe` on the joined chunks.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      chunks: mono samples at the model's rate, float or int16, in pieces of any size.
      options: how to listen.

    Yields:
      WordStarted, WordEnded and Pause, in the order they are found.
    """
    listener = Listener(model, options)
    for samples in chunks:
        yield from listener.feed(samples)
    yield from listener.finish()
