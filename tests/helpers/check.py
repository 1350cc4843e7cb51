"""Check the streaming contract (`dsm_jax.streaming`) of any module with `init_state`, `step` and `__call__`.

Shape letters: B batch rows, T time steps.
"""

import functools
from typing import Any

import jax
import numpy as np

from dsm_jax.streaming import KVCache, reset_rows
from tests.helpers.optimized import compile_optimized

CUTS = (1, 5)  # chunk lengths to draw from, in blocks; few, as each is a compilation


def check_streaming(
    module: Any, x: Any, *, block: int = 1, window: int = 0, atol: float, seeds: tuple[int, ...] = (0, 1)
) -> None:
    """Raise AssertionError, naming the clause, unless the module keeps the streaming contract.

    Args:
      module: `init_state(batch_size)`, `step(x, state, lengths_B)` and `__call__(x)`.
      x: the clip, any pytree of arrays [B, T, ...] with at least 2 rows; the rows must differ.
      block: T of a chunk is a multiple of this many steps.
      window: the module's attention window, in steps of `x`. The clip must be longer than 3 windows, so that chunks
        begin before, at and past the point where a ring is full.
      atol: largest difference between outputs of two cuts of the same clip; everything else is compared bit for bit.
      seeds: seeds of the random cuts.

    Raises:
      AssertionError: the module breaks the contract.
      ValueError: the clip is too short or has one row, so that the check could not fail.
    """
    check = _Check(module, x, block, atol)
    if check.rows < 2 or check.steps <= 3 * max(window, block * max(CUTS)) or check.steps % block:
        raise ValueError(
            f"the clip has {check.rows} rows of {check.steps} steps; a check with window {window} and block {block} "
            f"needs 2 rows or more, a multiple of {block}, and more than 3 windows and 3 chunks of {max(CUTS)} blocks"
        )
    check.cuts(np.ones(check.steps // block, int) * block)
    for seed in seeds:
        random = np.random.default_rng(seed)
        check.cuts(check.draw(random, check.steps))
        check.row_isolation(random)
        check.reset(random)
        check.ragged_rows(random)


def check_in_place(step: Any, x: Any, state: Any) -> None:
    """Raise AssertionError unless the step, compiled as users do, updates a donated state's caches in place.

    Args:
      step: maps (x, state) to (y, state).
      x: one chunk.
      state: holds at least one KVCache, much larger than everything else in the step.

    Raises:
      AssertionError: a cache is copied.
    """
    memory = compile_optimized(jax.jit(step, donate_argnums=1).lower(x, state)).memory_analysis()
    caches = [c for c in jax.tree.leaves(state, is_leaf=_is_cache) if _is_cache(c)]
    one, every = (sum(a.nbytes for a in jax.tree.leaves(tree)) for tree in (caches[0], caches))
    assert memory.alias_size_in_bytes >= every, (
        f"donation: {memory.alias_size_in_bytes} bytes are updated in place, the caches have {every}"
    )
    assert memory.temp_size_in_bytes < one, (
        f"copies: the step needs {memory.temp_size_in_bytes} bytes besides its state, the cache of a layer has {one}"
    )


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache)


class _Check:
    def __init__(self, module: Any, x: Any, block: int, atol: float):
        self.module, self.block, self.atol = module, block, atol
        self.x = jax.tree.map(np.asarray, x)
        self.rows, self.steps = jax.tree.leaves(self.x)[0].shape[:2]
        self.jit_step = jax.jit(module.step)
        self.whole = _numpy(jax.jit(module.__call__)(x))
        self.fresh = module.init_state(self.rows)
        self.kinds = jax.tree.map(jax.typeof, self.fresh)
        _expect_finite("whole", self.whole)

    def draw(self, random: np.random.Generator, steps: int) -> list[int]:
        """Draw chunk lengths that add up to `steps`."""
        lengths = []
        while left := (steps - sum(lengths)) // self.block:
            lengths.append(int(random.choice([cut for cut in CUTS if cut <= left])) * self.block)
        return lengths

    def step(self, x: Any, state: Any, lengths_B: Any = None) -> tuple[Any, Any]:
        y, state = self.jit_step(x, state, lengths_B)
        kinds = jax.tree.map(jax.typeof, state)
        assert kinds == self.kinds, f"shapes: a step turned a state of {self.kinds} into one of {kinds}"
        return _numpy(y), state

    def run(self, x: Any, state: Any, lengths: Any) -> tuple[Any, Any]:
        """Feed `x` in chunks of these lengths; return the outputs joined, and the last state."""
        outputs, start = [], 0
        for length in lengths:
            y, state = self.step(jax.tree.map(lambda a, s=slice(start, start + length): a[:, s], x), state)
            outputs.append(y)
            start += length
        return _join(outputs), state

    def cuts(self, lengths: Any) -> None:
        y, _ = self.run(self.x, self.fresh, lengths)
        _expect_close(f"cuts: chunks of {sorted(set(map(int, lengths)))} steps", y, self.whole, self.atol)

    def row_isolation(self, random: np.random.Generator) -> None:
        lengths = self.draw(random, self.steps)
        other = jax.tree.map(lambda a: np.concatenate([a[:1], np.roll(a[1:], 1, axis=1)]), self.x)
        y, _ = self.run(self.x, self.fresh, lengths)
        y_other, _ = self.run(other, self.fresh, lengths)
        _expect_close("rows: row 0 depends on the input of row 1", _row(y_other, 0), _row(y, 0), 0)

    def reset(self, random: np.random.Generator) -> None:
        middle = self.steps // self.block // 2 * self.block
        _, state = self.run(self.x, self.fresh, self.draw(random, middle))
        after = jax.tree.map(lambda a: a[:, middle:], self.x)
        lengths = self.draw(random, self.steps - middle)
        row = int(random.integers(self.rows))
        cleared = reset_rows(state, np.arange(self.rows) == row, self.fresh)
        assert jax.tree.map(jax.typeof, cleared) == self.kinds, "shapes: a reset changed the state's shapes or dtypes"
        y, _ = self.run(after, cleared, lengths)
        y_fresh, _ = self.run(after, self.fresh, lengths)
        y_went_on, _ = self.run(after, state, lengths)
        for r in range(self.rows):
            if r == row:
                _expect_close("reset: the row is not as a fresh stream", _row(y, r), _row(y_fresh, r), 0)
            else:
                _expect_close("reset: another row changed", _row(y, r), _row(y_went_on, r), 0)

    def ragged_rows(self, random: np.random.Generator) -> None:
        """Check rows that take different numbers of a chunk's steps, with data of another row in the steps after."""
        taken_B = np.zeros(self.rows, int)
        state, outputs, first = self.fresh, [[] for _ in range(self.rows)], True
        while (taken_B < self.steps).any():
            length = self.draw(random, self.steps - taken_B.min())[0]
            # Idle, whole and partial chunks are equally likely.
            part_B = random.integers(0, length // self.block + 1, size=self.rows) * self.block
            lengths_B = np.stack([np.zeros_like(part_B), np.full_like(part_B, length), part_B])[
                random.integers(3, size=self.rows), np.arange(self.rows)
            ]
            lengths_B = np.minimum(lengths_B, self.steps - taken_B).astype(np.int32)
            if first:
                lengths_B[0], first = 0, False
            before = state
            y, state = self.step(self.fed(taken_B, lengths_B, length), state, lengths_B)
            _expect_finite("idle", y)
            for r, n in enumerate(lengths_B):
                if n:
                    outputs[r].append(jax.tree.map(functools.partial(_first_steps, row=r, taken=n, of=length), y))
                else:
                    _expect_close("idle: the row's state changed", _row(_numpy(state), r), _row(_numpy(before), r), 0)
            taken_B = taken_B + lengths_B
        for r in range(self.rows):
            wanted = jax.tree.map(lambda a, r=r: a[r : r + 1], self.whole)
            _expect_close("ragged: the row is not as with its own steps alone", _join(outputs[r]), wanted, self.atol)

    def fed(self, taken_B: np.ndarray, lengths_B: np.ndarray, length: int) -> Any:
        """Make a chunk of every row's next steps, filled up with steps of the row before it."""

        def chunk(a: np.ndarray) -> np.ndarray:
            first_B = np.minimum(taken_B, self.steps - length)
            rows = [
                np.concatenate([a[r, at : at + n], a[r - 1, start + n : start + length]])
                for r, (at, n, start) in enumerate(zip(taken_B, lengths_B, first_B, strict=True))
            ]
            return np.stack(rows)

        return jax.tree.map(chunk, self.x)


def _numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _row(tree: Any, row: int) -> Any:
    return jax.tree.map(lambda a: a[row], tree)


def _first_steps(a: np.ndarray, *, row: int, taken: int, of: int) -> np.ndarray:
    """Return the outputs of the first `taken` of a chunk's `of` steps, at the output's rate."""
    return a[row : row + 1, : taken * a.shape[1] // of]


def _join(outputs: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *outputs)


def _expect_finite(clause: str, tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf.astype(np.float64)).all(), f"{clause}: an output is not finite"


def _expect_close(clause: str, found: Any, wanted: Any, atol: float) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted), f"{clause}: {found} is not made like {wanted}"
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape, f"{clause}: {a.shape}, expected {b.shape}"
        worst = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0)
        assert worst <= atol, f"{clause}: off by {worst:.2g}, at most {atol:.2g} is allowed"
