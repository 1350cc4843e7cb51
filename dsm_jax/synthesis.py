"""Speech from text by any model that speaks: the family of the model decides which program says it.

Shape letters: T samples.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from dsm_jax import csm, tts
from dsm_jax.checkpoints import Model
from dsm_jax.csm import CsmOptions, Segment
from dsm_jax.csm import batch as csm_batch
from dsm_jax.csm.requests import is_several
from dsm_jax.csm.requests import requests_of as csm_requests
from dsm_jax.errors import BatchError, ConfigError, DsmError, SpeechError
from dsm_jax.models.family import require
from dsm_jax.options import check_functions, check_options
from dsm_jax.progress import ProgressCallback
from dsm_jax.speech import IncompleteSpeechError, Speech
from dsm_jax.tts import Dialogue, SynthesizeOptions
from dsm_jax.tts import batch as tts_batch
from dsm_jax.tts import live as tts_live
from dsm_jax.tts.voices import Voice

Message = Mapping[str, Any]
Text = str | Dialogue | Sequence[Message] | tts.Request | csm.Request
Options = SynthesizeOptions | CsmOptions
Watermark = Callable[[np.ndarray, int], np.ndarray]


@overload
def synthesize(
    model: Model,
    text: Text,
    *,
    voice: Voice | None = None,
    speaker: int | None = None,
    context: Sequence[Segment] | None = None,
    options: Options | None = None,
    batch_size: int = ...,
    watermark: Watermark | None = ...,
    progress: ProgressCallback | None = ...,
) -> Speech: ...


@overload
def synthesize(
    model: Model,
    text: Iterable[Text],
    *,
    voice: Voice | Sequence[Voice] | None = None,
    speaker: int | Sequence[int] | None = None,
    context: Sequence[Segment] | Sequence[Sequence[Segment]] | None = None,
    options: Options | Sequence[Options] | None = None,
    batch_size: int = ...,
    watermark: Watermark | None = ...,
    progress: ProgressCallback | None = ...,
) -> list[Speech]: ...


def synthesize(
    model: Model,
    text: Text | Iterable[Text],
    *,
    voice: Any = None,
    speaker: Any = None,
    context: Any = None,
    options: Any = None,
    batch_size: int = 8,
    watermark: Watermark | None = None,
    progress: ProgressCallback | None = None,
) -> Speech | list[Speech]:
    """Turn text into speech.

    Args:
      model: a text-to-speech or a conversational speech model, from `dsm_jax.load`.
      text: a text; or a list or another iterable of texts, spoken together. For text-to-speech a text may be a
        `Dialogue` between two speakers, and `<break time="0.5s"/>` in it is a pause. For conversational speech it may
        be a conversation in the published chat format, a list of messages, of which the last is spoken.
      voice: for text-to-speech, of the speaker: the name of a published voice or of one of the model's own, a file, or
        an array, see `tts.voices.read_voice`; for several texts, one for all or a list, one each. For a model without
        speaker conditioning, a recording to go on from.
      speaker: for conversational speech, number of the speaker, from 0; for several texts, one for all or a list.
      context: for conversational speech, the turns before the text, oldest first, from which the model takes the
        voices; for several texts, one context for all or a list of them. Get the consent of the speakers.
      options: of the synthesis, `SynthesizeOptions` or `CsmOptions`; for several texts, one for all or a list.
      batch_size: at most how many texts at a time. Each gives what it gives alone.
      watermark: maps the samples [T] of a speech and their rate in Hz to marked samples [T]; None marks nothing.
      progress: called with the seconds of each speech that were made so far.

    Returns:
      The speech; for several texts, a list in the same order.

    Raises:
      AudioError: a recording of the context, or one to go on from, that cannot be read.
      BatchError: some of several texts cannot be said; it carries the speeches of the others.
      CheckpointError: a voice cannot be read.
      ConfigError: an option or an argument that does not fit the model, or not as many of them as texts.
      IncompleteSpeechError: the text was not said to its end within `max_frames`; it carries the part that was.
      ModelKindError: the model does not speak.
      SpeechError: text that cannot be said, or voices or a context that the model cannot take.
    """
    alone = _is_one(text)
    texts: list[Any] = [text] if alone else list(text)  # pyright: ignore[reportArgumentType]
    requests = _requests(model, texts, alone, voice, speaker, context, options)
    results: list[Speech | None] = [None] * len(requests)
    errors: dict[int, DsmError] = {}
    each = synthesize_each(model, requests, batch_size=batch_size, watermark=watermark, progress=progress)
    for index, result in each:
        if isinstance(result, Speech):
            results[index] = result
        elif alone:
            raise result
        else:
            errors[index] = result
    if errors:
        raise BatchError(results, errors)
    return results[0] if alone else results  # pyright: ignore[reportReturnType]  all are filled


def synthesize_each(
    model: Model,
    requests: Sequence[Text | DsmError],
    *,
    options: Options | None = None,
    batch_size: int = 8,
    watermark: Watermark | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[int, Speech | DsmError]]:
    """Say several texts, `batch_size` at a time, and yield each as it ends, with its place in `requests`.

    A finished text's slot takes the next one while the others speak. A request that cannot be said yields its error,
    and the others go on. Each gives what it gives alone.

    Args:
      model: a text-to-speech or a conversational speech model, from `dsm_jax.load`.
      requests: texts as for `synthesize`, or a `Request` of the model's family with voices, context and options of its
        own.
      options: of requests that have none.
      batch_size: at most how many texts at a time.
      watermark: as for `synthesize`.
      progress: called with the seconds of each speech that were made so far.
    """
    _check_watermark(watermark)
    check_functions(progress=progress)
    if _is_conversational(model):
        read = [one if isinstance(one, DsmError) else csm_requests([one], None, None, None)[0] for one in requests]
        own = _options(model, CsmOptions, options)
        results = csm_batch.synthesize_each(model, read, options=own, batch_size=batch_size, progress=progress)
    else:
        own = _options(model, SynthesizeOptions, options)
        asked: list[Any] = list(requests)
        results = tts_batch.synthesize_each(model, asked, options=own, batch_size=batch_size, progress=progress)
    for index, result in results:
        yield index, result if watermark is None else _marked_or_error(result, watermark)


def synthesize_stream(
    model: Model,
    text: Text | Iterable[str],
    *,
    voice: Voice | None = None,
    speaker: int | None = None,
    context: Sequence[Segment] | None = None,
    options: Options | None = None,
    watermark: Watermark | None = None,
) -> Iterator[np.ndarray]:
    """Say a text, and yield its sound as it is made; all sound joined is that of `synthesize`.

    A text-to-speech model says the text while it arrives. A conversational speech model starts when the text is whole.

    Args:
      model: a text-to-speech or a conversational speech model, from `dsm_jax.load`.
      text: one turn, or pieces of it of any size: words need not be whole; for conversational speech also a
        conversation in the published chat format.
      voice: as for `synthesize`.
      speaker: as for `synthesize`.
      context: as for `synthesize`.
      options: as for `synthesize`.
      watermark: as for `synthesize`, called with each piece of sound.

    Yields:
      float32 samples [T], whole frames of 80 ms, as they are made.

    Raises:
      As `synthesize`; an error in the text is raised once the text before it has been said.
    """
    _check_watermark(watermark)
    if _is_conversational(model):
        (request,) = _requests(model, [_whole(text)], True, voice, speaker, context, None)
        if isinstance(request, DsmError):
            raise request
        sound = csm_batch.synthesize_stream(model, request, options=_options(model, CsmOptions, options))
    else:
        _refuse(model, speaker=speaker, context=context)
        own = _options(model, SynthesizeOptions, options)
        sound = tts_live.synthesize_stream(model, _pieces(text), voice=voice, options=own)
    try:
        for pcm_T in sound:
            yield pcm_T if watermark is None else _mark(pcm_T, model.sample_rate, watermark)
    except IncompleteSpeechError as error:
        if watermark is not None:
            _marked(error, watermark)
        raise


def _is_conversational(model: Model) -> bool:
    """Tell a conversational speech model from a text-to-speech model.

    Raises:
      ModelKindError: the model is neither.
    """
    if model.config.model_type == "csm":
        return True
    require(model, "tts")
    return False


def _is_one(text: object) -> bool:
    """Tell whether a value is one text, and not several."""
    if isinstance(text, str | Dialogue | tts.Request | csm.Request):
        return True
    if isinstance(text, bytes | Mapping) or not isinstance(text, Iterable):
        return True  # no text, which its reader says better than a reader of its items would
    return isinstance(text, Sequence) and len(text) > 0 and all(isinstance(message, Mapping) for message in text)


def _whole(text: Any) -> Any:
    """Join the pieces of a text."""
    return text if _is_one(text) else "".join(_pieces(text))


def _pieces(text: Any) -> Iterator[str]:
    """Yield the pieces of a text that arrives.

    Raises:
      SpeechError: a piece is no str.
    """
    for piece in [text] if _is_one(text) else text:
        if not isinstance(piece, str):
            kind = type(piece).__name__
            raise SpeechError(
                f"the text of a stream has a value of type {kind}; expected one text: a str, or pieces of it"
            )
        yield piece


def _requests(
    model: Model, texts: list[Any], alone: bool, voice: Any, speaker: Any, context: Any, options: Any
) -> list[Any]:
    """Return the requests of texts for the model's family."""
    if _is_conversational(model):
        _refuse(model, voice=voice)
        _check_options(model, CsmOptions, options)
        if alone and (is_several(speaker) or isinstance(options, Sequence)):
            raise ConfigError("one text has a list of speakers or options; give one of each, or a list of texts")
        return list(csm_requests(texts, speaker, context, options))
    _refuse(model, speaker=speaker, context=context)
    _check_options(model, SynthesizeOptions, options)
    return list(tts_batch.requests_of(texts, alone, voice, options))


def _refuse(model: Model, **arguments: Any) -> None:
    """Refuse arguments that the model's family does not take."""
    for name, value in arguments.items():
        if value is not None:
            instead = "voice" if name in ("speaker", "context") else "context, in which the speaker is heard"
            raise ConfigError(f"{name} was given, which {model.name} does not take; give {instead}")


def _check_options(model: Model, kind: type, options: Any) -> None:
    """Check the class of options.

    Raises:
      ConfigError: options of another family.
    """
    each = options if isinstance(options, Sequence) else [options]
    check_options(model.name, [one for one in each if one is not None], kind)


def _options(model: Model, kind: type, options: Any) -> Any:
    """Return the options, or the family's own where there are none."""
    if isinstance(options, Sequence):
        raise ConfigError("the options are a list; give one, or requests that have their own")
    _check_options(model, kind, options)
    return kind() if options is None else options


def _check_watermark(watermark: object) -> None:
    """Refuse a watermark that cannot be called.

    Raises:
      ConfigError: it is another object.
    """
    if watermark is not None and not callable(watermark):
        raise ConfigError(f"the watermark is {watermark!r}; expected a function of samples and their rate")


def _mark(pcm_T: np.ndarray, sample_rate: int, watermark: Watermark) -> np.ndarray:
    """Return marked samples.

    Raises:
      SpeechError: the watermark has changed their number, or returned no samples.
    """
    marked = watermark(pcm_T, sample_rate)
    try:
        marked_T = np.asarray(marked, np.float32)
    except (TypeError, ValueError):
        kind = type(marked).__name__
        raise SpeechError(f"the watermark made {kind} of {pcm_T.size} samples; return as many") from None
    if marked_T.shape != pcm_T.shape:
        raise SpeechError(f"the watermark made {list(marked_T.shape)} of {list(pcm_T.shape)} samples; return as many")
    return marked_T


def _marked_or_error(result: Speech | DsmError, watermark: Watermark) -> Speech | DsmError:
    """Mark the sound of one result of several; return the error where the watermark does not fit it."""
    try:
        return _marked(result, watermark)
    except SpeechError as error:
        return error


def _marked(result: Speech | DsmError, watermark: Watermark) -> Speech | DsmError:
    """Mark the sound of a result, that of an incomplete speech too."""
    if isinstance(result, IncompleteSpeechError):
        result.speech = _marked_speech(result.speech, watermark)
    return _marked_speech(result, watermark) if isinstance(result, Speech) else result


def _marked_speech(speech: Speech, watermark: Watermark) -> Speech:
    return dataclasses.replace(speech, pcm=_mark(speech.pcm, speech.sample_rate, watermark))
