"""Run the text-to-speech program call by call, and collect the outputs of every slot.

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
from dsm_jax.runtime.steps import Leave
from dsm_jax.tts.host import SpeechRequest, TtsProgram
from dsm_jax.tts.state import StepOutputs, TtsSettings, TtsState

_ENDLESS = 500  # steps


@dataclasses.dataclass
class Said:
    """The outputs of one slot.

    Attributes:
      frames_KF: text as fed, then codes.
      pcm_T: samples.
      taken: the step at which each entry started.
      steps: number of steps.
      end_step: the step at which the script ended; -1 if it has not ended.
    """

    frames_KF: np.ndarray
    pcm_T: np.ndarray
    taken: list[int]
    steps: int
    end_step: int

    def like(self, other: "Said", *, atol: float = 0.0) -> None:
        """Raise AssertionError unless `other` is the same; `atol` is for samples only."""
        np.testing.assert_array_equal(self.frames_KF, other.frames_KF)
        assert (self.taken, self.steps, self.end_step) == (other.taken, other.steps, other.end_step)
        np.testing.assert_allclose(self.pcm_T, other.pcm_T, rtol=0, atol=atol)


class Loop:
    """A model's program, whose calls take at most `settings.steps` steps."""

    def __init__(self, lm: DelayedStreamsLM, mimi: Mimi, settings: TtsSettings, requests: Sequence[SpeechRequest] = ()):
        for request in requests:
            settings = request.fitted(settings)
        config = ModelConfig(model_type="tts", lm=lm.config, mimi=mimi.config)
        self.lm, self.mimi = lm, mimi
        self.model = Model(config, *nnx.split(lm), *nnx.split(mimi), None, "loop")
        self.program = TtsProgram(self.model, settings)

    @property
    def settings(self) -> TtsSettings:
        """The settings that the program is compiled for."""
        return self.program.settings

    def start(self, requests: Sequence[SpeechRequest | None]) -> TtsState:
        """Make the state before the first step, with each request in its slot; None leaves a slot empty."""
        state = self.program.init()
        for slot, request in enumerate(requests):
            if request is not None:
                state = self.program.insert(state, [slot], [request])
        return state

    def call(
        self, state: TtsState, limit: int, *, allowed: Sequence[bool] | None = None, waiting: bool = False
    ) -> tuple[StepOutputs, TtsState]:
        """Run one call; donates the state."""
        self.program.limit = limit
        allowed = [True] * self.program.slots if allowed is None else allowed
        return self.program.step(state, [Leave() if may else None for may in allowed], waiting=waiting)

    def go_on(
        self, state: TtsState, limits: Iterable[int] = (), *, allowed: Sequence[bool] | None = None
    ) -> tuple[list[Said], TtsState]:
        """Call until no slot has a step to take, or `limits` end; return the outputs of these calls."""
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
        """Run requests from the beginning; return the outputs."""
        return self.go_on(self.start(requests), limits)[0]


def steps_B(state: TtsState) -> np.ndarray:
    """Copy the steps of every slot, as the next call donates the state."""
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
    """Join the outputs of one slot over consecutive calls."""
    some = [part for part in parts if part.frames_KF.size]
    return Said(
        np.concatenate([part.frames_KF for part in some], axis=1),
        np.concatenate([part.pcm_T for part in some]),
        [step for part in parts for step in part.taken],
        parts[-1].steps,
        parts[-1].end_step,
    )
