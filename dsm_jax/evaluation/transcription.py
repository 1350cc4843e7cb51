"""Transcribe recordings, whole or live, against the clock: the only module here that calls into `dsm_jax.stt`."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import DsmError
from dsm_jax.evaluation.datasets import Sample
from dsm_jax.stt import StreamingTranscriber, TranscribeOptions, WordEnded, WordStarted, transcribe_each

WARM_UP_S = 1.0  # of silence, which compiles the programs before the clock runs


@dataclasses.dataclass(frozen=True)
class TimedTranscript:
    """The transcript of a recording and its times.

    Attributes:
      text: the transcript.
      duration: length of the recording, seconds.
      processing: seconds from the end of the recording that was finished before this one, or from the start, to the
        end of this one; recordings of a batch overlap, and the sum over recordings is the time that all took.
      start_latencies: for each word, seconds of audio that had been fed, beyond the word's start, when its start was
        reported; only of live transcription, and only of words reported before the audio ended.
      end_latencies: the same for the ends of words.
      flushed: words whose end was only reported after the audio had ended.
    """

    text: str
    duration: float
    processing: float
    start_latencies: tuple[float, ...] = ()
    end_latencies: tuple[float, ...] = ()
    flushed: int = 0


class _Opened(Sequence[audio.Source]):
    """Recordings that are opened as their slots become free."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index):
        return self._samples[index].open()


def transcribe(
    model: Model, samples: Sequence[Sample], options: TranscribeOptions, *, batch_size: int
) -> Iterator[tuple[int, TimedTranscript | DsmError]]:
    """Transcribe whole recordings and yield each as it ends, with its place; compilation is not in the time."""
    silence = np.zeros(int(WARM_UP_S * model.sample_rate), np.float32)
    count = min(batch_size, len(samples))
    for _ in transcribe_each(model, [silence] * count, options=options, batch_size=batch_size):
        pass
    results = transcribe_each(model, _Opened(samples), options=options, batch_size=batch_size)
    passed = 0.0  # since the last recording that could be transcribed
    while True:
        start = time.perf_counter()
        result = next(results, None)
        passed += time.perf_counter() - start
        if result is None:
            return
        index, transcript = result
        if isinstance(transcript, DsmError):
            yield index, transcript
        else:
            yield index, TimedTranscript(transcript.text, transcript.duration, passed)
            passed = 0.0


def transcribe_live(
    model: Model, samples: Sequence[Sample], options: TranscribeOptions
) -> Iterator[tuple[int, TimedTranscript | DsmError]]:
    """Transcribe recordings live: a stream for each, fed a frame at a time; otherwise as `transcribe`."""
    warm = StreamingTranscriber(model, options=options)
    warm.feed(np.zeros(int(WARM_UP_S * model.sample_rate), np.float32))
    warm.finish()
    for index, sample in enumerate(samples):
        try:
            pcm_T = audio.read(sample.open(), model.sample_rate)
            yield index, _transcribe_live(model, pcm_T, options)
        except DsmError as error:
            yield index, error


def _transcribe_live(model: Model, pcm_T: np.ndarray, options: TranscribeOptions) -> TimedTranscript:
    transcriber = StreamingTranscriber(model, options=options)
    frame_size, starts, ends = model.config.mimi.frame_size, [], []
    begun = time.perf_counter()
    for first in range(0, len(pcm_T), frame_size):
        part_T = pcm_T[first : first + frame_size]
        fed_s = (first + len(part_T)) / model.sample_rate
        for event in transcriber.feed(part_T):
            if isinstance(event, WordStarted):
                starts.append(round(fed_s - event.start, 4))
            elif isinstance(event, WordEnded):
                ends.append(round(fed_s - event.word.end, 4))
    flushed = sum(isinstance(event, WordEnded) for event in transcriber.finish())
    processing = time.perf_counter() - begun
    duration = len(pcm_T) / model.sample_rate
    return TimedTranscript(transcriber.text, duration, processing, tuple(starts), tuple(ends), flushed)
