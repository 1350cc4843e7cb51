"""Whole recordings, any number of them, of any length: clients of the slots that they share."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import BatchError, ConfigError, DsmError
from dsm_jax.runtime.slots import Slots
from dsm_jax.stt.options import Options
from dsm_jax.stt.transcriber import FileSession, Transcriber
from dsm_jax.stt.transcript import Transcript

CHUNK_FRAMES = 8  # of a device call: enough for efficient convolutions, few enough to waste little on the last chunk

Progress = Callable[[int, float], None]  # which recording, and how many seconds of it have been read
Result = tuple[int, Transcript | DsmError]  # the place of a recording, and what came of it


def transcribe_each(
    model: Model,
    sources: Sequence[audio.Source],
    options: Options | Sequence[Options] = Options(),
    *,
    batch_size: int = 8,
    frames: bool = False,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Transcribes recordings and yields each as it ends, with its place in `sources`.

    A recording that cannot be read yields its error, and the others go on. Otherwise as `transcribe`.
    """
    each = [options] * len(sources) if isinstance(options, Options) else list(options)
    if len(each) != len(sources):
        raise ConfigError(f"{len(sources)} recordings have {len(each)} options; give one for all, or one each")
    # Few recordings take a power of two: so that different numbers of them share a compilation.
    count = max(1, min(batch_size, 1 << max(0, len(sources) - 1).bit_length()))
    transcriber = Transcriber(model, count, CHUNK_FRAMES, each)

    def session(index: int) -> FileSession:
        report = None if progress is None else functools.partial(progress, index)
        return FileSession(transcriber, each[index], index, sources[index], keep_frames=frames, progress=report)

    slots: Slots[FileSession] = transcriber.slots
    for done in slots.run(map(session, range(len(sources)))):
        name = str(done.source) if isinstance(done.source, (str, os.PathLike)) else None
        yield done.index, done.transcript(name) if done.error is None else done.error


@overload
def transcribe(
    model: Model,
    recordings: Sequence[audio.Source],
    options: Options | Sequence[Options] = ...,
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
    options: Options | Sequence[Options] = Options(),
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
      options: how to transcribe: prompts, sampling, pauses; for a list, one for all recordings or one each.
      batch_size: at most how many recordings at a time. Each gives what it gives alone.
      frames: keep the text token and the pause probabilities of every 80 ms frame.
      progress: called with the place of a recording and the seconds of it read so far.

    Returns:
      A transcript, or for a list, a list in the same order.

    Raises:
      AudioError: the one recording cannot be read, or an audio prompt.
      BatchError: some of a list cannot; it carries the transcripts of the others.
      CheckpointError: the model does not transcribe.
      ConfigError: not as many options as recordings, or a temperature or top-k below 0.
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
