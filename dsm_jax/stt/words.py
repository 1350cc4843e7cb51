"""From the text token of each frame to words with times, and back out as events, one frame at a time.

Token 0 (`existing_text_end_padding_id`) is a word boundary; ids up to 3 are never text. A segment is what lies between
two boundaries: usually one word, whose time is the segment's. Of several words in one segment each but the last takes
as many frames as it has tokens, and the last takes the rest. The last segment ends at the end-of-stream token (2), or a
second after it began.

Text before the first boundary is a segment too, and a last word longer than a second keeps all its pieces; the
published script drops both.

Frame i is at i / 12.5 s of the stream, less the delay of the text and the silence and prompt before the audio. Source:
kyutai-labs/delayed-streams-modeling@f6074cb6 scripts/stt_from_file_pytorch.py.
"""

import dataclasses
import math

from dsm_jax.errors import ConfigError
from dsm_jax.stt.transcript import Event, Pause, Word, WordEnded, WordStarted
from dsm_jax.tokenizers import SPACE, Tokenizer

PAUSE_HORIZONS = (0.5, 1.0, 2.0, 3.0)  # seconds, one per extra head


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the frames of a stream lie in the audio."""

    frame_rate: float  # Hz
    text_offset: float  # seconds from the stream's start to the audio's, and the delay of the text behind it
    audio_offset: float  # the first part alone

    def of_text(self, frame: float) -> float:
        """Seconds of audio at which the text of a frame was said; never negative."""
        return max(0.0, frame / self.frame_rate - self.text_offset)

    def heard(self, frame: int) -> float:
        """Seconds of audio heard once a frame has been."""
        return max(0.0, (frame + 1) / self.frame_rate - self.audio_offset)


@dataclasses.dataclass(frozen=True)
class PauseRule:
    """When the model's guess becomes a pause: the head that must say so, and how surely."""

    horizon: float = 2.0  # seconds, one of PAUSE_HORIZONS
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.horizon not in PAUSE_HORIZONS:
            raise ConfigError(f"a pause of {self.horizon} s was asked for; the heads know {PAUSE_HORIZONS} s")


class WordReader:
    """Reads one stream's frames in order and tells the words and the pauses as they come.

    Args:
      tokenizer: of the model.
      timing: where frames lie in the audio.
      padding: the token id that says nothing; ids up to it are never text.
      boundary: the token id between words.
      pauses: when to tell a pause.
      skip: frames at the start whose text is left out: those that answer an audio prompt.
      skip_ids: tokens of a text prompt; the text is left out until all have come.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        timing: Timing,
        *,
        padding: int,
        boundary: int,
        pauses: PauseRule,
        skip: int = 0,
        skip_ids: tuple[int, ...] = (),
    ):
        self.tokenizer, self.timing = tokenizer, timing
        self.padding, self.boundary, self.skip, self.skip_ids = padding, boundary, skip, skip_ids
        self.pause_head, self.threshold = PAUSE_HORIZONS.index(pauses.horizon), pauses.threshold
        self.frame = 0
        self.text_ids: list[int] = []
        self._pieces: list[tuple[int, float]] = []
        self._start: int | None = None
        self._last_piece = 0
        self._end_of_stream: int | None = None
        self._told = 0  # words of the segment whose start has been told
        self._paused = False

    def read(self, token: int, probability: float, pauses: tuple[float, ...] | None = None) -> list[Event]:
        """One frame: its text token, how sure the model was, and the pause heads if there are any."""
        events: list[Event] = []
        frame, self.frame = self.frame, self.frame + 1
        if self.skip_ids:
            self.skip_ids = self.skip_ids[token == self.skip_ids[0] :]
        elif frame >= self.skip:
            if token == self.boundary:
                events += self._close(frame)
                self._start = frame + 1
            elif token > self.padding:
                if self._start is None:
                    self._start = frame
                self._pieces.append((token, probability))
                self.text_ids.append(token)
                self._last_piece = frame
                self._paused = False
            else:
                if token == self.tokenizer.eos_id and self._pieces and self._end_of_stream is None:
                    self._end_of_stream = frame
                events += self._tell_starts()
        heard = (frame + 1) / self.timing.frame_rate > self.timing.audio_offset  # what comes before is not the audio's
        if heard and pauses and pauses[self.pause_head] > self.threshold and not self._paused:
            self._paused = True
            events.append(
                Pause(self.timing.heard(frame), PAUSE_HORIZONS[self.pause_head], float(pauses[self.pause_head]))
            )
        return events

    def finish(self) -> list[Event]:
        """The end of the stream: the last word ends."""
        if self._start is None:
            return []
        end = self._end_of_stream
        if end is None:
            end = min(self.frame, self._start + int(self.timing.frame_rate))
        return self._close(max(end, self._last_piece + 1))

    @property
    def text(self) -> str:
        """All that has been said."""
        return self.tokenizer.decode(self.text_ids).strip()

    def _segment(self) -> list[str]:
        return self.tokenizer.decode([token for token, _ in self._pieces]).split()

    def _tell_starts(self) -> list[Event]:
        if not self._pieces:
            return []
        words = self._segment()
        spans = self._spans(words, end=self.frame)
        new = [WordStarted(w, self.timing.of_text(s)) for w, (s, _) in zip(words, spans, strict=True)][self._told :]
        self._told = max(self._told, len(words))
        return list(new)

    def _spans(self, words: list[str], end: int) -> list[tuple[int, int]]:
        spans, start = [], self._start or 0
        for word in words[:-1]:
            after = min(end, start + len(self.tokenizer.encode(word)))
            spans.append((start, after))
            start = after
        return [*spans, (start, end)] if words else []

    def _probabilities(self, words: int) -> list[float]:
        """How sure each word of the segment is: the geometric mean of its pieces, whatever their number."""
        groups: list[list[float]] = []
        for token, probability in self._pieces:
            if not groups or self.tokenizer.piece(token).startswith(SPACE):
                groups.append([])
            groups[-1].append(math.log(max(probability, 1e-30)))
        if len(groups) != words:  # pieces that are only a space, say: the segment's mean is the best there is
            groups = [[log for group in groups for log in group]] * words
        return [math.exp(sum(group) / len(group)) for group in groups]

    def _close(self, end: int) -> list[Event]:
        """Ends the segment: its words, their starts first where those have not been told."""
        if not self._pieces:
            self._end_of_stream = None
            return []
        words = self._segment()
        events = self._tell_starts()
        sures = self._probabilities(len(words))
        for word, sure, (start, stop) in zip(words, sures, self._spans(words, end), strict=True):
            events.append(WordEnded(Word(word, self.timing.of_text(start), self.timing.of_text(stop), sure)))
        self._pieces, self._told, self._end_of_stream = [], 0, None
        return events
