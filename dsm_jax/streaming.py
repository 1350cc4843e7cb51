"""The streaming contract, and operations on the rows of a streaming state.

Every streaming module has `init_state(batch_size) -> State` and `step(x, state, lengths_B=None) -> (y, state)`.
Calling the module is one `step` over the whole clip from the fresh state; there is no second, offline implementation. A
state is a pytree, of frozen and registered dataclasses or tuples of these, whose leaves have the batch as their first
axis and keep their shapes and dtypes. Modules hold parameters only. `nn.attention` alone differs: its `step` also takes
the position, which the transformer keeps for all of its layers.

Rows are independent streams. A chunk may be ragged: row b takes the first `lengths_B[b]` of its T steps, and its state
afterwards is the state after those steps. The outputs of steps that a row does not take are finite and meaningless. A
row with a length of 0 is idle: its state does not change. `lengths_B=None` means T steps in every row. Any row can be
reset to its values in a fresh state while the other rows run.

Caches of keys and values are exempt from reset: positions determine which slots of a cache are valid, so a position of
0 hides all slots, and neither a reset nor an idle row ever copies a cache.

Shape letters: B batch rows, T steps, S cache slots, K key/value heads, H head width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

# Steps that prefill runs at a time, so that scores do not grow with the square of what there is to read.
PREFILL_BLOCK = 256
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


def select_rows(mask_B: jax.Array | None, new: State, old: State) -> State:
    """Take the marked rows of `new` and the other rows of `old`.

    Caches are taken from `new` as a whole, as attention writes nothing for idle rows.

    Args:
      mask_B: bool, True for rows that ran; None means all rows.
      new: the state after the step.
      old: the state before the step.

    Returns:
      A state like `old`.
    """
    if mask_B is None:
        return new

    def pick(new_leaf: Any, old_leaf: Any) -> Any:
        return new_leaf if _is_cache(new_leaf) else _where_rows(mask_B, new_leaf, old_leaf)

    return jax.tree.map(pick, new, old, is_leaf=_is_cache)


def reset_rows(state: State, reset_B: jax.Array, fresh: State) -> State:
    """Reset the marked rows of a state to the rows of a fresh state.

    Caches are taken from `state` as a whole, as the reset positions hide their contents.

    Args:
      state: any streaming state.
      reset_B: bool, True for rows to reset.
      fresh: a state from `init_state` with the same number of rows.

    Returns:
      A state like `state`.
    """

    def take(leaf: Any, fresh_leaf: Any) -> Any:
        return leaf if _is_cache(leaf) else _where_rows(reset_B, fresh_leaf, leaf)

    return jax.tree.map(take, state, fresh, is_leaf=_is_cache)


def place_rows(state: State, slot_N: jax.Array, rows: State) -> State:
    """Put rows of one state into slots of another, in place.

    Args:
      state: any streaming state.
      slot_N: int32, the slots, all different.
      rows: a state of N rows; its caches may be shorter, if no row has taken more steps than they have slots.

    Returns:
      A state like `state`.
    """

    def write(cache_BKSH: jax.Array, new_NKSH: jax.Array) -> jax.Array:
        # One slice a row: a scatter over rows would copy the whole cache.
        for row in range(new_NKSH.shape[0]):
            cache_BKSH = jax.lax.dynamic_update_slice(cache_BKSH, new_NKSH[row : row + 1], (slot_N[row], 0, 0, 0))
        return cache_BKSH

    def place(leaf: Any, new: Any) -> Any:
        if _is_cache(leaf):
            return KVCache(write(leaf.k_BKSH, new.k_BKSH), write(leaf.v_BKSH, new.v_BKSH))
        return leaf.at[slot_N].set(new)

    return jax.tree.map(place, state, rows, is_leaf=_is_cache)


def scaled_lengths(lengths_B: jax.Array | None, steps_in: int, steps_out: int) -> jax.Array | None:
    """Convert lengths in input steps of a layer to lengths in output steps, for layers that change the rate."""
    return None if lengths_B is None else lengths_B * steps_out // steps_in


def taken_BT(lengths_B: jax.Array, steps: int) -> jax.Array:
    """Mark the steps of a chunk that each row takes, bool [B, steps]."""
    return jnp.arange(steps) < lengths_B[:, None]


def step_in_blocks(
    step: Callable[[Any, State, jax.Array | None], tuple[Any, State]],
    x: Any,
    state: State,
    lengths_B: jax.Array | None,
    block: int,
) -> tuple[Any, State]:
    """Run one long step as a scan over blocks of time, so that memory does not grow with the square of the length.

    Args:
      step: maps (chunk, state, lengths) to (output, state); time is the second axis of every leaf.
      x: the whole input, any pytree of [B, T, ...].
      state: the state before the input.
      lengths_B: int32, steps of `x` that each row takes; None for all.
      block: the longest chunk for `step`, in steps of `x`.

    Returns:
      The outputs joined in time, and the last state, as from a single `step` over `x`.
    """
    length = jax.tree.leaves(x)[0].shape[1]
    if length <= block:
        return step(x, state, lengths_B)
    blocks, rest = divmod(length, block)
    whole = blocks * block

    def to_blocks(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a[:, :whole].reshape(a.shape[0], blocks, block, *a.shape[2:]), 1, 0)

    def from_blocks(a: jax.Array) -> jax.Array:
        a = jnp.moveaxis(a, 0, 1)
        return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])

    def lengths_from(start: jax.Array | int, most: int) -> jax.Array | None:
        return None if lengths_B is None else jnp.clip(lengths_B - start, 0, most)

    def body(carry: State, part: tuple[Any, jax.Array]) -> tuple[State, Any]:
        chunk, start = part
        y, carry = step(chunk, carry, lengths_from(start, block))
        return carry, y

    state, ys = jax.lax.scan(body, state, (jax.tree.map(to_blocks, x), jnp.arange(0, whole, block)))
    y = jax.tree.map(from_blocks, ys)
    if rest:
        y_rest, state = step(jax.tree.map(lambda a: a[:, whole:], x), state, lengths_from(whole, rest))
        y = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), y, y_rest)
    return y, state
