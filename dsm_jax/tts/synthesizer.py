"""Text to speech on slots: the program of a model, and the sessions that speak requests in it.

Shape letters: N steps, K streams (text first), F frames, Q codebooks, T samples or frames of a prefix.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dsm_jax import audio, codec
from dsm_jax.checkpoints import Model
from dsm_jax.errors import DsmError, SpeechError
from dsm_jax.models.family import require
from dsm_jax.models.streams import ZERO_TOKEN, behind_text
from dsm_jax.nn.sampling import top_k_capacity
from dsm_jax.options import check_options
from dsm_jax.process import check_process
from dsm_jax.runtime.slots import Slots
from dsm_jax.runtime.steps import Leave
from dsm_jax.speaking import SpeakingSession
from dsm_jax.speech import IncompleteSpeechError, Speech
from dsm_jax.tts import voices
from dsm_jax.tts.host import SpeechRequest, TtsProgram
from dsm_jax.tts.script import Entry, entries_of
from dsm_jax.tts.speech import Request, SynthesizeOptions, delay_steps_of, settings_of, words_at
from dsm_jax.tts.state import StepOutputs

CUT_FRAMES = 2  # of a recording to go on from, at its end: the codec has not seen what follows them


class Synthesizer:
    """A text-to-speech model and the slots that its requests share.

    Args:
      model: from `checkpoints.load`.
      slots: requests at a time.
      options: of requests to come, at least one; they say what the program needs room for.
      limit: steps of a device call at most; None for as many as there is room for.
      behind: calls whose outputs may be left unread, see `Slots`.

    Raises:
      ConfigError: the model was loaded with `stt_only`, or an option does not fit it.
      ModelKindError: the model does not speak.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        options: Sequence[SynthesizeOptions],
        *,
        limit: int | None = None,
        behind: int = 1,
    ):
        check_process()
        require(model, "tts")
        check_options(model.name, options, SynthesizeOptions)
        each = [one.checked(model) for one in options]
        assert model.config.lm is not None
        assert model.tokenizer is not None
        model.codec.require_decoder(model.name)
        self.model, self.lm, self.tokenizer = model, model.config.lm, model.tokenizer
        self.distilled = bool(voices.guidance_values(self.lm))
        self._count, self._limit, self._behind = slots, limit, behind
        self._settings = settings_of(
            model,
            slots,
            max_top_k_text=top_k_capacity(*(one.top_k_text for one in each)),
            max_top_k_audio=top_k_capacity(*(one.top_k for one in each)),
            guided=not self.distilled and any(one.guidance_scale != 1.0 for one in each),
        )
        self._slots: Slots[SpeechSession] | None = None

    def prepare(
        self,
        request: Request,
        options: SynthesizeOptions,
        *,
        entries: list[Entry] | None = None,
        complete: bool = True,
    ) -> SpeechRequest:
        """Read a request: its words, voices, and the recording to go on from.

        Args:
          request: what to say.
          options: how, unless the request says so itself.
          entries: the words and breaks of its text, where they are known already.
          complete: whether all of the text is there.

        Raises:
          AudioError: a recording to go on from that cannot be read.
          CheckpointError: a voice that cannot be read.
          ConfigError: an option that does not fit the model.
          SpeechError: text that cannot be said, or voices that the model cannot take.
        """
        options = (options if request.options is None else request.options).checked(self.model)
        entries = self.entries(request.turns, options) if entries is None else entries
        steps: list[np.ndarray] = []
        prefix_QT = np.zeros((self.lm.n_q, 0), np.int32)
        if voices.has_speakers(self.lm):
            if not request.voices and (own := voices.voices_of(self.model)):
                raise SpeechError(f"{self.model.name} needs a voice, and was given none; its own are {', '.join(own)}")
            steps = [voices.read_voice(voice, self.model) for voice in request.voices]
        elif len(request.voices) > 1:
            raise SpeechError(
                f"{len(request.voices)} voices were given; {self.model.name} goes on from the recording of one"
            )
        elif request.voices:
            prefix_QT = self._prefix(request.voices[0])
        guidance = options.guidance_scale if self.distilled else None
        if self.lm.conditioners:
            voices.conditions(self.lm, [steps], guidance)  # raises for voices and guidance that the model cannot take
        return SpeechRequest(
            entries=entries,
            complete=complete,
            voices=steps,
            condition_guidance=guidance,
            prefix_QT=prefix_QT,
            seed=options.seed if request.seed is None else request.seed,
            temperature=options.temperature_of(self.model),
            top_k_text=options.top_k_text,
            top_k_audio=options.top_k,
            guidance=1.0 if self.distilled else options.guidance_scale,
            padding_bonus=options.padding_bonus,
            codebooks=self.lm.dep_q if options.codebooks is None else options.codebooks,
            max_padding=options.max_padding,
            initial_padding=options.initial_padding,
            final_padding=options.final_padding,
            max_steps=options.max_frames,
        )

    def entries(self, turns: Sequence[str], options: SynthesizeOptions) -> list[Entry]:
        """Return the words and breaks of a text, see `script.entries_of`."""
        return entries_of(
            turns,
            self.tokenizer,
            frame_rate=self.model.config.mimi.frame_rate,
            multi_speaker=voices.has_speakers(self.lm),
            padding_between=options.padding_between,
            skip_unsayable=options.on_unsayable == "skip",
        )

    def _prefix(self, voice: voices.Voice) -> np.ndarray:
        """Encode a recording to go on from, without its last frames: codes [Q, T]."""
        recording = audio.read(voice, self.model.sample_rate)
        codes_QT = codec.encode(self.model, recording, codebooks=self.lm.n_q)[:, :-CUT_FRAMES]
        if not codes_QT.shape[1]:
            seconds = recording.size / self.model.sample_rate
            raise SpeechError(f"the recording to go on from is {seconds:.2f} s long; give some seconds")
        return codes_QT

    def slots_for(self, *requests: SpeechRequest) -> "Slots[SpeechSession]":
        """Return the slots, which the first call makes, with room for these requests from the start."""
        if self._slots is None:
            settings = self._settings
            for request in requests:
                settings = request.fitted(settings)
            program = TtsProgram(self.model, settings, limit=self._limit)
            self._slots = Slots(program, behind=self._behind)
        return self._slots

    def extend(self, session: "SpeechSession", request: SpeechRequest) -> None:
        """Add text to the end of a session that is running."""
        assert self._slots is not None
        slots, program = self._slots, self._slots.program
        assert isinstance(program, TtsProgram)
        session.extend(request)
        slots.apply(lambda state: program.extend(state, slots.slot_of(session), request))


class SpeechSession(SpeakingSession[SpeechRequest]):
    """One request while it has a slot; the arguments are those of `SpeakingSession`."""

    def __init__(
        self,
        model: Model,
        prepared: SpeechRequest | None,
        *,
        error: DsmError | None = None,
        index: int = 0,
        progress: Callable[[float], None] | None = None,
    ):
        super().__init__(model, prepared, error=error, index=index, progress=progress)
        self._frames: list[np.ndarray] = []
        self._taken: list[int] = []
        self._prefix_left = 0  # frames of the prefix that are still to be heard

    def request(self) -> SpeechRequest:
        """Return the request as the program puts it into a slot; the first step there is the one after its prefix."""
        prepared, delay_steps = super().request(), delay_steps_of(self.model)
        assert self.model.config.lm is not None
        last, length = max(self.model.config.lm.delays), prepared.prefix_QT.shape[1]
        frames_QT = behind_text(prepared.prefix_QT, delay_steps)[:, : max(length - last, 0)]
        self._frames = [np.pad(frames_QT, ((1, 0), (0, 0)), constant_values=ZERO_TOKEN).T]
        self._prefix_left = min(length, last + delay_steps)
        return prepared

    def extend(self, request: SpeechRequest) -> None:
        """Take the request with more text at its end."""
        self._prepared, self.waits = request, False

    def read(self, outputs: StepOutputs, slot: int, part: Leave) -> None:
        """Collect what a call made in this slot."""
        count = int(outputs.count)
        framed_N, taken_N = outputs.framed_NB[:count, slot], outputs.taken_NB[:count, slot]
        self._frames.append(outputs.frames_NBM[:count, slot][framed_N])
        self._taken += outputs.step_NB[:count, slot][taken_N].tolist()
        pcm_NT = outputs.pcm_NBT[:count, slot][outputs.audible_NB[:count, slot]]
        skipped = min(self._prefix_left, len(pcm_NT))
        self._prefix_left -= skipped
        self.add_pcm(pcm_NT[skipped:].reshape(-1))
        self.waits, self.ended = bool(outputs.waits_B[slot]), bool(outputs.ended_B[slot])
        if self.ended and not outputs.complete_B[slot]:
            said, entries = len(self._taken), len(self.prepared.entries)
            self.fail(
                IncompleteSpeechError(
                    f"the text was not said to its end in {self.prepared.max_steps} frames: {said} of its {entries} "
                    "words and breaks were; allow more with max_frames, or cut the text",
                    self.speech(complete=False),
                )
            )

    def speech(self, *, complete: bool = True) -> Speech:
        """Return the speech of a session that has ended."""
        pcm_T, prefix = self.pcm_T, self.prepared.prefix_QT.shape[1]
        rate = self.model.sample_rate
        words = words_at(
            self.prepared.entries, self._taken, prefix, self.model.config.mimi.frame_rate, pcm_T.size / rate
        )
        frames_KF = np.concatenate(self._frames).T[: 1 + self.prepared.codebooks]
        text = " ".join(word.text for word in words)
        return Speech(pcm_T, rate, tuple(words), frames_KF, self.model.name, complete=complete, text=text)
