"""Read requests of OpenAI's dialect: the form of a transcription and the object of a speech."""

import asyncio
import contextlib
import dataclasses
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from dsm_jax.serving.encoding import CONTENT_TYPES
from dsm_jax.serving.openai.errors import ApiError, invalid_value, parse_object, unknown_model
from dsm_jax.serving.server import Server
from dsm_jax.serving.services import Served
from dsm_jax.serving.uploads import TooLargeError
from dsm_jax.stt.options import Prompt
from dsm_jax.stt.transcriber import Utterance

MAX_FIELDS = 64  # of a form
MAX_FIELD_BYTES = 64 << 10
MAX_OBJECT_BYTES = 256 << 10  # of a speech's object: 4,096 characters take at most 48 KiB, however they are escaped
MAX_INPUT = 4_096  # characters
TRANSCRIPT_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("segment", "word")
SPEEDS = (0.25, 4.0)
_FORM_OVERHEAD = 1 << 20  # bytes of a form around its file
_LANGUAGE = re.compile(r"([a-z]{2,3})(?:[-_][A-Za-z0-9]{2,8})*")
# Kyutai's names alone: the end of another name may mean anything. The number is that of a model served twice.
_NAME_LANGUAGES = re.compile(r"(?:.*/)?stt-[0-9.]+b-((?:en|fr)(?:_(?:en|fr))*)(?:-candle|-mlx|-trfs)?(?:-[0-9]+)?/?")


@dataclasses.dataclass(frozen=True)
class TranscriptionRequest:
    """A transcription that is asked for.

    Attributes:
      served: model.
      file: recording, open.
      format: one of `TRANSCRIPT_FORMATS`.
      granularities: some of `GRANULARITIES`.
      stream: whether the text is sent as it is found.
      with_logprobs: whether the words' probabilities are sent.
      language: of the recording, as far as it is known.
      utterance: options, as the service has read them.
    """

    served: Served
    file: Any
    format: str
    granularities: tuple[str, ...]
    stream: bool
    with_logprobs: bool
    language: str | None
    utterance: Utterance


@dataclasses.dataclass(frozen=True)
class SpeechRequest:
    """A speech that is asked for.

    Attributes:
      served: model.
      input: text.
      voice: name of the voice.
      format: one of `CONTENT_TYPES`.
      as_events: whether the sound is sent as server-sent events.
    """

    served: Served
    input: str
    voice: str
    format: str
    as_events: bool


def find_model(server: Server, kind: str, name: object, param: str = "model") -> Served:
    """Return the model of a kind that a client names.

    Raises:
      ApiError: no name was given, or no model has it.
    """
    if not isinstance(name, str) or not name:
        raise ApiError("no model is named; name one of GET /v1/models", param=param, code="missing_required_parameter")
    if (served := server.find(kind, name)) is None:
        raise unknown_model(name, [served.name for served in server.models if served.kind == kind], param)
    return served


@contextlib.asynccontextmanager
async def transcription_request(request: Request, server: Server) -> AsyncIterator[TranscriptionRequest]:
    """Read a form, and keep its file open while the block runs.

    Raises:
      ApiError: a field with a value that is not supported.
      PromptError: a prompt that the model cannot follow.
      TooLargeError: a larger recording than the server takes.
    """
    form = await _form(request, server.config.max_upload_mb)
    try:
        yield await _transcription(form, server)
    finally:
        _close(form)


async def _form(request: Request, limit_mb: float) -> FormData:
    """Return a form of multipart/form-data whose file lies on the disk if it is large."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError("the body is no multipart/form-data; send the recording as the file of a form", param="file")
    parser = MultiPartParser(
        request.headers,
        _limited(request, limit_mb * 1e6 + _FORM_OVERHEAD, f"the recording is larger than {limit_mb:g} MB"),
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        said = error.message if isinstance(error, MultiPartException) else "it cannot be read"
        raise ApiError(f"the form is refused: {said.rstrip('.')}; send a well-formed form with one file") from None
    file = form.get("file")
    if isinstance(file, UploadFile) and (file.size or 0) > limit_mb * 1e6:
        _close(form)
        raise TooLargeError(f"the recording is larger than {limit_mb:g} MB; send it in parts")
    return form


def _close(form: FormData) -> None:
    """Close a form's files; at once, as a request that its client has left may await nothing more."""
    for value in form.values():
        if isinstance(value, UploadFile):
            value.file.close()


async def _limited(request: Request, limit: float, message: str) -> AsyncGenerator[bytes, None]:
    """Yield a body's pieces up to a limit."""
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise TooLargeError(f"{message}; send it in parts")
        yield piece


async def _transcription(form: FormData, server: Server) -> TranscriptionRequest:
    texts = {name: value for name, value in form.items() if isinstance(value, str)}
    served = find_model(server, "stt", texts.get("model"))
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(
            "there is no recording; send it as the form's file", param="file", code="missing_required_parameter"
        )
    format = texts.get("response_format") or "json"
    if format not in TRANSCRIPT_FORMATS:
        more = "; this model does not tell speakers apart" if format == "diarized_json" else ""
        raise invalid_value("response_format", format, f"one of {', '.join(TRANSCRIPT_FORMATS)}{more}")
    granularities = _granularities(form, format)
    stream = _stream(texts.get("stream", "false"))
    if stream and format not in ("json", "text"):
        raise invalid_value("stream", "true", f"false with the response_format {format}; json and text can be streamed")
    with_logprobs = _include(form, format)
    given = texts.get("languages[]") if texts.get("language") is None else texts.get("language")
    language = check_language(given or None, served, "language")
    prompt = (texts.get("prompt") or "").strip()
    utterance = await read_options(served, prompt=prompt, temperature=_temperature(texts.get("temperature")))
    return TranscriptionRequest(served, file.file, format, granularities, stream, with_logprobs, language, utterance)


async def read_options(served: Served, *, prompt: str = "", temperature: float | None = None) -> Utterance:
    """Return options of a session.

    Args:
      served: a speech-to-text model.
      prompt: text that steers the model; empty for none. It is not part of the transcript.
      temperature: of the sampling; None for the server's own.

    Raises:
      PromptError: a prompt that the model cannot follow.
    """
    options = served.service.options
    if prompt:
        options = dataclasses.replace(options, prompt=Prompt(text=prompt, exclude_from_output=True))
    if temperature is not None:
        options = dataclasses.replace(options, temperature=temperature)
    return await asyncio.to_thread(served.service.read, options)  # the key of the sampling is made on the device


def check_language(language: str | None, served: Served, param: str) -> str | None:
    """Return the language of a recording: the one that is told, or the only one of the model; None if neither is known.

    Raises:
      ApiError: no code of a language, or one that the model does not know.
    """
    found = _NAME_LANGUAGES.fullmatch(served.name)
    known = found[1].split("_") if found else []
    if language is None:
        return known[0] if len(known) == 1 else None
    code = _LANGUAGE.fullmatch(language)
    if code is None:
        raise invalid_value(param, language, "a code of ISO 639 such as en")
    if known and code[1] not in known:
        raise invalid_value(param, language, f"one of {', '.join(known)}, the languages of {served.name}")
    return language


def _granularities(form: FormData, format: str) -> tuple[str, ...]:
    asked = _list(form, "timestamp_granularities")
    for value in asked:
        if value not in GRANULARITIES:
            raise invalid_value("timestamp_granularities", value, "word or segment")
    if asked and format != "verbose_json":
        raise ApiError(
            f"timestamp_granularities are given with the response_format {format}; set it to verbose_json",
            param="timestamp_granularities",
            code="invalid_value",
        )
    return tuple(asked) or ("segment",)


def _include(form: FormData, format: str) -> bool:
    asked = _list(form, "include")
    for value in asked:
        if value != "logprobs":
            raise invalid_value("include", value, "logprobs")
    if asked and format != "json":
        raise invalid_value("include", "logprobs", f"nothing with the response_format {format}; set it to json")
    return bool(asked)


def _list(form: FormData, name: str) -> list[str]:
    """Return the values of a field that may be repeated, with or without brackets behind its name."""
    return [value for key in (f"{name}[]", name) for value in form.getlist(key) if isinstance(value, str)]


def _stream(value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0", ""):
        raise invalid_value("stream", value, "true or false")
    return value.lower() in ("true", "1")


def _temperature(value: str | None) -> float | None:
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise invalid_value("temperature", value, "a number from 0 to 1")
    return number


async def speech_request(request: Request, server: Server) -> SpeechRequest:
    """Read the object of a speech.

    Raises:
      ApiError: a field with a value that is not supported.
    """
    body = bytearray()
    try:
        async for piece in _limited(request, MAX_OBJECT_BYTES, "the body is larger than 256 KiB"):
            body += piece
    except TooLargeError as error:
        raise ApiError(str(error), status=413, param="input") from None
    given = parse_object(bytes(body), "the body")
    served = find_model(server, "tts", given.get("model"))
    text = given.get("input")
    if not isinstance(text, str) or not text.strip():
        raise ApiError("there is no text; give it as input", param="input", code="missing_required_parameter")
    if len(text) > MAX_INPUT:
        raise ApiError(
            f"input has {len(text)} characters; at most {MAX_INPUT} can be said in one request: send it in parts",
            param="input",
            code="string_above_max_length",
        )
    format = given.get("response_format", "mp3")
    if format not in list(CONTENT_TYPES):  # a list, as the value may be of any type
        raise invalid_value("response_format", format, f"one of {', '.join(CONTENT_TYPES)}")
    stream_format = given.get("stream_format", "audio")
    if stream_format not in ("audio", "sse"):
        raise invalid_value("stream_format", stream_format, "audio or sse")
    _check_speed(given.get("speed", 1.0))
    return SpeechRequest(served, text, _voice(given.get("voice"), server, served), format, stream_format == "sse")


def _check_speed(speed: object) -> None:
    if isinstance(speed, bool) or not isinstance(speed, int | float) or not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise invalid_value("speed", speed, f"a number from {SPEEDS[0]} to {SPEEDS[1]:g}")
    if speed != 1:
        raise ApiError(
            f"speed is {speed}, and this model speaks at its own speed, 1; pauses between words are longer with "
            "padding_bonus, an option of the library",
            param="speed",
            code="unsupported_value",
        )


def _voice(voice: object, server: Server, served: Served) -> str:
    """Return the name of a voice, given as itself or as an object with an id."""
    name = voice.get("id") if isinstance(voice, dict) else voice
    if not isinstance(name, str) or not name:
        raise ApiError(
            "no voice is named; name one of GET /v1/audio/voices", param="voice", code="missing_required_parameter"
        )
    name = server.own_name(name)
    if not served.service.knows(name):
        known = ", ".join(served.service.voices) or "none"
        raise invalid_value("voice", name, f"one of {served.name}'s: {known}")
    return name
