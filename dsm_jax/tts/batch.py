"""Whole texts to speech, any number of them, a batch at a time."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import DsmError, SpeechError
from dsm_jax.tts.speech import Request, Speech, SpeechOptions
from dsm_jax.tts.synthesizer import Prepared, Row, Synthesizer
from dsm_jax.tts.voices import Voice

Progress = Callable[[float], None]  # how many seconds of the batch's longest speech there are
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
    """Says several texts, `batch_size` at a time, and yields what came of each, with its place in `requests`.

    A request that cannot be said yields its error, and the others go on. Each gives what it gives alone.
    """
    # Few requests take a power of two: so that different numbers of them share a compilation.
    rows = max(1, min(batch_size, 1 << max(0, len(requests) - 1).bit_length()))
    synthesizer = Synthesizer(model, rows, options)
    batch: list[tuple[int, Prepared]] = []
    for index, request in enumerate(requests):
        try:
            prepared = synthesizer.prepare(request)
        except DsmError as error:
            yield index, error
            continue
        # Voices of other lengths are another shape, so they wait for a batch of their own.
        if batch and _lengths(prepared) != _lengths(batch[0][1]):
            yield from _say(synthesizer, batch, progress)
            batch = []
        batch.append((index, prepared))
        if len(batch) == rows:
            yield from _say(synthesizer, batch, progress)
            batch = []
    if batch:
        yield from _say(synthesizer, batch, progress)


def _voices(speaker: Voice | Sequence[Voice] | None) -> tuple[Voice, ...]:
    if speaker is None:
        return ()
    return (speaker,) if isinstance(speaker, (str, os.PathLike, np.ndarray)) else tuple(speaker)


def _lengths(prepared: Prepared) -> set[int]:
    return {len(voice) for voice in prepared.voices}


def _say(
    synthesizer: Synthesizer, batch: Sequence[tuple[int, Prepared]], progress: Progress | None
) -> Iterator[Result]:
    """Speaks a batch to its end."""
    model, most = synthesizer.model, synthesizer.options.max_frames
    synthesizer.begin([prepared for _, prepared in batch])
    rows = [Row(prepared) for _, prepared in batch]
    steps, heard = 0, np.zeros(len(rows), int)
    while steps < most and (made := synthesizer.advance(most - steps)).count:
        steps += int(made.count)
        heard += [row.hear(made, place).size for place, row in enumerate(rows)]
        if progress is not None:
            progress(float(heard.max()) / model.sample_rate)
    running_B = synthesizer.running_B
    for place, ((index, prepared), row) in enumerate(zip(batch, rows, strict=True)):
        result: Speech | DsmError = row.speech(model, synthesizer.how.codebooks)
        if running_B[place]:
            result = SpeechError(
                f"the text was not said to its end in {most} frames: {len(row.taken)} of its {len(prepared.entries)} "
                "words and breaks were; allow more with max_frames, or cut the text"
            )
        yield index, result
