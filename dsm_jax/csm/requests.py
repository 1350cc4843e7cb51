"""Requests to a conversational speech model: the turns of a conversation, and the published chat format.

Shape letters: Q codebooks, T frames or samples.
"""

import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsm_jax import audio as sound
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.prompt import SPEAKER_DIGITS, is_whole
from dsm_jax.errors import ConfigError, SpeechError
from dsm_jax.options import check_one_each
from dsm_jax.speaking import read_or_error

_FORMAT = '{"role": "0", "content": [{"type": "text", "text": TEXT}, {"type": "audio", "path": FILE}]}'
_ROLE = re.compile(rf"0|[1-9][0-9]{{,{SPEAKER_DIGITS - 1}}}")
_AUDIO_KEYS = ("path", "audio", "array", "url")


@dataclass(frozen=True, eq=False)  # arrays cannot be compared as one
class Segment:
    """A turn of a conversation that has been spoken: the context from which the model takes voices.

    Attributes:
      text: the words of the recording, as exactly as they are known.
      speaker: number of the speaker, from 0.
      audio: the recording: a path, an open file, an array at the model's rate, or `dsm_jax.Recorded` samples; a
        `Speech` of the same model is taken as it is, without encoding it again.
    """

    text: str
    speaker: int = 0
    audio: sound.Source | None = None


def turns_of(context: Any) -> tuple[Any, ...]:
    """Return the turns of a context, which may be any iterable.

    Raises:
      SpeechError: the context is one turn, or no iterable.
    """
    if isinstance(context, Segment):
        raise SpeechError("the context is one Segment; give a list of them")
    if not isinstance(context, Iterable):
        raise SpeechError(f"the context is {context!r}; expected a list of dsm_jax.csm.Segment(text, speaker, audio)")
    return tuple(context)


@dataclass(frozen=True, eq=False)
class Request:
    """A text to say in a conversation, as the runtime reads it.

    Attributes:
      text: of the turn to speak.
      speaker: number of its speaker, from 0.
      context: the turns before it, oldest first.
      options: of its synthesis; None takes those that are given for all requests.
    """

    text: str
    speaker: int = 0
    context: Sequence[Segment] = ()
    options: CsmOptions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", turns_of(self.context))
        for segment in self.context:
            if not isinstance(segment, Segment):
                kind = f"{type(segment).__module__}.{type(segment).__name__}"
                raise SpeechError(f"the context holds a {kind}; expected dsm_jax.csm.Segment(text, speaker, audio)")

    @classmethod
    def of_messages(cls, messages: Sequence[Mapping[str, Any]], options: CsmOptions | None = None) -> "Request":
        """Make the request for a conversation in the published chat format.

        Args:
          messages: a message for each turn: its speaker's number as a string in `role`, and in `content` a list of one
            text and one recording, as a `path`, an `audio` or an `array`; the last message has a text alone.
          options: of the synthesis.

        Raises:
          SpeechError: the messages have another form.
        """
        if not messages:
            raise SpeechError(f"the conversation has no messages; expected one or more like {_FORMAT}")
        turns = [segment_of(message, number) for number, message in enumerate(messages, 1)]
        *context, last = turns
        for number, turn in enumerate(context, 1):
            if turn.audio is None:
                raise SpeechError(f"message {number} has no audio; every message but the last one needs its recording")
        if last.audio is not None:
            raise SpeechError(
                f"the last message, {last.text!r}, has audio; it is the one to speak: leave its audio out, or add a "
                "message with the text to speak"
            )
        return cls(last.text, last.speaker, context, options)


def segment_of(message: object, number: int) -> Segment:
    """Read one message of the published chat format.

    Args:
      message: as for `Request.of_messages`.
      number: place of the message in its conversation, from 1, for errors.

    Raises:
      SpeechError: the message has another form.
    """
    where = f"message {number}"
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise SpeechError(f"{where} has {found}; expected a message like {_FORMAT}")
    role, content = message["role"], message["content"]
    # The published template writes a role as it stands, which a number does not keep of "00" or of other digits.
    numbered = isinstance(role, str) and _ROLE.fullmatch(role) is not None
    if not numbered and not is_whole(role):
        found = reprlib.repr(role)
        raise SpeechError(f"{where} has the role {found}; expected the number of a speaker, such as '0'")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise SpeechError(f"{where} has the content {content!r}; expected a list of objects, as in {_FORMAT}")
    parts: dict[str, list[Any]] = {"text": [], "audio": []}
    for part in content:
        if not isinstance(kind := part.get("type"), str) or kind not in parts:
            raise SpeechError(f"{where} has a part of type {kind!r}; expected 'text' or 'audio'")
        parts[kind].append(_text(part, where) if kind == "text" else _audio(part, where))
    texts, recordings = parts["text"], parts["audio"]
    if len(texts) != 1 or len(recordings) > 1:
        raise SpeechError(
            f"{where} has {len(texts)} texts and {len(recordings)} recordings; expected one text, and one recording "
            "at most"
        )
    return Segment(texts[0], int(role), recordings[0] if recordings else None)


def _text(part: Mapping[str, Any], where: str) -> str:
    """Return the text of a message."""
    text = part.get("text")
    if not isinstance(text, str):
        raise SpeechError(f"{where} has the text {reprlib.repr(text)}; expected words")
    return text


def _audio(part: Mapping[str, Any], where: str) -> Any:
    """Return the recording of a message."""
    keys = [key for key in _AUDIO_KEYS if key in part]
    if len(keys) != 1:
        raise SpeechError(f"{where} has audio with {sorted(part)}; expected one of {', '.join(_AUDIO_KEYS[:3])}")
    value = part[keys[0]]
    if isinstance(value, str) and "://" in value:
        raise SpeechError(f"{where} names the address {value}; download it, and give the file")
    rate = part.get("sampling_rate")
    if isinstance(value, Mapping):  # as data sets hold recordings
        if not {"array", "sampling_rate"} <= value.keys():
            raise SpeechError(f"{where} has audio with {sorted(value)}; expected array and sampling_rate")
        value, rate = value["array"], value["sampling_rate"]
    if isinstance(value, list | tuple):
        try:
            value = np.asarray(value, np.float32)
        except (TypeError, ValueError, OverflowError):
            raise SpeechError(f"{where} has audio that is a list of other things than numbers; give samples") from None
    if rate is None:
        return value
    if isinstance(value, str | os.PathLike) or hasattr(value, "read"):
        raise SpeechError(f"{where} has a sampling_rate beside a file, which has its own; leave the sampling_rate out")
    if not isinstance(rate, int | float | np.number) or not 0 < rate < math.inf:
        raise SpeechError(f"{where} has audio with the sampling_rate {rate!r}; expected a number of Hz")
    return sound.Recorded(value, int(rate))


def is_several(value: object) -> bool:
    """Tell whether a value is several speakers or turns, and not one of them."""
    return isinstance(value, Iterable) and not isinstance(value, str | Mapping) and getattr(value, "ndim", 1) > 0


def requests_of(
    texts: Sequence[Any],
    speaker: Any,
    context: Any,
    options: CsmOptions | Sequence[CsmOptions] | None,
) -> list[Request | SpeechError]:
    """Return the requests of several texts; of a text or a conversation that cannot be read, the error.

    Args:
      texts: strings, conversations in the chat format, and `Request`s.
      speaker: one for all, or several, one each; None is 0.
      context: segments for all, or a list of several or None, one each.
      options: one for all, or a list, one each.

    Raises:
      ConfigError: not as many speakers, contexts or options as texts.
    """
    count = len(texts)
    given = list(context) if isinstance(context, Iterable) else context
    ragged = isinstance(given, list) and any(one is None or is_several(one) for one in given)
    speakers: list[Any] = list(speaker) if is_several(speaker) else [speaker] * count
    contexts: list[Any] = given if ragged else [given] * count
    each = list(options) if isinstance(options, Sequence) else [options] * count
    check_one_each(count, "texts", speakers=speakers, contexts=contexts, options=each)
    return [read_or_error(_request, *one) for one in zip(texts, speakers, contexts, each, strict=True)]


def _request(text: Any, speaker: int | None, context: Sequence[Segment] | None, options: CsmOptions | None) -> Request:
    if isinstance(text, str):
        return Request(text, 0 if speaker is None else speaker, () if context is None else context, options)
    if speaker is not None or context is not None:
        raise ConfigError("a speaker or a context was given beside a conversation that has its own; give them once")
    if isinstance(text, Request):
        return text if text.options is not None else Request(text.text, text.speaker, text.context, options)
    if isinstance(text, Sequence) and not isinstance(text, bytes):
        return Request.of_messages(text, options)
    if isinstance(text, Mapping):
        raise SpeechError("the text is one message of a conversation; give the conversation, a list of its messages")
    raise SpeechError(f"the text is {type(text).__name__}; expected a str, a conversation, or several of these")
