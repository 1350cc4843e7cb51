"""The word machine. That the reference's does the same is in tests/parity/test_words.py."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.errors import ConfigError
from dsm_jax.tts import words
from dsm_jax.tts.script import Entry, Script, pack
from dsm_jax.tts.words import WordMachine, WordState
from tests.helpers import word_scripts
from tests.helpers.word_scripts import CARD, CHOICES, MACHINES, STEPS, Oracle, Rules, advance, faults, run

machines = st.sampled_from(MACHINES)


def word(*tokens: int, padding: int = 0) -> Entry:
    return Entry(tokens, "word", padding)


def pause(padding: int) -> Entry:
    return Entry((), "", padding)


def split(fed_T: list[int]) -> list[tuple[int, int]]:
    """Return the first and the second token of each step."""
    return [(token % CARD, token // CARD - 1) for token in fed_T]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(machines, word_scripts.rows)
def test_every_step_is_the_oracles(machine, rows):
    scripts_B, sampled_BT = zip(*rows, strict=True)
    assert faults(machine, scripts_B, sampled_BT, Oracle) == []


class BreakStartsTheCount(Oracle):
    def take(self, entry):
        word = super().take(entry)
        self.remaining = self.machine.max_padding
        return word


class BreaksAreWordsAhead(Oracle):
    def look_ahead(self):
        for entry in list(self.entries)[self.machine.second_stream_ahead - 1 :][:1]:
            self.ahead.extend(entry.tokens)


class AheadIsReplaced(Oracle):
    def look_ahead(self):
        self.ahead.clear()
        super().look_ahead()


class AheadMovesWithWords(Oracle):
    def word(self):
        if self.ahead:
            self.ahead.popleft()
        return super().word()


class WordsCountAsSteps(Oracle):
    def word(self):
        self.remaining -= 1
        return super().word()


class BreakIsShort(Oracle):
    def take(self, entry):
        word = super().take(entry)
        self.forced -= not word
        return word


class EndIsTheLast(Oracle):
    def end(self, number):
        word = super().end(number)
        self.end_step = number
        return word


class EndIsNotMarked(Oracle):
    def end(self, number):
        super().end(number)
        return False


PLANTED = (
    BreakStartsTheCount,
    BreaksAreWordsAhead,
    AheadIsReplaced,
    AheadMovesWithWords,
    WordsCountAsSteps,
    BreakIsShort,
    EndIsTheLast,
    EndIsNotMarked,
)


def fixed_rows(seed: int) -> tuple[list, list]:
    """Three rows of words and breaks, and what the model chose."""
    draw = random.Random(seed)

    def entry() -> Entry:
        if draw.random() < 0.25:
            return pause(draw.randrange(6))
        return word(*draw.choices(range(4, CARD - 1), k=draw.randint(1, 6)), padding=draw.choice([0, 0, 4]))

    return [[entry() for _ in range(8)] for _ in range(3)], [draw.choices(CHOICES, k=STEPS) for _ in range(3)]


@pytest.mark.parametrize("planted", [Oracle, *PLANTED])
def test_the_comparison_finds_planted_faults(planted):
    found = [line for seed in range(6) for line in faults(MACHINES[3], *fixed_rows(seed), planted)]
    assert bool(found) == (planted is not Oracle)


def test_a_word_is_marked_and_then_fed_when_the_model_reads_one_stream():
    machine = MACHINES[0]
    ((fed_T, taken_T, end_step),) = run(machine, [[word(4, 5), pause(3), word(6)]], [[3] * 4 + [0] * (STEPS - 4)])
    # The first word is ordered after two pads. The pause takes its own step and two more.
    assert fed_T[:12] == [3, 3, 0, 4, 5, 3, 3, 3, 0, 6, 3, 3]
    assert np.flatnonzero(taken_T).tolist() == [2, 5, 8]
    assert end_step == 10


def test_the_second_stream_marks_words_and_reads_ahead_in_one_stretch():
    script = [word(4), pause(1), word(5), word(6, 7, 8), word(9, 10), word(11)]
    ((fed_T, taken_T, end_step),) = run(MACHINES[4], [script], [[0] * STEPS])
    # Words of one token follow each other so fast that what is ahead of them is fed later, in order.
    assert split(fed_T)[:10] == [
        (4, 0), (3, 6), (5, 0), (6, 0), (7, 7), (8, 8), (9, 0), (10, 9), (11, 0), (3, 0),
    ]  # fmt: skip
    assert split(fed_T)[10:13] == [(3, 10), (3, 11), (3, -1)]
    assert np.flatnonzero(taken_T).tolist() == [0, 1, 2, 3, 6, 8]
    assert end_step == 9


def test_rows_do_not_see_each_other():
    a, sampled_a = fixed_rows(0)
    b, sampled_b = fixed_rows(1)
    alone = run(MACHINES[3], a, sampled_a)
    mixed = run(MACHINES[3], [b[0], a[1], b[2]], [sampled_b[0], sampled_a[1], sampled_b[2]])
    assert mixed[1] == alone[1]
    assert mixed[0] != alone[0]


def test_scripts_of_different_lengths_share_one_program():
    compiled = jax.jit(advance, static_argnums=0)
    state, step_B = MACHINES[3].init_state(1), jnp.zeros(1, jnp.int32)
    for length in (0, 1, 30, 1000):
        compiled(MACHINES[3], pack([[word(4, 5, 6)] * length]), state, step_B, jnp.zeros((1, STEPS), jnp.int32))
    assert compiled._cache_size() == 1


@st.composite
def growths(draw) -> list[list[int]]:
    """For each of several rounds, how many entries of each of three rows are known; a row never shrinks."""
    rounds = draw(st.lists(st.tuples(*[st.integers(0, 14)] * 3), min_size=1, max_size=5))
    return np.maximum.accumulate(np.array(rounds), axis=0).tolist()


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(machines, word_scripts.rows, growths())
def test_a_script_that_grows_gives_the_steps_of_the_whole_script(machine, rows, growth):
    scripts_B, sampled_BT = zip(*rows, strict=True)
    state, step_B = machine.init_state(3), jnp.zeros(3, jnp.int32)
    fed_B, taken_B = [[], [], []], [[], [], []]
    for known in [*growth, None]:
        script = (
            pack([entries[:count] for entries, count in zip(scripts_B, known, strict=True)], [False] * 3)
            if known
            else pack(scripts_B)
        )
        state, step_B, told_TB = advance(machine, script, state, step_B, jnp.array(sampled_BT, jnp.int32))
        active_TB, fed_TB, taken_TB = (np.asarray(array) for array in told_TB[:3])
        for row in range(3):
            fed_B[row] += fed_TB[active_TB[:, row], row].tolist()
            taken_B[row] += taken_TB[active_TB[:, row], row].tolist()
    grown = list(zip(fed_B, taken_B, state.end_step_B.tolist(), strict=True))
    assert grown == run(machine, scripts_B, sampled_BT)


compiled_ready = jax.jit(words.ready_B, static_argnums=0)
compiled_process = jax.jit(words.process, static_argnums=0)


def each_step(rules: Rules, script: Script, state: WordState, token: int) -> np.ndarray:
    """Take one step from each of STEPS states; return [STEPS, fed token, whether taken, and the state after]."""
    sampled_T = jnp.full(STEPS, token, jnp.int32)
    fed_T, taken_T, after = compiled_process(
        rules.machine, script, state, sampled_T, jnp.arange(STEPS, dtype=jnp.int32)
    )
    return np.stack([fed_T, taken_T, *jax.tree.leaves(after)], axis=1)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(machines, word_scripts.scripts, word_scripts.choices, st.integers(0, 14))
def test_a_row_waits_exactly_where_text_to_come_would_change_its_step(machine, entries, sampled_T, known):
    whole = entries + [word(4 + n, 5) for n in range(4)]  # some text is still to come, and enough to look ahead
    state = machine.init_state(1)
    *_, (_, _, _, state_T1) = advance(
        machine, pack([whole]), state, jnp.zeros(1, jnp.int32), jnp.array([sampled_T], jnp.int32)
    )
    state_T = jax.tree.map(lambda leaf: leaf[:, 0], state_T1)
    some, end_here, go_on = (
        pack([row] * STEPS, [complete] * STEPS)
        for row, complete in ((entries[:known], False), (entries[:known], True), (whole, True))
    )
    ready_T = np.asarray(compiled_ready(machine.machine, some, state_T))
    first_wait = int(np.argmin(ready_T)) if not ready_T.all() else STEPS
    for token in (0, 3):
        truth_T = each_step(machine, go_on, state_T, token)
        np.testing.assert_array_equal(each_step(machine, some, state_T, token)[:first_wait], truth_T[:first_wait])
        if token == 0 and first_wait < STEPS:
            assert np.any(each_step(machine, end_here, state_T, token)[first_wait] != truth_T[first_wait])


@pytest.mark.parametrize(
    ("entries", "complete", "ready"),
    [
        ([], False, False),
        ([], True, True),
        ([pause(1)], False, True),
        ([word(4), word(5)], False, False),
        ([word(4), pause(1), word(5), pause(1)], False, False),
        ([word(4), word(5), word(6)], False, True),
        ([word(4), word(5)], True, True),
    ],
)
def test_a_row_that_reads_two_words_ahead_is_ready_when_it_knows_them(entries, complete, ready):
    rules = Rules(2, initial_padding=0)
    script = pack([entries], [complete])
    assert words.ready_B(rules.machine, script, rules.init_state(1)).tolist() == [ready]


def test_a_row_that_must_pad_is_ready_without_text():
    rules = Rules(2, initial_padding=1)
    assert words.ready_B(rules.machine, pack([[]], [False]), rules.init_state(1)).tolist() == [True]


def test_a_script_that_may_go_on_has_no_end():
    machine = MACHINES[0]
    state = machine.init_state(2)
    for step in range(4):
        step_B = jnp.full(2, step, jnp.int32)
        script = pack([[], []], [False, True])
        _, _, state = compiled_process(machine.machine, script, state, jnp.zeros(2, jnp.int32), step_B)
    assert state.end_step_B.tolist() == [-1, 2]


def test_a_negative_number_of_words_is_refused():
    with pytest.raises(ConfigError, match=r"^second_stream_ahead is -1, and must be 0 or more: give another number$"):
        WordMachine(CARD, -1)


def test_two_tokens_must_fit_into_one():
    assert WordMachine(46340, 2).card == WordMachine(46341).card - 1
    with pytest.raises(ConfigError, match=r"of 46341 each, do not fit into 32 bits; at most 46340 do"):
        WordMachine(46341, 2)
