"""Conversational speech on slots: the program of a model, and the sessions that speak requests in it.

Shape letters: M streams (text first), Q codebooks, T frames or samples, N steps.
"""

from collections.abc import Callable

import numpy as np

from dsm_jax import audio, codec
from dsm_jax.checkpoints import Model
from dsm_jax.csm.host import ConversationRequest, CsmProgram, room
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.program import CsmOutputs, CsmSettings
from dsm_jax.csm.prompt import text_ids, turn_MT
from dsm_jax.csm.requests import Request, Segment
from dsm_jax.errors import AudioError, DsmError, SpeechError, plural
from dsm_jax.models.family import csm_config, require
from dsm_jax.process import check_process
from dsm_jax.runtime.slots import Slots
from dsm_jax.runtime.steps import Leave
from dsm_jax.speaking import SpeakingSession, joined
from dsm_jax.speech import IncompleteSpeechError, Speech


class ConversationSynthesizer:
    """A conversational speech model and the slots that its requests share.

    Args:
      model: from `checkpoints.load`.
      slots: requests at a time.
      limit: frames of a device call at most; None for as many as there is room for.
      behind: calls whose outputs may be left unread, see `Slots`.
      inserts: as for `CsmProgram`.

    Raises:
      ConfigError: the model was loaded with `stt_only`.
      ModelKindError: the model is of another family.
    """

    def __init__(
        self, model: Model, slots: int, *, limit: int | None = None, behind: int = 1, inserts: int | None = None
    ):
        check_process()
        require(model, "csm")
        assert model.tokenizer is not None
        model.codec.require_decoder(model.name)
        self.model, self.config, self.tokenizer = model, csm_config(model.config), model.tokenizer
        self._count, self._limit, self._behind, self._inserts = slots, limit, behind, inserts
        self._slots: Slots[ConversationSession] | None = None
        self._turns: dict[Segment, np.ndarray] = {}  # segments are compared by identity

    def positions_of(self, segment: Segment) -> np.ndarray:
        """Return the positions of a turn of the context, int32 [M, T]; its recording is encoded once.

        Raises:
          AudioError: the recording cannot be read.
          SpeechError: the turn has no text, no recording, or no number for its speaker.
        """
        if segment not in self._turns:
            ids = text_ids(self.config, self.tokenizer, segment.text, segment.speaker)
            if segment.audio is None:
                raise SpeechError(f"the context's turn {segment.text!r} has no audio; give its recording")
            self._turns[segment] = turn_MT(self.config, ids, self._codes(segment))
        return self._turns[segment]

    def forget(self, segment: Segment) -> None:
        """Forget the codes of a turn that is not used any more."""
        self._turns.pop(segment, None)

    def _codes(self, segment: Segment) -> np.ndarray:
        """Return the codes [Q, T] of a turn's recording."""
        recording = segment.audio
        assert recording is not None
        if isinstance(recording, Speech) and recording.model == self.model.name and self._are_codes_of(recording):
            return recording.frames
        try:
            pcm_T = audio.read(recording, self.model.sample_rate)
        except AudioError as error:
            raise AudioError(f"the context's turn {segment.text!r}: {error}") from None
        return codec.encode(self.model, pcm_T, codebooks=self.config.n_q)

    def _are_codes_of(self, speech: Speech) -> bool:
        """Return whether a speech's frames are codes of this model for the samples that it has now."""
        codes_QT, mimi = speech.frames, self.model.config.mimi
        if codes_QT.size == 0 or codes_QT.shape != (self.config.n_q, speech.pcm.size / mimi.frame_size):
            return False  # such as a speech that was trimmed
        return codes_QT.min() >= 0 and codes_QT.max() < mimi.quantizer.bins

    def prompt(self, request: Request) -> np.ndarray:
        """Return the positions of a request's conversation, int32 [M, T].

        Raises:
          AudioError: a recording cannot be read.
          SpeechError: there is no text, or a turn of the context cannot be taken.
        """
        ids = text_ids(self.config, self.tokenizer, request.text, request.speaker)
        turns = [self.positions_of(segment) for segment in request.context]
        return np.concatenate([*turns, turn_MT(self.config, ids)], axis=1)

    def prepare(self, request: Request, options: CsmOptions) -> ConversationRequest:
        """Read a request: its text and its context.

        Args:
          request: what to say.
          options: how, unless the request has its own.

        Raises:
          AudioError: a recording cannot be read.
          SpeechError: as for `prompt`, or the conversation does not fit the model's context.
        """
        options = options if request.options is None else request.options
        prompt_MT, context = self.prompt(request), self.config.backbone.context
        if (length := prompt_MT.shape[1]) >= context:
            remedy = "leave out its oldest turns, or shorten them" if request.context else "cut the text"
            raise SpeechError(
                f"the conversation takes {length} positions, one for each token of text and each frame of audio; "
                f"{self.model.name} has {context}, the answer included: {remedy}"
            )
        return ConversationRequest(
            text=request.text,
            prompt_MT=prompt_MT,
            options=options,
            max_frames=min(options.max_frames, context - length),
        )

    def slots_for(self, *requests: ConversationRequest) -> "Slots[ConversationSession]":
        """Return the slots, which the first call makes, with room for these requests from the start."""
        if self._slots is None:
            context = self.config.backbone.context
            settings = CsmSettings(slots=self._count, positions=room(1, context))
            for request in requests:
                settings = request.fitted(settings, context)
            program = CsmProgram(self.model, settings, limit=self._limit, inserts=self._inserts)
            self._slots = Slots(program, behind=self._behind)
        return self._slots

    def drop_slots(self) -> None:
        """Drop the slots, whose state may be lost; the next requests make them anew."""
        self._slots = None


class ConversationSession(SpeakingSession[ConversationRequest]):
    """One request while it has a slot; the arguments are those of `SpeakingSession`."""

    def __init__(
        self,
        model: Model,
        prepared: ConversationRequest | None,
        *,
        error: DsmError | None = None,
        index: int = 0,
        progress: Callable[[float], None] | None = None,
    ):
        super().__init__(model, prepared, error=error, index=index, progress=progress)
        self._codes: list[np.ndarray] = [np.zeros((0, csm_config(model.config).n_q), np.int32)]
        self._taken = 0  # pieces of sound that `take_pcm` has returned

    def read(self, outputs: CsmOutputs, slot: int, part: Leave) -> None:
        """Collect the frames that a call generated in this slot."""
        count = int(outputs.count)
        made_N = outputs.made_NB[:count, slot]
        self._codes.append(outputs.codes_NBQ[:count, slot][made_N])
        self.add_pcm(outputs.pcm_NBT[:count, slot][made_N].reshape(-1))
        self.ended = bool(outputs.ended_B[slot])
        if not self.ended:
            return
        if not outputs.complete_B[slot]:
            self.fail(IncompleteSpeechError(self._why_incomplete(), self.speech(complete=False)))
        elif not self._samples:
            self.fail(
                SpeechError(
                    f"{self.model.name} ended the turn before it said anything; give another seed, or a context with "
                    "the speaker's voice"
                )
            )

    def _why_incomplete(self) -> str:
        prepared = self.prepared
        frames, wanted = prepared.max_frames, prepared.options.max_frames
        if frames < wanted:
            context = csm_config(self.model.config).backbone.context
            return (
                f"the turn did not end in {plural(frames, 'frame')}: {prepared.prompt_MT.shape[1]} positions of prompt "
                f"leave no more of the model's {context}; leave out the oldest turns of the context, or cut the text"
            )
        return (
            f"the turn did not end in {plural(frames, 'frame')}; allow more with max_frames, cut the text, or give "
            "another seed"
        )

    def take_pcm(self) -> np.ndarray:
        """Return the samples [T] made since the last call; a turn is short, so that all of its sound is kept."""
        new, self._taken = self._pcm[self._taken :], len(self._pcm)
        return joined(new)

    def speech(self, *, complete: bool = True) -> Speech:
        """Return the speech of a session that has ended; `complete` says whether its turn has ended too."""
        pcm_T, codes_QT = self.pcm_T, np.concatenate(self._codes).T
        name, rate, text = self.model.name, self.model.sample_rate, self.prepared.text
        return Speech(pcm_T, rate, (), codes_QT, name, complete=complete, text=text)
