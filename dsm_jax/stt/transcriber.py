"""Speech to text on slots: the program of a model, and the sessions that transcribe recordings in it.

Shape letters: T samples, H hops of a frame.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import CheckpointError, DsmError
from dsm_jax.models.family import require
from dsm_jax.nn.sampling import key_of, top_k_capacity
from dsm_jax.options import check_options
from dsm_jax.process import check_process
from dsm_jax.runtime.slots import Slots
from dsm_jax.stt.events import PAUSE_HORIZONS, Event, Pause, WordEnded
from dsm_jax.stt.framing import FrameBuffer, LeadIn, lead_in, word_reader
from dsm_jax.stt.host import Samples, SttProgram
from dsm_jax.stt.options import TranscribeOptions
from dsm_jax.stt.program import FrameOutputs, SttRequest
from dsm_jax.stt.transcript import Frames, Transcript
from dsm_jax.stt.words import WordReader


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Options that have been read for a model: what its slot, frame buffer and word reader are made with.

    Attributes:
      request: request of the slot.
      lead: audio before the recording.
      options: as they were given.
    """

    request: SttRequest
    lead: LeadIn
    options: TranscribeOptions


class Transcriber:
    """A speech-to-text model and the slots that its recordings share.

    Args:
      model: from `checkpoints.load`.
      slots: recordings at a time.
      chunks: frames of a device call, in ascending order; each call takes the least that holds its inputs.
      options: options of recordings to come, None for the default ones; there is room for their top-k and prompts.
      prompt_tokens: room for prompts of at least so many tokens.
      ahead: the most steps that one pass of the language model runs, see `stt.program`.
      behind: calls whose outputs may be left unread, see `Slots`.

    Attributes:
      errors: why some of the options could not be read, by their place.
      chunk: frames that a session gives at most to a device call.

    Raises:
      CheckpointError: the model does not transcribe.
      ConfigError: options of another class.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        chunks: Sequence[int],
        options: Sequence[TranscribeOptions | None],
        *,
        prompt_tokens: int = 0,
        ahead: int = 1,
        behind: int = 1,
    ):
        check_process()
        require(model, "stt")
        default = TranscribeOptions()
        known = [default if one is None else one for one in options]
        check_options(model.name, known, TranscribeOptions)
        lm, name = model.config.lm, model.name
        assert lm is not None
        assert model.tokenizer is not None
        if lm.n_q > model.config.mimi.quantizer.n_q:
            raise CheckpointError(
                f"{name} listens to {lm.n_q} codebooks and its codec has {model.config.mimi.quantizer.n_q}; "
                "take both from one checkpoint"
            )
        if lm.extra_heads_num_heads not in (0, len(PAUSE_HORIZONS)):
            raise CheckpointError(
                f"{name} has {lm.extra_heads_num_heads} extra heads; expected none, or {len(PAUSE_HORIZONS)}: one for "
                f"each of the pauses of {PAUSE_HORIZONS} s"
            )
        self.model, self.lm, self.tokenizer, self.chunk = model, lm, model.tokenizer, max(chunks)
        self._read = self._read_all(known)
        self.errors = {place: one for place, one in enumerate(self._read) if isinstance(one, DsmError)}
        read = [one for one in self._read if isinstance(one, Utterance)]
        self.program = SttProgram(
            model,
            slots,
            chunks,
            max_top_k=top_k_capacity(0, *(int(one.request.top_k_B) for one in read if one.request.temperature_B > 0)),
            prompt_tokens=max((prompt_tokens, *(len(one.lead.ids) for one in read))),
            ahead=ahead,
        )
        self.slots: Slots[Any] = Slots(self.program, behind=behind)

    def _read_all(self, options: Sequence[TranscribeOptions]) -> list[Utterance | DsmError]:
        """Read options, each object once: many recordings may share a long audio prompt."""
        read: dict[int, Utterance | DsmError] = {}
        for one in options:
            if id(one) not in read:
                try:
                    read[id(one)] = self.read(one)
                except DsmError as error:
                    read[id(one)] = error
        return [read[id(one)] for one in options]

    def utterance(self, place: int) -> Utterance:
        """Return the options at a place as they were read.

        Raises:
          AudioError: their audio prompt cannot be read.
          PromptError: the model cannot follow their prompt.
        """
        found = self._read[place]
        if isinstance(found, DsmError):
            raise found
        return found

    def read(self, options: TranscribeOptions) -> Utterance:
        """Read options: load the audio prompt, encode the text prompt.

        Raises:
          As `utterance`.
        """
        temperature, top_k = options.sampling(self.model.config)
        prompt = options.prompt
        prompt_T = None if prompt.audio is None else audio.read(prompt.audio, self.model.config.mimi.sample_rate)
        lead = lead_in(prompt.text, prompt_T, self.model.config, self.lm, self.tokenizer)
        key_2 = key_of(options.seed)
        request = SttRequest(
            key_2, np.float32(temperature), np.int32(top_k), np.array(lead.ids, np.int32) + 1, np.int32(lead.deadline)
        )
        return Utterance(request, lead, options)

    def buffer(self, utterance: Utterance) -> FrameBuffer:
        """Make the frame buffer of a new recording."""
        return FrameBuffer(self.model.config, utterance.lead)

    def reader(self, utterance: Utterance) -> WordReader:
        """Make the word reader of a new recording."""
        return word_reader(
            self.model.config,
            self.lm,
            self.tokenizer,
            pauses=utterance.options.vad,
            lead=utterance.lead,
            exclude_prompt=utterance.options.prompt.exclude_from_output,
            reference_times=utterance.options.word_times == "reference",
        )


class RecordingSession:
    """One recording, offline or live, while it has a slot.

    Args:
      transcriber: transcriber that has the slots.
      utterance: options of this recording, as the transcriber has read them.
    """

    error: DsmError | None

    def __init__(self, transcriber: Transcriber, utterance: Utterance):
        self._utterance, self.transcriber = utterance, transcriber
        self.buffer, self.reader = transcriber.buffer(utterance), transcriber.reader(utterance)
        self.error = None
        self.ended = False
        self.events: list[Event] = []
        self._taken = 0  # events that were returned

    def request(self) -> SttRequest:
        """Return the options as the slot holds them."""
        return self._utterance.request

    def take_input(self) -> Samples | None:
        """Pop the frames that are ready, at most a chunk; None where there are none."""
        frames = min(self.transcriber.chunk, self.buffer.ready)
        last = self.buffer.ended and frames == self.buffer.ready
        return Samples(self.buffer.pop_frames(frames), last) if frames or last else None

    def read(self, outputs: FrameOutputs, slot: int, part: Samples) -> None:
        """Turn the outputs of a chunk into events."""
        if self.buffer.ended:
            self.reader.duration = self.buffer.samples / self.transcriber.model.sample_rate
        frames = part.pcm_T.size // self.buffer.frame_size
        columns = (outputs.tokens_BT, outputs.probabilities_BT, outputs.pauses_BTA)
        rows = zip(*(a[slot, :frames].tolist() for a in columns), outputs.levels_BTH[slot, :frames], strict=True)
        for token, probability, pauses, levels_H in rows:
            self.read_frame(token, probability, tuple(pauses), levels_H)
        if part.last:
            self.events += self.reader.finish()
            self.ended = True

    def read_frame(self, token: int, probability: float, pauses: tuple[float, ...], levels_H: np.ndarray) -> None:
        """Turn the outputs of one frame into events."""
        self.events += self.reader.read(token, probability, pauses, levels_H)

    def take_events(self) -> list[Event]:
        """Return the events since the last call."""
        events = self.events[self._taken :]
        self._taken = len(self.events)
        return events

    def transcript(self, name: str | None) -> Transcript:
        """Return the transcript of the recording so far."""
        return Transcript(
            text=self.reader.text,
            words=tuple(event.word for event in self.events if isinstance(event, WordEnded)),
            pauses=tuple(event for event in self.events if isinstance(event, Pause)),
            duration=self.buffer.samples / self.transcriber.model.sample_rate,
            audio=name,
            model=self.transcriber.model.name,
        )


class FileSession(RecordingSession):
    """A whole recording, read block by block as its slot needs them.

    Args:
      transcriber: transcriber that has the slots.
      utterance: options of this recording, as the transcriber has read them.
      index: its place among the recordings.
      source: the recording.
      keep_frames: keep the raw outputs of every frame.
      progress: called with the seconds read so far.
      on_event: called with each event as it is found.
    """

    def __init__(
        self,
        transcriber: Transcriber,
        utterance: Utterance,
        index: int,
        source: audio.Source,
        *,
        keep_frames: bool = False,
        progress: Callable[[float], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ):
        super().__init__(transcriber, utterance)
        self.index, self.source, self.progress, self.on_event = index, source, progress, on_event
        self._blocks: Iterator[np.ndarray] = iter(())
        self._tokens: list[int] | None = [] if keep_frames else None
        self._pauses: list[tuple[float, ...]] = []
        self.error = self._open()

    def _open(self) -> DsmError | None:
        """Read the first frame; return the reason for which it cannot be read."""
        try:
            # Blocks are short, so that a pipe is heard as it arrives.
            seconds = self.transcriber.chunk / self.transcriber.model.config.mimi.frame_rate
            self._blocks = audio.blocks(self.source, self.transcriber.model.sample_rate, seconds)
            self._fill(1)
        except DsmError as error:
            return error
        return None

    def _fill(self, frames: int) -> None:
        """Read on until so many frames are ready or the recording ends."""
        while self.buffer.ready < frames and not self.buffer.ended:
            block = next(self._blocks, None)
            if block is None:
                self.buffer.end()
            else:
                self.buffer.push(block)

    def take_input(self) -> Samples | None:
        """Pop the next chunk; one frame more is read ahead, to find whether the chunk is the last."""
        self._fill(self.transcriber.chunk + 1)
        return super().take_input()

    def read(self, outputs: FrameOutputs, slot: int, part: Samples) -> None:
        """Turn the outputs of a chunk into events, and report progress."""
        known = len(self.events)
        super().read(outputs, slot, part)
        if self.on_event is not None:
            for event in self.events[known:]:
                self.on_event(event)
        if self.progress is not None:
            self.progress(self.buffer.samples / self.transcriber.model.sample_rate)

    def read_frame(self, token: int, probability: float, pauses: tuple[float, ...], levels_H: np.ndarray) -> None:
        """Turn the outputs of one frame into events, and keep them where that was asked for."""
        super().read_frame(token, probability, pauses, levels_H)
        if self._tokens is not None:
            self._tokens.append(token)
            self._pauses.append(pauses)

    def transcript(self, name: str | None) -> Transcript:
        """Return the transcript of the recording, with the raw outputs where they were kept."""
        transcript = super().transcript(name)
        if self._tokens is None:
            return transcript
        frames = Frames(tuple(self._tokens), tuple(self._pauses) if any(self._pauses) else None)
        return dataclasses.replace(transcript, frames=frames)
