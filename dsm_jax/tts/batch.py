"""Whole texts to speech, any number of them: clients of the slots that they share."""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from dsm_jax.checkpoints import Model
from dsm_jax.errors import BatchError, ConfigError, DsmError
from dsm_jax.progress import Progress, ProgressCallback
from dsm_jax.tts.speech import Dialogue, Request, Speech, SynthesizeOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer
from dsm_jax.tts.voices import Voice

Text = str | Dialogue | Request


@overload
def synthesize(
    model: Model,
    text: Text,
    *,
    voice: Voice | None = None,
    options: SynthesizeOptions = ...,
    batch_size: int = ...,
    progress: ProgressCallback | None = ...,
) -> Speech: ...


@overload
def synthesize(
    model: Model,
    text: Iterable[Text],
    *,
    voice: Voice | Sequence[Voice] | None = None,
    options: SynthesizeOptions | Sequence[SynthesizeOptions] = ...,
    batch_size: int = ...,
    progress: ProgressCallback | None = ...,
) -> list[Speech]: ...


def synthesize(
    model: Model,
    text: Text | Iterable[Text],
    *,
    voice: Voice | Sequence[Voice] | None = None,
    options: SynthesizeOptions | Sequence[SynthesizeOptions] = SynthesizeOptions(),
    batch_size: int = 8,
    progress: ProgressCallback | None = None,
) -> Speech | list[Speech]:
    """Turn text into speech.

    Args:
      model: a text-to-speech model, from `dsm_jax.load`.
      text: a text, or a `Dialogue` between two speakers; or a list or another iterable of these, spoken together.
        `<break time="0.5s"/>` is a pause.
      voice: of the speaker: the name of a published voice or of one of the model's own, a file, or an array, see
        `voices.read_voice`; for several texts, one for all or a list, one each. For a model without speaker
        conditioning, a recording to go on from.
      options: of the synthesis; for several texts, one for all or a list, one each.
      batch_size: at most how many texts at a time. Each gives what it gives alone.
      progress: called with the seconds of each speech that were made so far.

    Returns:
      The speech, with the times of its words; for several texts, a list in the same order.

    Raises:
      AudioError: a recording to go on from that cannot be read.
      BatchError: some of several texts cannot be said; it carries the speeches of the others.
      CheckpointError: a voice cannot be read.
      ConfigError: an option that does not fit the model, or not as many voices or options as texts.
      IncompleteSpeechError: the text was not said to its end within `max_frames`; it carries the part that was.
      ModelKindError: the model does not speak.
      SpeechError: text that cannot be said, or voices that the model cannot take.
    """
    if isinstance(text, Text):
        if not isinstance(options, SynthesizeOptions):
            raise ConfigError("one text has a list of options; give one SynthesizeOptions, or a list of texts")
        if _is_list(voice):
            raise ConfigError("one text has a list of voices; give one voice, or a Dialogue whose turns have their own")
        requests = [Request.of(text, voice, options)]  # pyright: ignore[reportArgumentType]
    else:
        requests = _requests(list(text), voice, options)
    results: list[Speech | None] = [None] * len(requests)
    errors: dict[int, DsmError] = {}
    for index, result in synthesize_each(model, requests, batch_size=batch_size, progress=progress):
        if isinstance(result, Speech):
            results[index] = result
        elif isinstance(text, Text):
            raise result
        else:
            errors[index] = result
    if errors:
        raise BatchError(results, errors)
    return results[0] if isinstance(text, Text) else results  # pyright: ignore[reportReturnType]  all are filled


def synthesize_each(
    model: Model,
    requests: Sequence[Text],
    *,
    options: SynthesizeOptions = SynthesizeOptions(),
    batch_size: int = 8,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[int, Speech | DsmError]]:
    """Say several texts, `batch_size` at a time, and yield each as it ends, with its place in `requests`.

    A finished text's slot takes the next one while the others speak. A request that cannot be said yields its error,
    and the others go on. Each gives what it gives alone.

    Args:
      model: a text-to-speech model, from `dsm_jax.load`.
      requests: texts and dialogues, or a `Request` with voices and options of its own.
      options: of requests that have none.
      batch_size: at most how many texts at a time.
      progress: called with the seconds of each speech that were made so far.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
    read = [Request.of(request) for request in requests]
    # Few requests take a power of two: so that different numbers of them share a compilation.
    slots = max(1, min(batch_size, 1 << max(0, len(read) - 1).bit_length()))
    own = [request.options for request in read if request.options is not None and request.options.fits(model)]
    default = [options] if any(request.options is None for request in read) or not own else []
    synthesizer = Synthesizer(model, slots, [*default, *own])

    def session(index: int) -> SpeechSession:
        try:
            prepared = synthesizer.prepare(read[index], options)
        except DsmError as error:
            return SpeechSession(model, None, error=error, index=index)
        report = None if progress is None else functools.partial(_report, progress, index)
        return SpeechSession(model, prepared, index=index, heard=report)

    # Reading is cheap beside speaking, so all requests are read first: the program then has room for each of them.
    sessions = [session(index) for index in range(len(read))]
    ready = [one.prepared for one in sessions if one.error is None]
    for done in synthesizer.slots_for(*ready).run(sessions) if ready else sessions:
        yield done.index, done.speech() if done.error is None else done.error


def _report(progress: ProgressCallback, index: int, seconds: float) -> None:
    progress(Progress(seconds, None, index))


def _is_list(value: object) -> bool:
    """Tell whether a value is several voices or options, and not a name, a file or an array."""
    return not (value is None or isinstance(value, str | os.PathLike) or hasattr(value, "__array__"))


def _requests(texts: list[Text], voice: Any, options: Any) -> list[Request]:
    """Return the requests of several texts, with one voice and one set of options for all or a list, one each."""
    voices = list(voice) if _is_list(voice) else [voice] * len(texts)
    each = [options] * len(texts) if isinstance(options, SynthesizeOptions) else list(options)
    for given, what in ((voices, "voices"), (each, "options")):
        if len(given) != len(texts):
            raise ConfigError(f"{len(texts)} texts have {len(given)} {what}; give one for all, or one each")
    return [Request.of(*request) for request in zip(texts, voices, each, strict=True)]
