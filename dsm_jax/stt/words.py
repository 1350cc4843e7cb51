"""Read words with times from the text token of each frame, and return them as events, one frame at a time.

Token 0 (`existing_text_end_padding_id`) is a word boundary; ids up to 3 are never text. A segment is what lies between
two boundaries: usually one word.

Frame i is at i / 12.5 s of the stream, less the delay of the text and the silence and prompt before the audio. A word
starts at the frame of its first piece. Its end comes from the sound: where the first silence begins, at most a second
after the last piece, and never after the next word's start.

Without the sound, times are those of the published script: a word lasts from boundary to boundary; of several words in
one segment each but the last takes as many frames as it has tokens, and the last takes the rest; the last segment ends
at the end-of-stream token (2), or a second after it began. Text before the first boundary is a segment too, and a last
word longer than a second keeps all its pieces; the published script drops both. Source:
kyutai-labs/delayed-streams-modeling@f6074cb6 scripts/stt_from_file_pytorch.py.
"""

import dataclasses
import math

import numpy as np

from dsm_jax.errors import ConfigError
from dsm_jax.options import check_numbers
from dsm_jax.stt.events import PAUSE_HORIZONS, Event, Pause, Word, WordEnded, WordStarted
from dsm_jax.stt.levels import SILENCE_S, SoundLevels
from dsm_jax.tokenizers import SPACE, Tokenizer

COMPLETE_FRAMES = 3  # without a piece, after which a word's text is taken to be complete
LONGEST_TAIL_S = 1.0  # of a word's sound after its last piece, where no silence is found
UNFINISHED = "\ufffd"  # stands for a character of which some bytes are still to come


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of a stream's frames in the audio."""

    frame_rate: float  # Hz
    text_offset: float  # seconds from the stream's start to the audio's, and the delay of the text behind it
    audio_offset: float  # the first part alone

    def of_text(self, frame: float) -> float:
        """Return the seconds of audio at which the text of a frame was said; never negative."""
        return max(0.0, frame / self.frame_rate - self.text_offset)

    def in_stream(self, frame: float) -> float:
        """Return the seconds of the stream at which the text of a frame was said; of the audio, less `audio_offset`."""
        return frame / self.frame_rate - (self.text_offset - self.audio_offset)

    def heard(self, frame: int) -> float:
        """Return the seconds of audio that were heard with a frame; negative before the audio."""
        return (frame + 1) / self.frame_rate - self.audio_offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class VadOptions:
    """The rule by which the model's predictions of silence become a `Pause`.

    Attributes:
      horizon: seconds of silence that are predicted, one of `PAUSE_HORIZONS`: each has a head of its own.
      threshold: probability above which a pause is reported.

    Raises:
      ConfigError: no head has this horizon, or the threshold is not in [0, 1].
    """

    horizon: float = 2.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.horizon not in PAUSE_HORIZONS:
            raise ConfigError(f"a pause of {self.horizon} s was asked for; the heads know {PAUSE_HORIZONS} s")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"the threshold of pauses is {self.threshold}; expected a probability from 0 to 1")


class WordReader:
    """Read one stream's frames in order and return words and pauses as they come.

    Args:
      tokenizer: tokenizer of the model.
      timing: where frames lie in the audio.
      padding: the token id that says nothing; ids up to it are never text.
      boundary: the token id between words.
      pauses: rule by which pauses are reported.
      skip: frames at the start whose text is left out: those that answer a prompt.
      levels: sound levels of the stream, filled by `read`, for the ends of words; None takes the times of the published
        script.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        timing: Timing,
        *,
        padding: int,
        boundary: int,
        pauses: VadOptions,
        skip: int = 0,
        levels: SoundLevels | None = None,
    ):
        self.tokenizer, self.timing, self.levels = tokenizer, timing, levels
        self.padding, self.boundary, self.skip = padding, boundary, skip
        self.pause_head, self.threshold = PAUSE_HORIZONS.index(pauses.horizon), pauses.threshold
        self.frame = 0
        self.text_ids: list[int] = []
        self.duration: float | None = None  # of the audio, once it is known: nothing is later
        self._pieces: list[_Piece] = []
        self._words: list[str] | None = None  # of the pieces, once they are decoded
        self._start: int | None = None  # frame at which the segment starts
        self._end_of_stream: int | None = None
        self._told: list[float] = []  # starts of those words of the segment whose start was returned
        self._told_pieces = 0  # pieces of the segment when starts were last looked for
        self._paused = False

    def read(
        self,
        token: int,
        probability: float,
        pauses: tuple[float, ...] | None = None,
        levels_H: np.ndarray | None = None,
    ) -> list[Event]:
        """Read one frame: its text token, the token's probability, the pause heads, and the levels of its hops."""
        events: list[Event] = []
        frame, self.frame = self.frame, self.frame + 1
        if self.levels is not None and levels_H is not None:
            self.levels.push(levels_H)
        if frame >= self.skip:
            if token == self.boundary:
                events += self._close(frame)
                self._start = frame + 1
            elif token > self.padding:
                # A word starts with its sound, and a boundary may come long before.
                if self._start is None or (self.levels is not None and not self._pieces):
                    self._start = frame
                self._pieces.append(_Piece(token, probability, frame))
                self._words = None
                self.text_ids.append(token)
                self._paused = False
            else:
                if token == self.tokenizer.eos_id and self._pieces and self._end_of_stream is None:
                    self._end_of_stream = frame
                events += self._tell_starts()
                if self._is_over():
                    # The sound is known up to now, which is later than the text by the text's delay.
                    delay = self.timing.text_offset - self.timing.audio_offset
                    events += self._close(self.frame + delay * self.timing.frame_rate)
        heard = self.timing.heard(frame)
        if heard > 0 and pauses and pauses[self.pause_head] > self.threshold and not self._paused:
            self._paused = True
            events.append(Pause(self._within(heard), PAUSE_HORIZONS[self.pause_head], float(pauses[self.pause_head])))
        return events

    def finish(self) -> list[Event]:
        """Return the events of the stream's end: the last word ends."""
        if self._start is None:
            return []
        end = self._end_of_stream
        if end is None:
            end = min(self.frame, self._start + int(self.timing.frame_rate))
        last_piece = self._pieces[-1].frame if self._pieces else 0
        return self._close(max(end, last_piece + 1))

    @property
    def in_word(self) -> bool:
        """Tell whether a word has begun that has not ended."""
        return bool(self._pieces)

    @property
    def text(self) -> str:
        """All text so far."""
        return self.tokenizer.decode(self.text_ids).strip()

    def _segment(self) -> list[str]:
        """Return the words of the segment."""
        if self._words is None:
            self._words = self.tokenizer.decode([piece.token for piece in self._pieces]).split()
        return self._words

    def _within(self, seconds: float) -> float:
        """Return a time of the audio, no later than its end; the published script's times may be later."""
        return seconds if self.duration is None or self.levels is None else min(seconds, self.duration)

    def _tell_starts(self, *, complete: bool = False) -> list[Event]:
        """Return the starts of those words of the segment that are new; an unfinished character is waited for."""
        if not self._pieces or (len(self._pieces) == self._told_pieces and not complete):
            return []
        self._told_pieces = len(self._pieces)
        words = self._segment()
        starts = self._starts(words)
        if not complete and words and words[-1].endswith(UNFINISHED):
            words = words[:-1]
        new = [WordStarted(word, start) for word, start in zip(words, starts, strict=False)][len(self._told) :]
        self._told += [event.start for event in new]
        return list(new)

    def _frames(self, words: list[str]) -> list[int]:
        """Return the frame at which each word of the segment starts."""
        groups = self._groups()
        if self.levels is not None and len(groups) == len(words):
            return [group[0].frame for group in groups]
        frames, frame = [], self._start or 0
        for word in words:
            frames.append(frame)
            frame = min(self.frame, frame + len(self.tokenizer.encode(word)))
        return frames

    def _starts(self, words: list[str]) -> list[float]:
        """Return the seconds at which each word starts; those that were returned before do not change."""
        new = [self._within(self.timing.of_text(frame)) for frame in self._frames(words)[len(self._told) :]]
        return [*self._told, *new][: len(words)]

    def _ends(self, words: list[str], end: float) -> list[float]:
        """Return the seconds at which each word ends, for a segment that ends at the frame `end`."""
        if not words:  # pieces that are only a space, say
            return []
        frames = self._frames(words)
        limits = [min(end, frame) for frame in frames[1:]] + [end]
        if self.levels is None:
            return [self.timing.of_text(limit) for limit in limits]
        return [self._sound_end(*span) for span in zip(frames, limits, strict=True)]

    def _sound_end(self, frame: int, limit: float) -> float:
        """Return the seconds at which the sound of a word ends that starts at `frame` and ends before `limit`."""
        assert self.levels is not None
        timing = self.timing
        latest = min(timing.in_stream(limit), timing.in_stream(self._pieces[-1].frame + 1) + LONGEST_TAIL_S)
        found = self.levels.end_of_sound(timing.in_stream(frame), latest)
        return self._within((latest if found is None else found[0]) - timing.audio_offset)

    def _is_over(self) -> bool:
        """Tell whether the segment has ended though no boundary came: its text is complete, and its sound too."""
        if self.levels is None or not self._pieces or self.frame - self._pieces[-1].frame <= COMPLETE_FRAMES:
            return False
        # Wait for the longest tail if no silence follows: the next word may have begun, and its text is later than its
        # sound.
        if self.frame - self._pieces[-1].frame > LONGEST_TAIL_S * self.timing.frame_rate:
            return True
        last = self._frames(self._segment())[-1:] or [self._pieces[0].frame]
        found = self.levels.end_of_sound(self.timing.in_stream(last[0]), self.levels.seconds)
        # Once the text has come to the end of this word's sound, a word that followed at once would have a piece.
        return found is not None and found[1] >= SILENCE_S and self.timing.in_stream(self.frame) >= found[0]

    def _groups(self) -> list[list["_Piece"]]:
        """Return the pieces of each word: a word begins with the piece that holds the space before it."""
        groups: list[list[_Piece]] = []
        for piece in self._pieces:
            if not groups or self.tokenizer.piece(piece.token).startswith(SPACE):
                groups.append([])
            groups[-1].append(piece)
        return groups

    def _probabilities(self, words: int) -> list[float]:
        """Return each word's probability: the geometric mean of its pieces' probabilities."""
        groups = [[math.log(max(piece.probability, 1e-30)) for piece in group] for group in self._groups()]
        if len(groups) != words:  # pieces that are only a space, say: the segment's mean is the best there is
            groups = [[log for group in groups for log in group]] * words
        return [math.exp(sum(group) / len(group)) for group in groups]

    def _close(self, end: float) -> list[Event]:
        """End the segment at a frame; return its words, their starts first where those were not returned before."""
        if not self._pieces:
            return []
        words = self._segment()
        events = self._tell_starts(complete=True)
        starts, ends, sures = self._starts(words), self._ends(words, end), self._probabilities(len(words))
        for word, start, stop, sure in zip(words, starts, ends, sures, strict=True):
            events.append(WordEnded(Word(word, start, max(start, stop), sure)))
        self._pieces, self._words, self._told, self._end_of_stream, self._start = [], None, [], None, None
        self._told_pieces = 0
        return events


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One piece of text, its probability, and its frame."""

    token: int
    probability: float
    frame: int
