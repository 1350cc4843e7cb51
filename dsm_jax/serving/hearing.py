"""Speech to text for clients: sessions that are fed live, and the plan by which their slots take steps.

A client's marker asks when all audio before it has been transcribed. The marker is answered once the slot has heard as
much more as the text is late. A slot that has a marker and no audio for a while is given silence for that, which counts
neither in `Heard` nor in the times of later words.

Shape letters: T samples, H hops of a frame.
"""

import dataclasses
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import PromptError
from dsm_jax.runtime.slots import Slots
from dsm_jax.serving.outbox import Outbox
from dsm_jax.stt.events import Pause
from dsm_jax.stt.host import Samples
from dsm_jax.stt.options import TranscribeOptions
from dsm_jax.stt.transcriber import RecordingSession, Transcriber, Utterance
from dsm_jax.stt.words import VadOptions

STARVED_S = 0.3  # without audio, after which a slot with a marker is given silence
PATIENCE_S = 1.0  # of audio after a marker is due, or of more silence, in which the last word before it may still end
_MESSAGES = 10_000  # that may wait: empty ones and markers take memory too
PROMPT_TOKENS = 64  # room for a text prompt
BACKLOG_S = 0.040  # of a step for sessions that are behind: live sessions wait for it
_LARGER_CHUNKS = (8, 4, 2)  # frames
# Slots that step together, for each core of a CPU. From so many on, a CPU takes twice as long for twice the rows:
# smaller steps cost no more in all, and a live frame waits less for the step before its own.
_SLOTS_PER_CORE = 16


@dataclasses.dataclass(frozen=True)
class Heard:
    """A frame of the client's audio has been transcribed.

    Attributes:
      index: number of the frame, from 0.
      pauses: probabilities of silence over the next 0.5, 1, 2 and 3 seconds; empty for a model without pause heads.
      buffered: samples that wait for their frame.
      seconds: of the client's audio that were heard with this frame.
    """

    index: int
    pauses: tuple[float, ...]
    buffered: int
    seconds: float = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass(frozen=True)
class Marked:
    """All audio before a marker has been transcribed."""

    id: int


@dataclasses.dataclass(frozen=True)
class _Mark:
    """A marker, at the frame of the stream at which it is due."""

    id: int
    due: int
    flush: bool


class HearingService:
    """A speech-to-text model for clients: its slots, warmed up, and the plan of their steps.

    Args:
      model: a speech-to-text model.
      slots: sessions at a time.
      options: of sessions that ask for no others.
      clock: seconds, monotonic.

    Attributes:
      groups: slots that step together, in one group or more.
      total: sessions at a time; equal groups may have a few slots more.
      step_seconds: measured duration of a step of one group, by frames of its chunk.

    Raises:
      DsmError: a session of the warm-up has failed.
      As `Transcriber`.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        *,
        options: TranscribeOptions = TranscribeOptions(),
        clock: Callable[[], float] = time.monotonic,
    ):
        sampled = options if options.sampling(model.config)[0] > 0 else dataclasses.replace(options, temperature=1.0)
        prompt = PROMPT_TOKENS if options.prompt.text is None else 0
        groups = groups_of(slots, model.devices[0].platform)
        each = math.ceil(slots / groups)
        self.transcriber = Transcriber(model, each, (1,), [options, sampled], prompt_tokens=prompt, behind=0)
        self.model, self.options, self.clock, self.total = model, options, clock, slots
        more = [Slots(self.transcriber.program, behind=0) for _ in range(groups - 1)]
        self.groups: list[Slots[Any]] = [self.transcriber.slots, *more]
        # The last text of a marker's audio comes so many frames after it.
        self.late = math.ceil(model.config.stt.audio_delay_seconds * model.config.mimi.frame_rate) + 1
        self.patience = math.ceil(PATIENCE_S * model.config.mimi.frame_rate)
        self.step_seconds: dict[int, float] = {}
        self._warm_up()

    @property
    def has_pauses(self) -> bool:
        """Tell whether the model predicts pauses."""
        return self.transcriber.lm.extra_heads_num_heads > 0

    def _warm_up(self) -> None:
        """Run all that clients will run, and choose the chunk for sessions that are behind by its measured time."""
        self._time(1)
        first = self.step_seconds[1]
        for frames in _LARGER_CHUNKS:
            # A larger chunk saves less than half of each frame's time: what is too long by that is not compiled.
            if 0.6 * first * frames > BACKLOG_S:
                continue
            self.transcriber.program.add_chunk(frames)
            self._time(frames)
            if self.step_seconds[frames] <= BACKLOG_S:
                break
            self.transcriber.program.chunks = (1,)
            del self.step_seconds[frames]
        self.plan(())

    def _time(self, frames: int) -> None:
        """Measure a step of a group with chunks of so many frames.

        Raises:
          DsmError: a session has failed.
        """
        slots, size = self.groups[0], self.model.config.mimi.frame_size
        silence_T = np.zeros(2 * frames * size, np.float32)
        self.transcriber.chunk = frames
        sessions = [RecordingSession(self.transcriber, self.transcriber.utterance(0)) for _ in slots.free]
        slots.admit(sessions)
        seconds = []
        for _ in range(4):
            for session in sessions:
                session.buffer.push(silence_T[: frames * size])
            start = time.perf_counter()
            slots.step()
            seconds.append(time.perf_counter() - start)
        for session in sessions:
            slots.cancel(session)
            if session.error is not None:  # its slot was idle, so that the time says nothing
                raise session.error
        self.step_seconds[frames] = min(seconds[1:])

    def read(self, options: TranscribeOptions) -> Utterance:
        """Read options of a session.

        Raises:
          PromptError: a prompt that the model cannot follow, or that is longer than the room for it.
        """
        utterance = self.transcriber.read(options)
        if len(utterance.lead.ids) > self.transcriber.program.settings.prompt_tokens:
            raise PromptError(
                f"the prompt has {len(utterance.lead.ids)} tokens; this server takes up to "
                f"{self.transcriber.program.settings.prompt_tokens}: shorten it"
            )
        return utterance

    def with_pauses(self, rule: VadOptions) -> Utterance:
        """Return the options of a session that asks for no others than the rule of its pauses."""
        utterance = self.transcriber.utterance(0)
        return dataclasses.replace(utterance, options=dataclasses.replace(utterance.options, vad=rule))

    def plan(self, sessions: Sequence["LiveHearing"]) -> None:
        """Choose the chunk of the next step of sessions: the one that takes more frames a second."""
        ready = [session.buffer.ready for session in sessions]

        def pace(frames: int) -> float:
            return sum(min(frames, one) for one in ready) / self.step_seconds[frames]

        self.transcriber.chunk = max(self.transcriber.program.chunks, key=pace)


class LiveHearing(RecordingSession):
    """One client's audio.

    The event loop calls `push`, `mark` and `finish`; all else is the engine's.

    Args:
      service: of the model.
      outbox: messages to the client: `Heard`, `Marked`, and the events of the transcription.
      utterance: options, as the service has read them; None for the service's own.
      is_file: whether the session may wait for a slot.
    """

    def __init__(
        self, service: HearingService, outbox: Outbox, utterance: Utterance | None = None, *, is_file: bool = False
    ):
        super().__init__(service.transcriber, service.transcriber.utterance(0) if utterance is None else utterance)
        self.outbox, self.is_file, self.received = outbox, is_file, 0
        self.latencies: list[float] = []  # of the frames of the last step, seconds from the arrival of their samples
        self._service, self._clock, self._rate = service, service.clock, service.model.sample_rate
        self._inbox: deque[Any] = deque()
        self._arrived: deque[tuple[int, float]] = deque()  # samples received up to a time
        self._gone = 0  # samples received that were taken before the client began anew
        self._fed_at = self._clock()
        self._fresh()

    def _fresh(self) -> None:
        """Begin the stream anew."""
        self._frame = 0  # of the stream, to be read next
        self._popped = 0  # frames of the stream that the slot has taken
        self._index = 0  # of the client's audio, to be read next
        self._before = self.buffer.total  # samples of silence and prompt before the client's audio
        self._marks: deque[_Mark] = deque()
        self._flushes = 0  # among the markers
        self._silence: deque[tuple[int, int]] = deque()  # samples of the stream that were added and are not read
        self._added = 0  # samples of silence that were added and read
        self._messages: list[Any] = []
        self._read_events = 0

    # The event loop's side.

    def push(self, pcm_T: np.ndarray) -> None:
        """Add samples: mono float32 at the model's rate."""
        if not pcm_T.size:
            return
        self.received += pcm_T.size
        self._inbox.append((pcm_T, self._clock()))

    def mark(self, id: int, *, flush: bool = False) -> None:
        """Add a marker behind all samples; it is answered by `Marked`.

        Args:
          id: client's number of the marker.
          flush: answer as soon as the device can, and not only once the client has stopped sending.
        """
        self._inbox.append((_Mark(id, 0, flush), self._clock()))

    def finish(self) -> None:
        """End the audio: the last words come, then `Ended`."""
        self._inbox.append((None, self._clock()))

    @property
    def waiting(self) -> float:
        """Seconds of audio that were received and not taken by the slot; infinity if too many messages wait."""
        if len(self._inbox) > _MESSAGES:
            return math.inf
        taken = max(0, self._popped * self.buffer.frame_size - self._before)
        return max(0, self.received - self._gone - taken) / self._rate

    # The engine's side.

    def restart(self) -> None:
        """Begin anew with a fresh model state; audio that was not transcribed is kept, and so are markers."""
        size, first, marks = self.buffer.frame_size, self._popped * self.buffer.frame_size, self._marks
        kept_T = self.buffer.pop_all()
        # Neither silence that was added nor what comes before the audio is the client's.
        for start, end in [*reversed(self._silence), (0, self._before)]:
            kept_T = np.delete(kept_T, slice(max(0, start - first), max(0, end - first)))
        passed = -(-max(first, self._before) // size)  # frames of the stream before what is kept
        transcriber, utterance = self.transcriber, self._utterance
        self._gone += max(0, self.buffer.samples - kept_T.size)
        self._arrived.clear()
        self.buffer, self.reader = transcriber.buffer(utterance), transcriber.reader(utterance)
        self.events.clear()
        self._fresh()
        lead = -(-self._before // size)
        self._marks.extend(dataclasses.replace(mark, due=lead + max(0, mark.due - passed)) for mark in marks)
        self._flushes = sum(mark.flush for mark in self._marks)
        if kept_T.size:
            self.buffer.push(kept_T)

    @property
    def behind(self) -> bool:
        """Tell whether several frames wait."""
        return self.buffer.ready > 1

    def _collect(self) -> None:
        """Move the inbox into the frame buffer."""
        # What comes behind a flush waits for it, so that its silence does not depend on how far ahead the client is.
        while self._inbox and not self.buffer.ended and not self._flushes:
            item, now = self._inbox.popleft()
            if item is None:
                self.buffer.end()
            elif isinstance(item, _Mark):
                due = -(-self.buffer.total // self.buffer.frame_size) + self._service.late
                self._marks.append(dataclasses.replace(item, due=due))
                self._flushes += item.flush
            else:
                self.buffer.push(item)
                self._arrived.append((self.buffer.samples, now))
                self._fed_at = now

    def due(self, now: float) -> float:
        """Return the time at which there is something to transcribe."""
        self._collect()
        if self.buffer.ready or self.buffer.ended:
            return now
        if not self._marks:
            return math.inf
        return now if self._starved(now) else self._fed_at + STARVED_S

    def _starved(self, now: float) -> bool:
        """Tell whether a marker waits, and no audio that would bring its answer has come for a while."""
        if not self._marks:
            return False
        return self._flushes > 0 or now >= self._fed_at + STARVED_S

    def take_input(self) -> Samples | None:
        """Pop the frames that are ready; of a starved slot, silence in which the text comes out."""
        self._collect()
        if not self.buffer.ready and not self.buffer.ended and self._starved(self._clock()):
            first, size = self.buffer.total, self.buffer.frame_size
            last = (-(-first // size) + self._service.late) * size
            self.buffer.add_silence(last - first)
            self._silence.append((first, last))
        part = super().take_input()
        if part is not None:
            self._popped += part.pcm_T.size // self.buffer.frame_size
        return part

    def read(self, outputs: Any, slot: int, part: Samples) -> None:
        """Turn the outputs of a step into messages."""
        super().read(outputs, slot, part)
        if part.last:
            self._tell_events()
            self._messages += [Marked(mark.id) for mark in self._marks]
            self._marks.clear()
            self._flushes = 0

    def read_frame(self, token: int, probability: float, pauses: tuple[float, ...], levels_H: np.ndarray) -> None:
        """Turn the outputs of a frame into messages: the frame, its words, and the markers that it answers."""
        size, known = self.buffer.frame_size, len(self.events)
        super().read_frame(token, probability, pauses, levels_H)
        first, last = self._frame * size, (self._frame + 1) * size
        self._frame += 1
        if self._is_silence(first, last):  # what the model predicts after silence of the engine's own says nothing
            self.events[known:] = [event for event in self.events[known:] if not isinstance(event, Pause)]
        elif last > self._before and not self._is_after(first):
            self._tell_frame(pauses, last)
        flushed = self._is_flushed(last, in_text=token > self.reader.padding)
        if flushed:
            start, end = self._silence.popleft()
            self.events += self.reader.finish()
            self._shift_times((end - start) / self._rate)
        self._tell_events()
        # Markers of a session that has ended are answered after its last words.
        while self._marks and not self.buffer.ended and self._frame >= self._marks[0].due:
            if not flushed and self.reader.in_word and self._frame < self._marks[0].due + self._service.patience:
                break
            mark = self._marks.popleft()
            self._flushes -= mark.flush
            self._messages.append(Marked(mark.id))

    def _is_silence(self, first: int, last: int) -> bool:
        """Tell whether samples of the stream are all silence that the engine has added for a marker."""
        return any(start <= first and last <= end for start, end in self._silence)

    def _is_after(self, first: int) -> bool:
        """Tell whether samples of the stream are all behind the end of the client's audio."""
        return self.buffer.ended and first >= self._before + self._added + self.buffer.samples

    def _is_flushed(self, last: int, *, in_text: bool) -> bool:
        """Tell whether silence that was added ends here; a word that the model still writes is given more of it.

        Audio that has come behind the silence brings the rest of the word otherwise.
        """
        if not self._silence or last < self._silence[0][1]:
            return False
        (start, end), size = self._silence[0], self.buffer.frame_size
        waits = in_text and end == self.buffer.total and not self.buffer.ended
        if waits and end - start < (self._service.late + self._service.patience) * size:
            self.buffer.add_silence(size)
            self._silence[0] = start, end + size
            return False
        return True

    def _tell_frame(self, pauses: tuple[float, ...], last: int) -> None:
        heard = last - self._before - self._added
        while self._arrived and self._arrived[0][0] < heard:
            self._arrived.popleft()
        if self._arrived:
            self.latencies.append(self._clock() - self._arrived[0][1])
        received = self.received - self._gone
        buffered = max(0, received - heard)
        seconds = min(heard, received) / self._rate
        self._messages.append(Heard(self._index, pauses, buffered, seconds))
        self._index += 1

    def _shift_times(self, seconds: float) -> None:
        """Take added silence out of the times of later words."""
        timing = self.reader.timing
        self._added += round(seconds * self._rate)
        self.reader.timing = dataclasses.replace(
            timing, text_offset=timing.text_offset + seconds, audio_offset=timing.audio_offset + seconds
        )

    def _tell_events(self) -> None:
        self._messages += self.events[self._read_events :]
        self._read_events = len(self.events)

    def take_messages(self) -> list[Any]:
        """Return the messages since the last call."""
        messages, self._messages = self._messages, []
        return messages


def groups_of(slots: int, platform: str) -> int:
    """Return the number of groups in which slots take their steps in turn on a platform, such as `cpu`."""
    return math.ceil(slots / (_SLOTS_PER_CORE * _cores())) if platform == "cpu" else 1


def _cores() -> int:
    """Return the number of cores that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
