"""Random scripts, a plain-Python word machine as the oracle, and the compiled machine over many steps.

Shape letters: T steps, B batch rows.
"""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from dsm_jax.streaming import select_rows
from dsm_jax.tts import words
from dsm_jax.tts.script import Entry, Script, pack
from dsm_jax.tts.words import WordMachine, WordState

STEPS = 64
CARD = 50


@dataclasses.dataclass(frozen=True)
class Rules:
    """A word machine, with the settings that requests choose."""

    second_stream_ahead: int
    max_padding: int = 8
    initial_padding: int = 2
    card: int = CARD

    @property
    def machine(self) -> WordMachine:
        return WordMachine(self.card, self.second_stream_ahead)

    def init_state(self, rows: int) -> WordState:
        return words.init_state(
            jnp.full(rows, self.max_padding, jnp.int32), jnp.full(rows, self.initial_padding, jnp.int32)
        )


# Few, as each is compiled: every lookahead, with the smallest and the default paddings.
MACHINES = (
    Rules(0),
    Rules(0, max_padding=1, initial_padding=0),
    Rules(1, max_padding=3, initial_padding=1),
    Rules(2),
    Rules(2, max_padding=0, initial_padding=0),
    Rules(3, max_padding=5, initial_padding=4),
)
# Sampled text tokens: two words, pauses and other text.
CHOICES = (0, 0, 3, 3, 3, 1, 17, 49)

entries = st.one_of(
    st.builds(Entry, st.just(()), st.just(""), st.integers(0, 9)),
    st.builds(
        lambda tokens, padding: Entry(tuple(tokens), "word", padding),
        st.lists(st.integers(4, CARD - 2), min_size=1, max_size=6),
        st.sampled_from([0, 0, 1, 3, 7]),
    ),
)
scripts = st.lists(entries, max_size=14)
choices = st.lists(st.sampled_from(CHOICES), min_size=1, max_size=40).map(
    lambda some: list(itertools.islice(itertools.cycle(some), STEPS))
)
rows = st.tuples(*[st.tuples(scripts, choices)] * 3)


class Oracle:
    """The oracle for one row, written from the description of the reference's machine, with queues of tokens."""

    def __init__(self, machine: Rules, script: Sequence[Entry]):
        self.machine, self.entries = machine, deque(script)
        self.main, self.ahead = deque(), deque()
        self.remaining = self.forced = machine.initial_padding
        self.end_step = -1

    def step(self, number: int, sampled: int) -> tuple[int, bool]:
        word = sampled == 0
        if self.main or self.forced > 0:
            word = False
        elif self.remaining <= 0:
            word = True
        taken = word and bool(self.entries)
        if taken:
            word = self.take(self.entries.popleft())
        elif word:
            word = self.end(number)
        first, second = self.word() if word else self.pad()
        return (second + 1) * self.machine.card + first if self.machine.second_stream_ahead else first, taken

    def take(self, entry: Entry) -> bool:
        self.forced = entry.padding
        if not entry.tokens:
            return False
        self.main.extend(entry.tokens)
        if self.machine.second_stream_ahead:
            self.look_ahead()
        self.remaining = self.machine.max_padding
        return True

    def look_ahead(self) -> None:
        following = [entry.tokens for entry in self.entries if entry.tokens]
        for tokens in following[self.machine.second_stream_ahead - 1 :][:1]:
            self.ahead.extend(tokens)

    def end(self, number: int) -> bool:
        first_time = self.end_step == -1
        if first_time:
            self.end_step = number
        return first_time and self.machine.second_stream_ahead > 0

    def word(self) -> tuple[int, int]:
        if not self.machine.second_stream_ahead:
            return 0, -1
        return (self.main.popleft() if self.main else 3), 0

    def pad(self) -> tuple[int, int]:
        self.remaining, self.forced = max(self.remaining - 1, 0), max(self.forced - 1, 0)
        return (self.main.popleft() if self.main else 3), (self.ahead.popleft() if self.ahead else -1)


def oracle_run(oracle: Oracle, sampled_T: Sequence[int]) -> tuple[list[int], list[bool], int]:
    """Run the oracle; return the input tokens, whether each step took an entry, and the step of the script's end."""
    fed_T, taken_T = zip(*(oracle.step(number, token) for number, token in enumerate(sampled_T)), strict=True)
    return list(fed_T), list(taken_T), oracle.end_step


@functools.partial(jax.jit, static_argnums=0)
def advance(
    rules: Rules, script: Script, state: WordState, step_B: jax.Array, sampled_BT: jax.Array
) -> tuple[WordState, jax.Array, tuple[jax.Array, ...]]:
    """Run STEPS steps of the rows that are ready and have steps left; return the state, their steps, and a log.

    The log has, per step, whether the row ran, its input, whether it took an entry, and the state before.
    """

    machine = rules.machine

    def body(carry: tuple, _: None) -> tuple:
        state, step_B = carry
        sampled_B = jnp.take_along_axis(sampled_BT, step_B[:, None], axis=1, mode="clip")[:, 0]
        active_B = words.ready_B(machine, script, state) & (step_B < STEPS)
        fed_B, taken_B, after = words.process(machine, script, state, sampled_B, step_B)
        carry = select_rows(active_B, after, state), step_B + active_B.astype(jnp.int32)
        return carry, (active_B, fed_B, taken_B, state)

    (state, step_B), told_TB = jax.lax.scan(body, (state, step_B), None, length=STEPS)
    return state, step_B, told_TB


def run(
    machine: Rules, scripts_B: Sequence[Sequence[Entry]], sampled_BT: Sequence[Sequence[int]]
) -> list[tuple[list[int], list[bool], int]]:
    """Run the compiled machine for every row, with the results of `oracle_run`."""
    count = len(scripts_B)
    state, _, (active_TB, fed_TB, taken_TB, _) = advance(
        machine,
        pack(scripts_B),
        machine.init_state(count),
        jnp.zeros(count, jnp.int32),
        jnp.array(sampled_BT, jnp.int32),
    )
    assert np.all(active_TB), "a complete script never waits"
    columns = (np.asarray(array).T.tolist() for array in (fed_TB, taken_TB))
    return list(zip(*columns, state.end_step_B.tolist(), strict=True))


def faults(
    machine: Rules, scripts_B: Sequence[Sequence[Entry]], sampled_BT: Sequence[Sequence[int]], make: Callable
) -> list[str]:
    """List the differences between the compiled machine and `make(machine, script)`, at most one line per row."""
    lines = []
    for row, ours in enumerate(run(machine, scripts_B, sampled_BT)):
        theirs = oracle_run(make(machine, scripts_B[row]), sampled_BT[row])
        lines += [
            f"row {row}: {name} {mine} and {other}"
            for name, mine, other in zip(("fed", "taken", "ended"), ours, theirs, strict=True)
            if mine != other
        ][:1]
    return lines
