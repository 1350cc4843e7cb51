"""Answers of OpenAI's dialect: transcripts in each format, and events of streams."""

import math
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any

from starlette.responses import PlainTextResponse, Response

from dsm_jax.serving.openai.errors import json_bytes, json_response
from dsm_jax.stt.events import Word, WordEnded, WordStarted
from dsm_jax.stt.transcript import Segment, Transcript

UNKNOWN_LANGUAGE = "und"  # ISO 639's code for a language that nobody has told


class WordDeltas:
    """Make the text that a stream adds for each event, so that all of it joins to the words with a space between them.

    The first word that has begun is told at once, and the rest of it when it has ended; words that begin before that
    wait, as nothing can be put in before text that has left.
    """

    def __init__(self) -> None:
        self.text = ""  # of all deltas
        self._open: deque[str] = deque()  # words that have begun and not ended
        self._told = ""  # of the first of them

    @property
    def in_word(self) -> bool:
        """True while a word has begun that has not ended."""
        return bool(self._open)

    def add(self, event: WordStarted | WordEnded) -> str:
        """Return the new text; empty for none."""
        delta = ""
        if isinstance(event, WordStarted):
            self._open.append(event.text)
        else:
            if self._open:
                self._open.popleft()
            delta = self._more(event.word.text)
            self._told = ""
        if self._open and not self._told:
            delta += self._more(self._open[0])
        return delta

    def _more(self, word: str) -> str:
        """Return what a word adds to what was told of it."""
        if not self._told:
            new = f" {word}" if self.text else word
        else:
            new = word.removeprefix(self._told) if word.startswith(self._told) else ""
        self._told = word
        self.text += new
        return new


def logprobs(words: Sequence[Word]) -> list[dict[str, Any]]:
    """Return the words with the logarithms of their probabilities."""
    return [
        {"token": word.text, "bytes": list(word.text.encode()), "logprob": round(_log(word.probability), 4)}
        for word in words
    ]


def _log(probability: float) -> float:
    return math.log(max(probability, 1e-10))


def usage(seconds: float) -> dict[str, Any]:
    """Return what a transcription counts as."""
    return {"type": "duration", "seconds": round(seconds, 3)}


def transcript_response(
    transcript: Transcript,
    format: str,
    *,
    granularities: Sequence[str],
    with_logprobs: bool,
    language: str | None,
    temperature: float,
) -> Response:
    """Return a transcript in one of the formats.

    Args:
      transcript: to be sent.
      format: "json", "text", "srt", "vtt" or "verbose_json".
      granularities: of verbose_json: "word", "segment" or both.
      with_logprobs: add the words' probabilities to json.
      language: of the recording, as far as it is known.
      temperature: of the sampling.
    """
    match format:
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case "srt":
            return Response(transcript.to_srt(), media_type="application/x-subrip; charset=utf-8")
        case "vtt":
            return Response(transcript.to_vtt(), media_type="text/vtt")
        case "json":
            content: dict[str, Any] = {"text": transcript.text}
            if with_logprobs:
                content["logprobs"] = logprobs(transcript.words)
        case _:
            content = {
                "task": "transcribe",
                "language": language or UNKNOWN_LANGUAGE,
                "duration": round(transcript.duration, 3),
                "text": transcript.text,
            }
            if "word" in granularities:
                content["words"] = [
                    {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3),
                     "probability": round(word.probability, 4)}  # OpenAI's words have none, other servers' do
                    for word in transcript.words
                ]  # fmt: skip
            if "segment" in granularities:
                content["segments"] = _segments(transcript, temperature)
    return json_response(content | {"usage": usage(transcript.duration)})


def _segments(transcript: Transcript, temperature: float) -> list[dict[str, Any]]:
    """Return the segments with all fields that clients require; those that this model has no figure for are 0."""
    left = deque(word for word in transcript.words if word.text.strip())
    return [_segment(number, segment, left, temperature) for number, segment in enumerate(transcript.segments)]


def _segment(number: int, segment: Segment, left: deque[Word], temperature: float) -> dict[str, Any]:
    """Return one segment; its words are taken off the front of those that are left."""
    sure, length = [], 0
    while left and length < len(segment.text):
        word = left.popleft()
        sure.append(_log(word.probability))
        length += len(" ".join(word.text.split())) + 1
    text = segment.text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": [],
        "temperature": temperature,
        "avg_logprob": round(sum(sure) / len(sure), 4) if sure else 0.0,
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 4),
        "no_speech_prob": 0.0,
    }


def server_event(content: Any) -> bytes:
    """Return one event of a stream of server-sent events."""
    return b"data: " + json_bytes(content) + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"
