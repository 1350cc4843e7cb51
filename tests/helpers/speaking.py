"""Run the text-to-speech program, call after call, and collect the outputs of every slot.

Shape letters: B slots, K streams (text first), F frames, T samples.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from flax import nnx

from dsm_jax.checkpoints import Model
from dsm_jax.configs import ModelConfig
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.tts.program import SpeechRequest, StepOutputs, TtsProgram, TtsSettings, TtsState, Turn

_ENDLESS = 500  # steps


@dataclasses.dataclass
class Said:
    """The outputs of one slot.

    Attributes:
      frames_KF: text as fed, then codes.
      pcm_T: samples.
      taken: the step at which each entry was begun.
      steps: how many it took.
      end_step: the step at which its script ended; -1 if it did not.
    """

    frames_KF: np.ndarray
    pcm_T: np.ndarray
    taken: list[int]
    steps: int
    end_step: int

    def like(self, other: "Said", *, atol: float = 0.0) -> None:
        """Raise AssertionError unless the other is the same; `atol` is for samples only."""
        np.testing.assert_array_equal(self.frames_KF, other.frames_KF)
        assert (self.taken, self.steps, self.end_step) == (other.taken, other.steps, other.end_step)
        np.testing.assert_allclose(self.pcm_T, other.pcm_T, rtol=0, atol=atol)


class Loop:
    """A model's program, of whose calls none takes more than `settings.steps` steps."""

    def __init__(self, lm: DelayedStreamsLM, mimi: Mimi, settings: TtsSettings, requests: Sequence[SpeechRequest] = ()):
        for request in requests:
            settings = request.fitted(settings)
        config = ModelConfig(model_type="tts", lm=lm.config, mimi=mimi.config)
        self.lm, self.mimi = lm, mimi
        self.model = Model(config, *nnx.split(lm), *nnx.split(mimi), None, "loop")
        self.program = TtsProgram(self.model, settings)

    @property
    def settings(self) -> TtsSettings:
        """What the program is compiled for."""
        return self.program.settings

    def start(self, requests: Sequence[SpeechRequest | None]) -> TtsState:
        """The state before the first step, each request in its slot; None leaves a slot empty."""
        state = self.program.init()
        for slot, request in enumerate(requests):
            if request is not None:
                state = self.program.insert(state, [slot], [request])
        return state

    def call(
        self, state: TtsState, limit: int, *, allowed: Sequence[bool] | None = None, waiting: bool = False
    ) -> tuple[StepOutputs, TtsState]:
        """One call; the state is used up."""
        self.program.limit = limit
        allowed = [True] * self.program.slots if allowed is None else allowed
        return self.program.step(state, [Turn() if may else None for may in allowed], waiting=waiting)

    def go_on(
        self, state: TtsState, limits: Iterable[int] = (), *, allowed: Sequence[bool] | None = None
    ) -> tuple[list[Said], TtsState]:
        """Calls until no slot has a step to take, or after the last of `limits`; the outputs of those calls."""
        made: list[StepOutputs] = []
        for limit in limits or itertools.repeat(self.settings.steps):
            outputs, state = self.call(state, limit, allowed=allowed)
            count = int(outputs.count)
            if not count:
                break
            assert count <= limit, "more steps than were allowed"
            made.append(outputs)
            assert steps_B(state).max() < _ENDLESS, "no slot comes to its end"
        ends, steps = np.asarray(state.words.end_step_B).tolist(), steps_B(state)
        return [_said(made, slot, int(steps[slot]), end) for slot, end in enumerate(ends)], state

    def speak(self, requests: Sequence[SpeechRequest | None], limits: Iterable[int] = ()) -> list[Said]:
        """The outputs from the beginning."""
        return self.go_on(self.start(requests), limits)[0]


def steps_B(state: TtsState) -> np.ndarray:
    """The steps of every slot; a copy, as the state is donated to the next call."""
    return np.array(state.lm.position_B[: state.request.prefix_B.shape[0]])


def _said(made: list[StepOutputs], slot: int, steps: int, end_step: int) -> Said:
    if not made:
        return Said(np.zeros((0, 0)), np.zeros(0), [], steps, end_step)
    frames, framed, taken, pcm, audible, step = (
        np.concatenate([np.asarray(getattr(part, name))[: int(part.count), slot] for part in made])
        for name in ("frames_NBM", "framed_NB", "taken_NB", "pcm_NBT", "audible_NB", "step_NB")
    )
    return Said(frames[framed].T, pcm[audible].reshape(-1), step[taken].tolist(), steps, end_step)


def join(parts: Sequence[Said]) -> Said:
    """The outputs of one slot in calls one after the other."""
    some = [part for part in parts if part.frames_KF.size]
    return Said(
        np.concatenate([part.frames_KF for part in some], axis=1),
        np.concatenate([part.pcm_T for part in some]),
        [step for part in parts for step in part.taken],
        parts[-1].steps,
        parts[-1].end_step,
    )
