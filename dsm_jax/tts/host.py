"""The program of a text-to-speech model on the host: requests in the sizes that they have, and compiled functions.

Shape letters: Q codebooks, T frames of a prefix, N requests of a call.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from dsm_jax.checkpoints import Model
from dsm_jax.nn.sampling import key_of
from dsm_jax.runtime.compile import compiled_over_state, plain
from dsm_jax.runtime.slots import grow
from dsm_jax.runtime.steps import Leave, step_limits
from dsm_jax.tts import voices
from dsm_jax.tts.program import extend, init_state, insert, step
from dsm_jax.tts.script import Entry, Script, capacity, pack
from dsm_jax.tts.state import ConditionValues, StepOutputs, TtsRequest, TtsSettings, TtsState

_PREFIX_STEP = 64  # the room for prefixes grows by so many frames, so that few sizes are ever compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechRequest:
    """One request on the host: what `TtsRequest` and `ConditionValues` hold of it, in the sizes that it has.

    Attributes:
      entries: the words and breaks that are known.
      complete: whether no more will come.
      voices: the vectors [steps, width] of each voice.
      condition_guidance: guidance as a condition, for models with distilled guidance; None for others.
      prefix_QT: int32 codes to go on from; T may be 0.
      seed: of the sampling.
      others: fields of `TtsRequest` of the same names without their shape letter.
    """

    entries: Sequence[Entry]
    complete: bool
    voices: Sequence[np.ndarray]
    condition_guidance: float | None
    prefix_QT: np.ndarray
    seed: int
    temperature: float
    top_k_text: int
    top_k_audio: int
    guidance: float
    padding_bonus: float
    codebooks: int
    max_padding: int
    initial_padding: int
    final_padding: int
    max_steps: int

    def fitted(self, settings: TtsSettings) -> TtsSettings:
        """Return the settings with room for this request."""
        entries, tokens = capacity([self.entries])
        return dataclasses.replace(
            settings,
            entries=max(entries, settings.entries),
            tokens=max(tokens, settings.tokens),
            voice_steps=max(voices.positions(self.voices), settings.voice_steps),
            prefix_frames=max(-(-self.prefix_QT.shape[1] // _PREFIX_STEP) * _PREFIX_STEP, settings.prefix_frames),
        )

    def script(self, settings: TtsSettings) -> Script:
        """Return the script as one row of arrays."""
        return pack([self.entries], [self.complete], room=(settings.entries, settings.tokens))

    def row(self, settings: TtsSettings) -> TtsRequest:
        """Return the request as one row of arrays."""

        def one(value: float, dtype: Any) -> np.ndarray:
            return np.array([value], dtype)

        room = settings.prefix_frames - self.prefix_QT.shape[1]
        return TtsRequest(
            key_B2=key_of(self.seed)[None],
            temperature_B=one(self.temperature, np.float32),
            top_k_text_B=one(self.top_k_text, np.int32),
            top_k_audio_B=one(self.top_k_audio, np.int32),
            guidance_B=one(self.guidance, np.float32),
            padding_bonus_B=one(self.padding_bonus, np.float32),
            codebooks_B=one(self.codebooks, np.int32),
            max_padding_B=one(self.max_padding, np.int32),
            initial_padding_B=one(self.initial_padding, np.int32),
            final_padding_B=one(self.final_padding, np.int32),
            max_steps_B=one(self.max_steps, np.int32),
            prefix_BQT=np.pad(self.prefix_QT, ((0, 0), (0, room))).astype(np.int32)[None],
            prefix_B=one(self.prefix_QT.shape[1], np.int32),
            script=self.script(settings),
        )


class TtsProgram:
    """The program for one model, compiled, with its parameters.

    Args:
      model: a text-to-speech model.
      settings: with room for the requests to come; larger ones make the program grow, which compiles it anew.
      limit: steps of a call at most.
    """

    inserts = 1  # conditions cost as much for a slot that is left as it is as for one that is filled

    def __init__(self, model: Model, settings: TtsSettings, *, limit: int | None = None):
        assert model.lm_def is not None
        assert model.lm_params is not None
        assert model.config.lm is not None
        self.slots, self.limit = settings.slots, settings.steps if limit is None else limit
        self._graphs: tuple[nnx.GraphDef, nnx.GraphDef] = model.lm_def, model.mimi_def
        self._params = plain(model.lm_params, model.mimi_params)
        self._config = model.config.lm
        self._compile(settings)

    def _compile(self, settings: TtsSettings) -> None:
        """Compile the program before any state is allocated, so that the two peaks of memory do not add up."""
        functions = init, _, _, stepping = compiled_over_state(self._graphs, settings, init_state, insert, extend, step)
        limits = step_limits([None] * self.slots, self.limit, waiting=False)
        stepping.compile(self._params, init.shapes(self._params), limits)
        # Taken over last: a compilation that fails or is interrupted leaves the program as it was.
        self.settings, (self._init, self._insert, self._extend, self._step) = settings, functions

    def fit(self, state: TtsState, request: SpeechRequest) -> TtsState:
        """Make room for a request that is larger than those before it."""
        settings = request.fitted(self.settings)
        if settings == self.settings:
            return state
        self._compile(settings)
        return grow(state, self._init.shapes(self._params))

    def init(self) -> TtsState:
        """Make the state of slots without requests."""
        return self._init(self._params)

    def insert(self, state: TtsState, slot_N: Sequence[int], requests: Sequence[SpeechRequest]) -> TtsState:
        """Put one request into one slot."""
        (slot,), (request,) = slot_N, requests
        state = self.fit(state, request)
        values, masks, length_N = {}, {}, np.zeros(1, np.int32)
        if self._config.conditioners:
            values, masks, length_N = voices.conditions(
                self._config, [request.voices], request.condition_guidance, room=self.settings.voice_steps
            )
        conditions = ConditionValues(values, masks, length_N)
        return self._insert(self._params, state, np.array([slot], np.int32), request.row(self.settings), conditions)

    def extend(self, state: TtsState, slot: int, request: SpeechRequest) -> TtsState:
        """Give a slot its script again, with more at the end."""
        state = self.fit(state, request)
        return self._extend(self._params, state, np.array([slot], np.int32), request.script(self.settings))

    def step(self, state: TtsState, parts: Sequence[Leave | None], *, waiting: bool) -> tuple[StepOutputs, TtsState]:
        """Take steps in all slots that may; return at once, with outputs that may still be computed."""
        return self._step(self._params, state, step_limits(parts, self.limit, waiting=waiting))
