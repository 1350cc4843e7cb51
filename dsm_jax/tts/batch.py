"""Whole texts to speech, any number of them: clients of the slots that they share."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dsm_jax.checkpoints import Model
from dsm_jax.errors import ConfigError, DsmError, SpeechError
from dsm_jax.options import check_batch_size, check_one_each, slots_for
from dsm_jax.progress import ProgressCallback
from dsm_jax.speaking import read_or_error, speak_each
from dsm_jax.speech import Speech
from dsm_jax.tts.speech import Dialogue, Request, SynthesizeOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer

Text = str | Dialogue | Request


def synthesize_each(
    model: Model,
    requests: Sequence[Text | DsmError],
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
      requests: texts and dialogues, or a `Request` with voices and options of its own; or an error in place of one that
        could not be read.
      options: of requests that have none.
      batch_size: at most how many texts at a time.
      progress: called with the seconds of each speech that were made so far.
    """
    check_batch_size(batch_size)
    read = [one if isinstance(one, DsmError) else read_or_error(Request.of, one) for one in requests]
    chosen = [request.options for request in read if isinstance(request, Request)]
    own = [one for one in chosen if one is not None and one.fits(model)]
    default = [options] if None in chosen or not own else []
    synthesizer = Synthesizer(model, slots_for(len(read), batch_size), [*default, *own])
    yield from speak_each(synthesizer, SpeechSession, read, options, progress)


def _is_list(value: object) -> bool:
    """Tell whether a value is several voices or options, and not a name, a file or an array."""
    return isinstance(value, Iterable) and not (isinstance(value, str | os.PathLike) or hasattr(value, "__array__"))


def requests_of(texts: Sequence[Text], alone: bool, voice: Any, options: Any) -> list[Request | SpeechError]:
    """Return the requests of texts; of a text that cannot be read, the error.

    Args:
      texts: one text or several.
      alone: whether one text was given, and not a list of one.
      voice: one for all texts, or a list, one each.
      options: one for all texts, or a list, one each; None leaves them open.

    Raises:
      ConfigError: not as many voices or options as texts.
    """
    if alone:
        if isinstance(options, Sequence):
            raise ConfigError("one text has a list of options; give one SynthesizeOptions, or a list of texts")
        if _is_list(voice):
            raise ConfigError("one text has a list of voices; give one voice, or a Dialogue whose turns have their own")
        return [read_or_error(Request.of, texts[0], voice, options)]
    voices = list(voice) if _is_list(voice) else [voice] * len(texts)
    each = list(options) if isinstance(options, Sequence) else [options] * len(texts)
    check_one_each(len(texts), "texts", voices=voices, options=each)
    return [read_or_error(Request.of, *request) for request in zip(texts, voices, each, strict=True)]
