"""The streaming contract, and what may be done to the rows of a streaming state.

Every streaming module has `init_state(batch_size) -> State` and `step(x, state, active_B=None) -> (y, state)`. Calling
the module is one `step` over the whole clip from the empty state; there is no second, offline implementation. A state
is a frozen, registered dataclass whose leaves have the batch as their first axis and keep their shapes and dtypes.
Modules hold parameters only. Rows are independent streams: a row whose `active_B` is False is left untouched (what the
step returns for it is finite and means nothing), and any row can be reset while the others run.

A fresh state is all zeros, so resetting a row means zeroing its leaves. Caches of keys and values are the exception:
positions decide which of their slots are valid, so zeroing the position hides them, and neither reset nor an idle row
ever has to copy a cache.

Shape letters: B batch rows, T steps, S cache slots, K key/value heads, H head width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A ring of the last S keys and values of one attention layer; position p lives in slot p % S."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache)


def _where_rows(mask_B: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(mask_B.reshape(mask_B.shape + (1,) * (new.ndim - 1)), new, old)


def select_rows(active_B: jax.Array | None, new: State, old: State) -> State:
    """Takes the active rows of `new` and the idle rows of `old`.

    Caches are taken from `new` whole: attention has already kept idle rows from writing.

    Args:
      active_B: which rows ran; None means all of them.
      new: the state after the step.
      old: the state before it.

    Returns:
      A state like `old`.
    """
    if active_B is None:
        return new

    def pick(new_leaf: Any, old_leaf: Any) -> Any:
        return new_leaf if _is_cache(new_leaf) else _where_rows(active_B, new_leaf, old_leaf)

    return jax.tree.map(pick, new, old, is_leaf=_is_cache)


def reset_rows(state: State, reset_B: jax.Array) -> State:
    """Makes the rows where `reset_B` is True equal to a fresh stream and leaves the others alone.

    Args:
      state: any streaming state.
      reset_B: bool, one entry per row.

    Returns:
      A state like `state`.
    """

    def clear(leaf: Any) -> Any:
        return leaf if _is_cache(leaf) else _where_rows(reset_B, jnp.zeros_like(leaf), leaf)

    return jax.tree.map(clear, state, is_leaf=_is_cache)


def step_in_blocks(
    step: Callable[[Any, State], tuple[Any, State]], x: Any, state: State, block: int
) -> tuple[Any, State]:
    """Runs one long step as a scan over blocks of time, so that memory does not grow with its square.

    Args:
      step: maps (chunk, state) to (output, state); time is the second axis of every leaf.
      x: the whole input, any pytree of [B, T, ...].
      state: the state before it.
      block: the longest chunk `step` is given, in steps of `x`.

    Returns:
      What `step` would return for the whole of `x`: the outputs joined in time, and the last state.
    """
    length = jax.tree.leaves(x)[0].shape[1]
    if length <= block:
        return step(x, state)
    blocks, rest = divmod(length, block)
    whole = blocks * block

    def to_blocks(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a[:, :whole].reshape(a.shape[0], blocks, block, *a.shape[2:]), 1, 0)

    def from_blocks(a: jax.Array) -> jax.Array:
        a = jnp.moveaxis(a, 0, 1)
        return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])

    def body(carry: State, chunk: Any) -> tuple[State, Any]:
        y, carry = step(chunk, carry)
        return carry, y

    state, ys = jax.lax.scan(body, state, jax.tree.map(to_blocks, x))
    y = jax.tree.map(from_blocks, ys)
    if rest:
        y_rest, state = step(jax.tree.map(lambda a: a[:, whole:], x), state)
        y = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), y, y_rest)
    return y, state
