"""Text streams for training text-to-speech: those that the word machine feeds when words start at given steps.

Shape letters: T steps, B batch rows.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.errors import TrainingError
from dsm_jax.training.alignment import script_stream, speaker_prefixes
from dsm_jax.training.data import WordSpan
from dsm_jax.training.losses.tts import decisions
from dsm_jax.tts.script import MAIN, NEW_WORD, OTHER, PAD, Entry, pack
from dsm_jax.tts.words import WordMachine
from tests.helpers.word_scripts import CARD, STEPS, Rules, advance

NEVER = 10_000  # steps until the machine orders a word
RULES = tuple(Rules(ahead, max_padding=NEVER) for ahead in (0, 1, 2))
MACHINES = tuple(rules.machine for rules in RULES)


@st.composite
def scripts(draw) -> tuple[list[list[int]], list[int], int]:
    """Draw words as tokens, the steps at which they are to start, some of them too early, and the end."""
    tokens = st.lists(st.integers(PAD + 1, CARD - 2), min_size=1, max_size=5)
    script = draw(st.lists(tokens, max_size=8))
    starts = sorted(draw(st.lists(st.integers(0, 50), min_size=len(script), max_size=len(script))))
    return script, starts, draw(st.integers(max(starts, default=0), 70))


def starts_of(stream_T: np.ndarray, machine: WordMachine) -> np.ndarray:
    """Find the steps at which a word starts, or the script ends."""
    second = bool(machine.second_stream_ahead)
    return np.flatnonzero(np.asarray(decisions(stream_T, machine.card, second_stream=second)) == NEW_WORD)


def fed_by(rules: Rules, script: list[list[int]], starts: np.ndarray) -> np.ndarray:
    """Run the word machine over a model that chooses a new word at these steps."""
    sampled_T = np.full(STEPS, PAD, np.int32)
    sampled_T[starts] = NEW_WORD
    row = pack([[Entry(tuple(tokens), "word", 0) for tokens in script]])
    state = rules.init_state(1)
    # Inference starts the first word after `initial_padding`, a recording at any time.
    state = dataclasses.replace(state, remaining_B=jnp.array([NEVER]), forced_B=jnp.array([0]))
    _, _, (_, fed_TB, _, _) = advance(rules, row, state, jnp.zeros(1, jnp.int32), jnp.asarray(sampled_T[None]))
    return np.asarray(fed_TB)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: f"ahead{rules.second_stream_ahead}")
@settings(deadline=None)
@given(scripts())
def test_the_stream_is_what_the_word_machine_feeds(rules, drawn):
    machine = rules.machine
    script, starts, end = drawn
    stream_T = script_stream(script, starts, machine, frames=STEPS, end=end)
    found = starts_of(stream_T, machine)
    np.testing.assert_array_equal(stream_T, fed_by(rules, script, found))
    free, expected = 0, []
    for tokens, start in zip(script, starts, strict=True):
        expected.append(max(start, free))
        free = expected[-1] + len(tokens) + (not machine.second_stream_ahead)
    if machine.second_stream_ahead:
        expected.append(max(end, free))
    assert found.tolist() == [step for step in expected if step < STEPS], "each word starts as soon as it can"


def test_a_stream_that_the_machine_would_not_feed_is_noticed():
    script, starts = [[7, 8], [9]], [3, 9]
    stream_T = script_stream(script, starts, MACHINES[2], frames=STEPS, end=20)
    late_T = stream_T.copy()
    late_T[4:8] = stream_T[3:7]  # the second token of the first word comes a step late
    for wrong in (script_stream(script, starts, MACHINES[1], frames=STEPS, end=20), late_T):
        assert not np.array_equal(wrong, fed_by(RULES[2], script, starts_of(wrong, MACHINES[2])))


def test_a_stream_may_be_shorter_than_its_script():
    assert script_stream([[7, 8], [9]], [0, 3], MACHINES[0], frames=2, end=9).tolist() == [NEW_WORD, 7]
    assert script_stream([], [], MACHINES[0], frames=3, end=0).tolist() == [PAD] * 3


def spans(*speakers: str) -> list[WordSpan]:
    return [WordSpan("one", i, i + 0.5, speaker) for i, speaker in enumerate(speakers)]


def test_words_have_speaker_tokens_where_the_speaker_changes_and_the_first_speaker_is_main():
    assert speaker_prefixes(spans("bob", "bob", "ann", "bob")) == ({0: MAIN, 2: OTHER, 3: MAIN}, ["bob", "ann"])
    assert speaker_prefixes(spans("ann", "ann")) == ({0: MAIN}, ["ann"])
    assert speaker_prefixes([]) == ({}, [])
    with pytest.raises(TrainingError, match="the speakers of one row are ann, bob, cid; models know two: cut"):
        speaker_prefixes(spans("ann", "bob", "cid"))
