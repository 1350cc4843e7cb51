"""Live audio: words and pauses as chunks of any size arrive."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import AudioError, StreamError
from dsm_jax.stt.events import Event
from dsm_jax.stt.options import TranscribeOptions
from dsm_jax.stt.transcriber import RecordingSession, Transcriber
from dsm_jax.stt.transcript import Transcript


class StreamingTranscriber:
    """Transcribe one live stream.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      options: options of the transcription.

    Raises:
      As `transcribe`.
    """

    def __init__(self, model: Model, *, options: TranscribeOptions = TranscribeOptions()):
        self._transcriber = Transcriber(model, 1, (1,), [options], behind=0)
        self._session = RecordingSession(self._transcriber, self._transcriber.utterance(0))
        self._transcriber.slots.start(self._session)

    def feed(self, samples: ArrayLike) -> list[Event]:
        """Transcribe more audio, every frame of 80 ms as soon as it is complete.

        Args:
          samples: mono [T], float or int16, at the model's rate; any number, none included.

        Returns:
          Words that started or ended, and pauses, in the order in which they were found.

        Raises:
          AudioError: samples that are not numbers, or not mono.
          StreamError: the stream has been finished.
        """
        if self._session.buffer.ended:
            raise StreamError("audio was fed to a stream that has been finished; make a new StreamingTranscriber")
        pcm = np.asarray(samples)
        if pcm.ndim != 1:
            raise AudioError(f"live audio has the shape {pcm.shape}; feed mono samples [T]")
        if pcm.size:
            self._session.buffer.push(audio.read(pcm))
        return self._step()

    def finish(self) -> list[Event]:
        """End the audio: feed the silence in which the last words come out, and end the last word.

        Raises:
          StreamError: the stream has been finished before.
        """
        if self._session.buffer.ended:
            raise StreamError("the stream has been finished already; make a new StreamingTranscriber")
        self._session.buffer.end()
        return self._step()

    @property
    def text(self) -> str:
        """All text so far."""
        return self._session.reader.text

    @property
    def transcript(self) -> Transcript:
        """The words and pauses so far, with the text and the duration of the audio."""
        return self._session.transcript(None)

    def _step(self) -> list[Event]:
        while self._session.buffer.ready:
            self._transcriber.slots.step()
        return self._session.take_events()


def transcribe_stream(
    model: Model, chunks: Iterable[ArrayLike], *, options: TranscribeOptions = TranscribeOptions()
) -> Iterator[Event]:
    """Transcribe live audio; the words are those of `transcribe` on the joined chunks.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      chunks: mono samples at the model's rate, float or int16, in pieces of any size.
      options: options of the transcription.

    Yields:
      WordStarted, WordEnded and Pause, in the order in which they are found.

    Raises:
      As `transcribe`.
    """
    transcriber = StreamingTranscriber(model, options=options)
    for samples in chunks:
        yield from transcriber.feed(samples)
    yield from transcriber.finish()
