"""Whole texts to speech, any number of them: clients of the slots that they share."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import DsmError
from dsm_jax.tts.speech import Request, Speech, SpeechOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer
from dsm_jax.tts.voices import Voice

Progress = Callable[[float], None]  # how many seconds of speech there are, of all requests
Result = tuple[int, Speech | DsmError]  # the place of a request, and what came of it


def synthesize(
    model: Model,
    text: str | Sequence[str],
    *,
    speaker: Voice | Sequence[Voice] | None = None,
    options: SpeechOptions = SpeechOptions(),
    progress: Progress | None = None,
) -> Speech:
    """Says a text.

    Args:
      model: a text-to-speech model, from `dsm_jax.load`.
      text: one turn; or the turns of a conversation between two speakers, an empty first one if the second begins.
        `<break time="0.5s"/>` is a pause.
      speaker: the voice, or the voices of both speakers: names of published voices, files, or arrays; see
        `voices.read_voice`. For a model without speaker conditioning, a recording to go on from.
      options: how to speak.
      progress: called with the seconds of speech that there are so far.

    Returns:
      The speech, with the times of its words.

    Raises:
      AudioError: a recording to go on from that cannot be read.
      CheckpointError: the model does not speak, or a voice cannot be read.
      SpeechError: text that cannot be said, voices that the model cannot take, or an option out of its range.
    """
    request = Request(text if isinstance(text, str) else tuple(text), _voices(speaker))
    ((_, result),) = synthesize_each(model, [request], options, batch_size=1, progress=progress)
    if isinstance(result, DsmError):
        raise result
    return result


def synthesize_each(
    model: Model,
    requests: Sequence[Request],
    options: SpeechOptions = SpeechOptions(),
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Says several texts, `batch_size` at a time, and yields each as it ends, with its place in `requests`.

    A finished text's slot takes the next one while the others speak. A request that cannot be said yields its error,
    and the others go on. Each gives what it gives alone.

    Args:
      model: a text-to-speech model, from `dsm_jax.load`.
      requests: what to say; each may have options of its own.
      options: of requests that have none.
      batch_size: at most how many texts at a time.
      progress: called with the seconds of speech that there are so far.
    """
    # Few requests take a power of two: so that different numbers of them share a compilation.
    slots = max(1, min(batch_size, 1 << max(0, len(requests) - 1).bit_length()))
    own = [request.options for request in requests if request.options is not None and request.options.fits(model)]
    synthesizer = Synthesizer(model, slots, [options, *own])
    samples = 0

    def heard(new: int) -> None:
        nonlocal samples
        samples += new
        if progress is not None:
            progress(samples / model.sample_rate)

    def session(index: int) -> SpeechSession:
        try:
            prepared = synthesizer.prepare(requests[index], options)
        except DsmError as error:
            return SpeechSession(model, None, error=error, index=index)
        return SpeechSession(model, prepared, index=index, heard=heard)

    # Reading is cheap beside speaking, so all requests are read first: the program then has room for each of them.
    sessions = [session(index) for index in range(len(requests))]
    ready = [one.prepared for one in sessions if one.error is None]
    for done in synthesizer.slots_for(*ready).run(sessions) if ready else sessions:
        yield done.index, done.speech() if done.error is None else done.error


def _voices(speaker: Voice | Sequence[Voice] | None) -> tuple[Voice, ...]:
    if speaker is None:
        return ()
    return (speaker,) if isinstance(speaker, (str, os.PathLike, np.ndarray)) else tuple(speaker)
