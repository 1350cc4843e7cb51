"""Items of a realtime session: which words belong to which, and where a turn ends.

An item ends in one of three ways. The client commits it: the model is given silence of its own until the last text is
out. Or the model predicts a pause, and the same is done. Or the silence that ends a turn has been heard, and the text
of all audio before it is known: the item is complete at once then, and the model is not disturbed.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from dsm_jax.serving.hearing import Heard
from dsm_jax.serving.openai.errors import ApiError
from dsm_jax.serving.openai.formats import WordDeltas, logprobs, usage
from dsm_jax.serving.openai.realtime_settings import TurnDetection
from dsm_jax.stt.events import Word, WordEnded, WordStarted

LIVE_S = 0.5  # of audio that waits, up to which the pause that the model hears is the client's present one
_TRANSCRIPTION = "conversation.item.input_audio_transcription"

Events = list[dict[str, Any]]


@dataclasses.dataclass
class Item:
    """A stretch of the client's audio and its words.

    Attributes:
      start: seconds of the client's audio at which it begins.
      end: seconds at which it ends; None while it is open.
      is_dropped: whether the client has cleared it: nothing of it is told.
      has_speech: whether a word of it has begun, and the client was told so where the server detects turns.
    """

    start: float
    end: float | None = None
    is_dropped: bool = False
    has_speech: bool = False
    id: str = dataclasses.field(default_factory=lambda: f"item_{os.urandom(10).hex()}")
    deltas: WordDeltas = dataclasses.field(default_factory=WordDeltas)
    words: list[Word] = dataclasses.field(default_factory=list)


class Items:
    """The items of a session. All methods return events for the client, in order.

    Args:
      mark: called with a number when all audio received so far is to be transcribed; `marked` is the answer.
      delay_s: by which the text is late, seconds.

    Attributes:
      turns: rule by which turns end; None where the client ends them.
      with_logprobs: whether probabilities are told.
    """

    def __init__(self, mark: Callable[[int], None], delay_s: float):
        self.turns: TurnDetection | None = None
        self.with_logprobs = False
        self._mark, self._delay_s = mark, delay_s
        self._marks = 0
        self._waiting: deque[Item] = deque()  # for their marks
        self._open = Item(0.0)
        self._last_id: str | None = None
        self._pause: float | None = None  # at which a turn ends, once the text up to it is known

    def commit(self, received_s: float) -> Events:
        """End the open item where its client says so.

        Args:
          received_s: seconds of audio that the client has sent.

        Raises:
          ApiError: there is no audio in it.
        """
        if received_s <= self._open.start:
            raise ApiError(
                "the input audio buffer is empty: nothing was appended since the last commit; append audio first",
                code="input_audio_buffer_commit_empty",
            )
        return self._end(received_s, flush=True)

    def clear(self, received_s: float) -> Events:
        """Drop the open item."""
        if received_s > self._open.start:
            self._open.is_dropped = True
            self._end(received_s, flush=True)
        return [{"type": "input_audio_buffer.cleared"}]

    def word(self, event: WordStarted | WordEnded) -> Events:
        """Add a word to the item that it belongs to."""
        events: Events = []
        item = self._waiting[0] if self._waiting else self._open
        if not item.has_speech and item is self._open:
            item.has_speech = True
            if self.turns is not None:
                start = event.start if isinstance(event, WordStarted) else event.word.start
                padding = 0 if self.turns.is_semantic else self.turns.prefix_padding_ms / 1000
                events.append(_speech("started", item, "audio_start_ms", max(item.start, start - padding)))
        if isinstance(event, WordEnded):
            item.words.append(event.word)
        delta = item.deltas.add(event)
        if delta and not item.is_dropped:
            told = {"type": f"{_TRANSCRIPTION}.delta", "item_id": item.id, "content_index": 0, "delta": delta}
            if self.with_logprobs and isinstance(event, WordEnded):
                told["logprobs"] = logprobs([event.word])
            events.append(told)
        return events

    def heard(self, frame: Heard, rate: int) -> Events:
        """End the open item if a turn has ended with a frame.

        Args:
          frame: of the client's audio.
          rate: of the model's audio, Hz.
        """
        item, turns = self._open, self.turns
        if turns is None or self._waiting or not item.has_speech:
            return []
        known = frame.seconds - self._delay_s  # the text of all audio up to here is out
        if frame.pauses and frame.pauses[turns.head] > turns.pause_probability:
            if frame.buffered <= LIVE_S * rate:
                end = frame.seconds + frame.buffered / rate
                return [_speech("stopped", item, "audio_end_ms", end), *self._end(end, flush=True)]
            self._pause = self._pause or frame.seconds
        if item.deltas.in_word or not item.words:
            return []
        silent = item.words[-1].end + turns.silence_s
        end = silent if self._pause is None else min(silent, max(self._pause, item.words[-1].end))
        if known < end:
            return []
        return [_speech("stopped", item, "audio_end_ms", end), *self._end(end, flush=False)]

    def marked(self) -> Events:
        """Complete the item whose mark was answered: the oldest one that waits."""
        return self._completed(self._waiting.popleft())

    def finish(self) -> Events:
        """Complete all items, the open one if it has words."""
        events: Events = []
        while self._waiting:
            events += self.marked()
        if self._open.words:
            events += self._end(self._open.words[-1].end, flush=False)
        return events

    def _end(self, end: float, *, flush: bool) -> Events:
        """End the open item and begin the next."""
        item, self._open = self._open, Item(end)
        item.end, self._pause = end, None
        events: Events = []
        if not item.is_dropped:
            events.append(
                {"type": "input_audio_buffer.committed", "item_id": item.id, "previous_item_id": self._last_id}
            )
            self._last_id = item.id
        if not flush:
            return [*events, *self._completed(item)]
        self._waiting.append(item)
        self._marks += 1
        self._mark(self._marks)
        return events

    def _completed(self, item: Item) -> Events:
        if item.is_dropped:
            return []
        assert item.end is not None
        told = {
            "type": f"{_TRANSCRIPTION}.completed",
            "item_id": item.id,
            "content_index": 0,
            "transcript": item.deltas.text,
            "usage": usage(item.end - item.start),
        }
        if self.with_logprobs:
            told["logprobs"] = logprobs(item.words)
        return [told]


def _speech(what: str, item: Item, name: str, seconds: float) -> dict[str, Any]:
    return {"type": f"input_audio_buffer.speech_{what}", "item_id": item.id, name: round(seconds * 1000)}
