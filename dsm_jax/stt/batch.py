"""Whole recordings, any number of them, of any length: clients of the slots that they share."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import BatchError, DsmError
from dsm_jax.options import check_batch_size, check_functions, check_one_each, slots_for
from dsm_jax.progress import Progress, ProgressCallback
from dsm_jax.runtime.slots import Slots
from dsm_jax.stt.events import Event
from dsm_jax.stt.options import TranscribeOptions
from dsm_jax.stt.transcriber import FileSession, Transcriber
from dsm_jax.stt.transcript import Transcript

EventCallback = Callable[[int, Event], None]  # the place of a recording, and what was found in it

CHUNK_FRAMES = 8  # of a device call: enough for efficient convolutions, few enough to waste little on the last chunk
ROWS_OF_A_PASS = 4  # slots times steps ahead: docs/decisions/0025-steps-ahead.md


def transcribe_each(
    model: Model,
    sources: Iterable[audio.Source],
    *,
    options: TranscribeOptions | Sequence[TranscribeOptions | None] = TranscribeOptions(),
    batch_size: int = 8,
    frames: bool = False,
    progress: ProgressCallback | None = None,
    on_event: EventCallback | None = None,
) -> Iterator[tuple[int, Transcript | DsmError]]:
    """Transcribe recordings and yield each as it ends, with its place in `sources`.

    A recording that cannot be read, or whose own options cannot, yields its error, and the others go on. Otherwise as
    `transcribe`. An iterator's recordings are taken as slots become free; `on_event` is called with the place of a
    recording and each of its words and pauses as they are found.
    """
    check_batch_size(batch_size)
    check_functions(progress=progress, on_event=on_event)
    given: Any = options
    several = isinstance(given, Iterable) and not isinstance(given, Mapping)
    known: list[Any] = list(given) if several else [given]
    each = known if several else None
    if each is not None and not isinstance(sources, Sequence):
        sources = list(sources)
    if isinstance(sources, Sequence):
        if each is not None:
            check_one_each(len(sources), "recordings", options=each)
        batch_size = slots_for(len(sources), batch_size)
    transcriber = Transcriber(model, batch_size, (CHUNK_FRAMES,), known, ahead=max(1, ROWS_OF_A_PASS // batch_size))

    def session(index: int, source: audio.Source) -> FileSession:
        chosen = transcriber.utterance(0 if each is None else index)
        report = None if progress is None else functools.partial(_report, progress, index, audio.duration(source))
        found = None if on_event is None else functools.partial(on_event, index)
        return FileSession(transcriber, chosen, index, source, keep_frames=frames, progress=report, on_event=found)

    refused = {} if each is None else transcriber.errors
    yield from refused.items()
    slots: Slots[FileSession] = transcriber.slots
    for done in slots.run(session(index, source) for index, source in enumerate(sources) if index not in refused):
        name = audio.path_of(done.source)
        yield done.index, done.transcript(name) if done.error is None else done.error


def _report(progress: ProgressCallback, index: int, total: float | None, seconds: float) -> None:
    progress(Progress(seconds, total, index))


@overload
def transcribe(
    model: Model,
    recordings: audio.Source,
    *,
    options: TranscribeOptions = ...,
    batch_size: int = ...,
    frames: bool = ...,
    progress: ProgressCallback | None = ...,
) -> Transcript: ...


@overload
def transcribe(
    model: Model,
    recordings: Iterable[audio.Source],
    *,
    options: TranscribeOptions | Sequence[TranscribeOptions | None] = ...,
    batch_size: int = ...,
    frames: bool = ...,
    progress: ProgressCallback | None = ...,
) -> list[Transcript]: ...


def transcribe(
    model: Model,
    recordings: audio.Source | Iterable[audio.Source],
    *,
    options: TranscribeOptions | Sequence[TranscribeOptions | None] = TranscribeOptions(),
    batch_size: int = 8,
    frames: bool = False,
    progress: ProgressCallback | None = None,
) -> Transcript | list[Transcript]:
    """Transcribe recordings: text, with the times of its words.

    Args:
      model: a speech-to-text model, from `dsm_jax.load`.
      recordings: a path, "-" for standard input, an open file, float or int16 samples [T] or [channels, T] at the
        model's rate, `dsm_jax.Recorded` samples with another rate, or a `Speech`; or a list or another iterable of
        these, transcribed together. Files may be whatever FFmpeg decodes, of any rate, number of channels and length.
      options: prompt, sampling and pauses of the transcription; for several recordings, one for all or a list, one
        each; None in the list is the default.
      batch_size: at most how many recordings at a time. Each gives what it gives alone.
      frames: keep the text token and the pause probabilities of every 80 ms frame.
      progress: called with the seconds of each recording that were read so far.

    Returns:
      A transcript, or for several recordings, a list in the same order.

    Raises:
      AudioError: the one recording cannot be read, or the audio prompt of all.
      BatchError: some of several cannot, or their own prompts; it carries the transcripts of the others.
      ModelKindError: the model does not transcribe.
      CheckpointError: the model has no tokenizer, or pause heads of another number than the published ones.
      ConfigError: not as many options as recordings, options of another class, `batch_size` is less than 1, or
        `progress` is no function.
      PromptError: the model cannot follow the prompt.
    """
    several = isinstance(recordings, Iterable) and not audio.is_source(recordings)
    sources: Any = recordings if several else [recordings]
    results: dict[int, Transcript | None] = {}
    errors: dict[int, DsmError] = {}
    each = transcribe_each(model, sources, options=options, batch_size=batch_size, frames=frames, progress=progress)
    for index, result in each:
        results[index] = None if isinstance(result, DsmError) else result
        if isinstance(result, DsmError):
            errors[index] = result
    if errors and not several:
        raise errors[0]
    in_order = [results[index] for index in sorted(results)]
    if errors:
        raise BatchError(in_order, errors)
    return in_order if several else in_order[0]  # pyright: ignore[reportReturnType]  every place is filled
