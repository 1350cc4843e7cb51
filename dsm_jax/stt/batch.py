"""Whole recordings, any number of them, of any length, in one batch of rows that are refilled as recordings end."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import BatchError, DsmError
from dsm_jax.stt.engine import FrameOutputs
from dsm_jax.stt.hearing import Hearing
from dsm_jax.stt.recognizer import Options, Recognizer
from dsm_jax.stt.transcript import Event, Frames, Pause, Transcript, Word, WordEnded
from dsm_jax.stt.words import WordReader

CHUNK_FRAMES = 8  # heard at a time: enough for convolutions to be efficient, little to hear for nothing at the end

Progress = Callable[[int, float], None]  # which recording, and how many seconds of it have been read
Result = tuple[int, Transcript | DsmError]  # the place of a recording, and what came of it


@dataclasses.dataclass
class _Job:
    """One recording, while it has a row."""

    index: int
    blocks: Iterator[np.ndarray]
    hearing: Hearing
    reader: WordReader
    keep_frames: bool
    failed: bool = False
    words: list[Word] = dataclasses.field(default_factory=list)
    pauses: list[Pause] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    pause_rows: list[tuple[float, ...]] = dataclasses.field(default_factory=list)

    def fill(self, frames: int) -> int:
        """Reads on until `frames` frames are ready, or the recording ends; returns how many are, at most `frames`."""
        while self.hearing.ready < frames and not self.hearing.ended:
            block = next(self.blocks, None)
            if block is None:
                self.hearing.end()
            else:
                self.hearing.push(block)
        return min(frames, self.hearing.ready)

    def read(self, tokens: np.ndarray, probabilities: np.ndarray, pauses: np.ndarray) -> None:
        for token, probability, row in zip(tokens.tolist(), probabilities.tolist(), pauses.tolist(), strict=True):
            self._collect(self.reader.read(token, probability, tuple(row)))
            if self.keep_frames:
                self.tokens.append(token)
                self.pause_rows.append(tuple(row))

    def _collect(self, events: list[Event]) -> None:
        self.words += [event.word for event in events if isinstance(event, WordEnded)]
        self.pauses += [event for event in events if isinstance(event, Pause)]

    def transcript(self, name: str | None, model: str, rate: int) -> Transcript:
        self._collect(self.reader.finish())
        pause_rows = tuple(self.pause_rows) if any(self.pause_rows) else None
        return Transcript(
            text=self.reader.text,
            words=tuple(self.words),
            pauses=tuple(self.pauses),
            duration=self.hearing.samples / rate,
            frames=Frames(tuple(self.tokens), pause_rows) if self.keep_frames else None,
            audio=name,
            model=model,
        )


class _Batch:
    """The rows, the recordings that wait for one, and the chunks whose outputs have not been read back."""

    def __init__(self, recognizer: Recognizer, sources: Sequence[audio.Source], keep_frames: bool):
        self.recognizer, self.sources, self.keep_frames = recognizer, sources, keep_frames
        self.config = recognizer.model.config.mimi
        self.waiting = iter(enumerate(sources))
        self.rows: list[_Job | None] = [None] * recognizer.batch_size
        self.unread: list[tuple[FrameOutputs, list[tuple[int, _Job, int, bool]]]] = []

    def admit(self) -> Iterator[Result]:
        """Gives every free row a recording; yields those that cannot be read."""
        started = []
        for row, job in enumerate(self.rows):
            while job is None and (item := next(self.waiting, None)) is not None:
                try:
                    job = self._open(*item)
                except DsmError as error:
                    yield item[0], error
            if job is not self.rows[row]:
                self.rows[row] = job
                started.append(row)
        if started:
            self.recognizer.start(started)

    def _open(self, index: int, source: audio.Source) -> _Job:
        blocks = audio.blocks(source, self.config.sample_rate)
        job = _Job(index, blocks, self.recognizer.hearing(), self.recognizer.reader(), self.keep_frames)
        job.fill(1)
        return job

    def dispatch(self) -> Iterator[Result]:
        """Sends the next chunk of every row to the device; yields recordings that fail midway."""
        ready = np.zeros(len(self.rows), int)
        for row, job in enumerate(self.rows):
            if job is not None:
                try:
                    # One frame more than a chunk tells whether the chunk is the last.
                    ready[row] = job.fill(CHUNK_FRAMES + 1)
                except DsmError as error:
                    self.rows[row], job.failed = None, True
                    yield job.index, error
        frames = np.minimum(ready, CHUNK_FRAMES)
        pcm_BT = np.zeros((len(self.rows), CHUNK_FRAMES * self.config.frame_size), np.float32)
        parts = []
        for row, job in enumerate(self.rows):
            if job is not None:
                samples = job.hearing.take(frames[row])
                pcm_BT[row, : samples.size] = samples
                last = ready[row] <= CHUNK_FRAMES
                parts.append((row, job, frames[row], last))
                if last:
                    self.rows[row] = None
        if parts:
            self.unread.append((self.recognizer.advance(pcm_BT, frames), parts))

    def collect(self, progress: Progress | None) -> Iterator[Result]:
        """Reads the oldest chunk back; yields recordings that ended in it."""
        outputs, parts = self.unread.pop(0)
        tokens, sure, pauses = map(np.asarray, (outputs.tokens_BF, outputs.probabilities_BF, outputs.pauses_BFH))
        for row, job, count, last in parts:
            if job.failed:  # since this chunk was sent
                continue
            job.read(tokens[row, :count], sure[row, :count], pauses[row, :count])
            if progress is not None:
                progress(job.index, job.hearing.samples / self.config.sample_rate)
            if last:
                name = self.sources[job.index]
                name = str(name) if isinstance(name, (str, os.PathLike)) else None
                yield job.index, job.transcript(name, self.recognizer.model.name, self.config.sample_rate)


def transcribe_each(
    model: Model,
    sources: Sequence[audio.Source],
    options: Options = Options(),
    *,
    batch_size: int = 8,
    frames: bool = False,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Transcribes recordings and yields each as it ends, with its place in `sources`.

    A recording that cannot be read yields its error, and the others go on. Otherwise as `transcribe`.
    """
    # Few recordings take a power of two: so that different numbers of them share a compilation.
    rows = max(1, min(batch_size, 1 << max(0, len(sources) - 1).bit_length()))
    batch = _Batch(Recognizer(model, rows, CHUNK_FRAMES, options), sources, frames)
    while True:
        yield from batch.admit()
        if not any(batch.rows):
            break
        yield from batch.dispatch()
        # One chunk behind: the device works on the newest while the one before it is read.
        while len(batch.unread) > 1:
            yield from batch.collect(progress)
    while batch.unread:
        yield from batch.collect(progress)


@overload
def transcribe(
    model: Model,
    recordings: Sequence[audio.Source],
    options: Options = ...,
    *,
    batch_size: int = ...,
    frames: bool = ...,
    progress: Progress | None = ...,
) -> list[Transcript]: ...


@overload
def transcribe(
    model: Model,
    recordings: audio.Source,
    options: Options = ...,
    *,
    batch_size: int = ...,
    frames: bool = ...,
    progress: Progress | None = ...,
) -> Transcript: ...


def transcribe(
    model: Model,
    recordings: audio.Source | Sequence[audio.Source],
    options: Options = Options(),
    *,
    batch_size: int = 8,
    frames: bool = False,
    progress: Progress | None = None,
) -> Transcript | list[Transcript]:
    """Turns recordings into text with word times.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      recordings: a path, "-" for standard input, an open file, or float or int16 samples [T] or [channels, T] at the
        model's rate; or a list of these, transcribed together. Files are wav, flac, mp3, ogg or opus, of any rate,
        number of channels and length.
      options: how to listen: prompts, sampling, pauses.
      batch_size: at most how many recordings at a time. Each gives what it gives alone.
      frames: keep the text token and the pause probabilities of every 80 ms frame.
      progress: called with the place of a recording and the seconds of it read so far.

    Returns:
      A transcript, or for a list, a list in the same order.

    Raises:
      AudioError: the one recording cannot be read.
      BatchError: some of a list cannot; it carries the transcripts of the others.
      CheckpointError: the model does not transcribe.
      PromptError: the model cannot follow the prompt.
    """
    several = isinstance(recordings, (list, tuple))
    sources: list[audio.Source] = list(recordings) if several else [recordings]  # pyright: ignore[reportAssignmentType]
    results: list[Transcript | None] = [None] * len(sources)
    errors: dict[int, DsmError] = {}
    for index, result in transcribe_each(
        model, sources, options, batch_size=batch_size, frames=frames, progress=progress
    ):
        if isinstance(result, DsmError):
            errors[index] = result
        else:
            results[index] = result
    if errors and not several:
        raise errors[0]
    if errors:
        raise BatchError(results, errors)
    return results if several else results[0]  # pyright: ignore[reportReturnType]  every place is filled
