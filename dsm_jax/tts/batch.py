"""Whole texts to speech, any number of them: clients of the slots that they share."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from dsm_jax.checkpoints import Model
from dsm_jax.errors import ConfigError, DsmError
from dsm_jax.progress import Progress, ProgressCallback
from dsm_jax.speech import Speech
from dsm_jax.tts.speech import Dialogue, Request, SynthesizeOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer

Text = str | Dialogue | Request


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


def requests_of(texts: Sequence[Text], alone: bool, voice: Any, options: Any) -> list[Request]:
    """Return the requests of texts.

    Args:
      texts: one text or several.
      alone: whether one text was given, and not a list of one.
      voice: one for all texts, or a list, one each.
      options: one for all texts, or a list, one each; None leaves them open.

    Raises:
      ConfigError: not as many voices or options as texts.
      SpeechError: a text of another kind.
    """
    if alone:
        if isinstance(options, Sequence):
            raise ConfigError("one text has a list of options; give one SynthesizeOptions, or a list of texts")
        if _is_list(voice):
            raise ConfigError("one text has a list of voices; give one voice, or a Dialogue whose turns have their own")
        return [Request.of(texts[0], voice, options)]
    voices = list(voice) if _is_list(voice) else [voice] * len(texts)
    each = list(options) if isinstance(options, Sequence) else [options] * len(texts)
    for given, what in ((voices, "voices"), (each, "options")):
        if len(given) != len(texts):
            raise ConfigError(f"{len(texts)} texts have {len(given)} {what}; give one for all, or one each")
    return [Request.of(*request) for request in zip(texts, voices, each, strict=True)]
