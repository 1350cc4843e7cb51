"""Steps of generation on the device: one call takes as many as it may, and nothing leaves the device between them.

Shape letters: docs/axes.md; N steps of a call.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # of jax or numpy: the host fills inputs, the device holds them
State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Leave:
    """The input of one slot for one call: permission to take steps."""

    last: bool = False  # a slot's end is known once its outputs have been read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepLimits:
    """The extent of a call.

    Attributes:
      limit: int32 [], steps at most.
      allowed_B: bool, slots that may take steps: those that hold a request and whose listener keeps up.
      until_free: bool [], whether the call ends once an allowed slot has ended, so that it can take the next request.
    """

    limit: Array
    allowed_B: Array
    until_free: Array


def step_limits(parts: Sequence[Leave | None], limit: int, *, waiting: bool) -> StepLimits:
    """Return the extent of a call for the inputs of its slots.

    Args:
      parts: input of each slot; None for slots that may not take steps.
      limit: steps at most.
      waiting: whether requests wait for a slot.
    """
    return StepLimits(np.int32(limit), np.array([part is not None for part in parts]), np.bool_(waiting))


def take_steps(
    take: Callable[[State, jax.Array], tuple[Any, State]],
    state: State,
    columns: Any,
    limits: StepLimits,
    *,
    ended_B: Callable[[State], jax.Array],
    waits_B: Callable[[State], jax.Array] | None = None,
) -> tuple[jax.Array, Any, State]:
    """Take up to `limit` steps, fewer when no slot has any left to take.

    Args:
      take: takes one step, from the state and the mask of active slots [B] to the step's outputs and the next state.
      state: state of all slots.
      columns: zeros for the outputs of all steps, a tree of arrays [N, ...]; N is the static limit of the steps.
      limits: extent of the call.
      ended_B: marks the slots that take no steps any more.
      waits_B: marks the slots that can take no step for now; None where no slot ever waits.

    Returns:
      The number of steps that were taken, `columns` with their outputs, and the next state.
    """

    def active_B(state: State) -> jax.Array:
        ready_B = limits.allowed_B & ~ended_B(state)
        return ready_B if waits_B is None else ready_B & ~waits_B(state)

    def goes_on(carry: tuple[jax.Array, Any, State]) -> jax.Array:
        count, _, state = carry
        free = limits.until_free & (limits.allowed_B & ended_B(state)).any()
        return (count < jnp.minimum(limits.limit, room)) & active_B(state).any() & ~free

    def one(carry: tuple[jax.Array, Any, State]) -> tuple[jax.Array, Any, State]:
        count, columns, state = carry
        made, state = take(state, active_B(state))
        return count + 1, jax.tree.map(lambda column, new: column.at[count].set(new), columns, made), state

    room = jax.tree.leaves(columns)[0].shape[0]
    return jax.lax.while_loop(goes_on, one, (jnp.zeros((), jnp.int32), columns, state))
