"""Runs the loop that speaks, call after call, and says what came of every row.

Shape letters: B batch rows, K streams (text first), Q codebooks, P frames of a prefix, N steps of a call, F frames,
T samples.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.tts import engine
from dsm_jax.tts.engine import Manner, Steps, Told, TtsState
from dsm_jax.tts.script import Entry, pack

_ENDLESS = 500  # steps


@dataclasses.dataclass
class Said:
    """What came of one row.

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
        """Raises AssertionError unless the other said the same; `atol` is for samples only."""
        np.testing.assert_array_equal(self.frames_KF, other.frames_KF)
        assert (self.taken, self.steps, self.end_step) == (other.taken, other.steps, other.end_step)
        np.testing.assert_allclose(self.pcm_T, other.pcm_T, rtol=0, atol=atol)


class Loop:
    """A model, how it speaks, and the compiled loop, of whose calls none takes more than `most` steps."""

    def __init__(self, lm: DelayedStreamsLM, mimi: Mimi, how: Manner, batch_size: int, *, most: int):
        self.lm, self.mimi, self.how, self.most = lm, mimi, how, most
        self.init = jax.jit(lambda: engine.init_state(lm, mimi, how, batch_size))
        self.advance = jax.jit(functools.partial(_advance, how=how, most=most), donate_argnums=3)

    def call(self, told: Told, state: TtsState, limit: int) -> tuple[Steps, TtsState]:
        """One call; the state is used up."""
        return self.advance(self.lm, self.mimi, told, state, jnp.int32(limit))

    def go_on(self, told: Told, state: TtsState, limits: Iterable[int] = ()) -> tuple[list[Said], TtsState]:
        """Calls until no row has a step to take, or after the last of `limits`; what came of those calls."""
        made, from_B = [], _steps_B(state)
        for limit in limits or itertools.repeat(self.most):
            steps, state = self.call(told, state, limit)
            count, after_B = int(steps.count), _steps_B(state)
            if not count:
                break
            assert count <= limit, "more steps than were allowed"
            # A row that stops within a call does not go on in it, so its steps are the first of the call.
            frames, framed, taken, pcm, audible = (np.asarray(getattr(steps, name))[:count] for name in _COLUMNS)
            made.append((frames, framed, taken, pcm, audible, from_B + np.arange(count)[:, None]))
            from_B = after_B
            assert from_B.max() < _ENDLESS, "no row comes to its end"
        ends = np.asarray(state.words.end_step_B).tolist()
        return [_said(made, row, int(from_B[row]), end) for row, end in enumerate(ends)], state

    def speak(self, told: Told, limits: Iterable[int] = ()) -> list[Said]:
        """What is said from the beginning."""
        return self.go_on(told, self.init(), limits)[0]


_COLUMNS = ("frames_NBK", "framed_NB", "taken_NB", "pcm_NBT", "audible_NB")


@jax.jit
def condition(lm: DelayedStreamsLM, values: dict[str, jax.Array], masks: dict[str, jax.Array]) -> Conditions:
    """`lm.condition`, compiled."""
    return lm.condition(values, masks)


def _advance(
    lm: DelayedStreamsLM, mimi: Mimi, told: Told, state: TtsState, limit: jax.Array, how: Manner, most: int
) -> tuple[Steps, TtsState]:
    return engine.advance(lm, mimi, told, state, limit, how, most=most)


def _steps_B(state: TtsState) -> np.ndarray:
    """A copy: the state is donated to the next call."""
    return np.array(state.lm.position_B[: state.ring_BKS.shape[0]])


def _said(made: list[tuple[np.ndarray, ...]], row: int, steps: int, end_step: int) -> Said:
    if not made:
        return Said(np.zeros((0, 0)), np.zeros(0), [], steps, end_step)
    frames, framed, taken, pcm, audible, step = (
        np.concatenate([part[:, row] for part in column]) for column in zip(*made, strict=True)
    )
    return Said(frames[framed].T, pcm[audible].reshape(-1), step[taken].tolist(), steps, end_step)


def join(parts: Sequence[Said]) -> Said:
    """What calls one after the other said of one row."""
    some = [part for part in parts if part.frames_KF.size]
    return Said(
        np.concatenate([part.frames_KF for part in some], axis=1),
        np.concatenate([part.pcm_T for part in some]),
        [step for part in parts for step in part.taken],
        parts[-1].steps,
        parts[-1].end_step,
    )


def tell(
    rows: Sequence[Sequence[Entry]],
    conditions: Conditions | None,
    keys_B: jax.Array,
    *,
    complete: Sequence[bool] | None = None,
    prefixes: Sequence[np.ndarray] | None = None,
    room: tuple[int, int] = (1, 0),
    bonus: Sequence[float] | None = None,
) -> Told:
    """What rows are told: entries, and codes [Q, P] of a recording, for which there is room for [Q, P] in all."""
    given_BQP, lengths = np.zeros((len(rows), *room), np.int32), [0] * len(rows)
    for row, prefix in enumerate(prefixes or []):
        given_BQP[row, :, : prefix.shape[1]], lengths[row] = prefix, prefix.shape[1]
    return Told(
        pack(rows, complete),
        conditions,
        jnp.asarray(given_BQP),
        jnp.array(lengths, jnp.int32),
        jnp.array(bonus or [0.0] * len(rows), jnp.float32),
        keys_B,
    )
