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
      processing: the recording's share of the time, in seconds: recordings that run together share it equally, so that
        sums over any recordings can be compared, and the sum over all is the time that all took.
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


class _Shares:
    """Share time equally among the recordings that run, as their number changes.

    Args:
      slots: how many run at a time; those that were opened ahead take no share.
    """

    def __init__(self, slots: int):
        self._slots = slots
        self._open: dict[int, float] = {}  # in the order of their slots
        self._left = 0.0  # seconds before the first recording, and of failed ones: the next that run share them
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Leave out the time that has passed since the last call."""
        self._since = time.perf_counter()

    def begin(self, index: int) -> None:
        """Let a recording run from now on, or once a slot is free."""
        self._share()
        self._open[index] = 0.0

    def end(self, index: int, *, failed: bool) -> float:
        """Return the share of a recording that has ended; if it failed, others take the share."""
        self._share()
        seconds = self._open.pop(index)
        if failed:
            self._left += seconds
        return seconds

    def _share(self) -> None:
        now = time.perf_counter()
        self._left += now - self._since
        self._since = now
        if running := list(self._open)[: self._slots]:
            part, self._left = self._left / len(running), 0.0
            for index in running:
                self._open[index] += part


class _Opened(Sequence[audio.Source]):
    """Recordings that are opened as their slots become free, and share the time from then on."""

    def __init__(self, samples: Sequence[Sample], shares: _Shares):
        self._samples, self._shares = samples, shares

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index):
        sample = self._samples[index]
        self._shares.begin(index)
        return sample.open()


def transcribe(
    model: Model, samples: Sequence[Sample], options: TranscribeOptions, *, batch_size: int
) -> Iterator[tuple[int, TimedTranscript | DsmError]]:
    """Transcribe whole recordings and yield each as it ends, with its place; compilation is not in the time."""
    silence = np.zeros(int(WARM_UP_S * model.sample_rate), np.float32)
    count = min(batch_size, len(samples))
    for _ in transcribe_each(model, [silence] * count, options=options, batch_size=batch_size):
        pass
    shares = _Shares(count)
    results = transcribe_each(model, _Opened(samples, shares), options=options, batch_size=batch_size)
    for index, transcript in results:
        seconds = shares.end(index, failed=isinstance(transcript, DsmError))
        if isinstance(transcript, DsmError):
            yield index, transcript
        else:
            yield index, TimedTranscript(transcript.text, transcript.duration, seconds)
        shares.resume()


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
