"""Scripts and the word machine against moshi's own."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from moshi.models import tts

from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.tts.script import MAIN, NEW_WORD, OTHER, PAD, entries_of
from tests.helpers import word_scripts
from tests.helpers.tokenizer_maker import make_tokenizer

PARTS = (
    *("the", "fox", "glockenspiel", "crêpes", "don’t", "12", "a:b", "(so)", "…", "fo(ur", ":", "()"),
    *(" ", " ", " ", "\n", "\u00a0", '<break time="1s"/>', '<break  time="0.36s">', '<break time="2.s" />'),
)
turns = st.lists(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), min_size=1, max_size=5)
TOKENS = tts.TokenIds(card=word_scripts.CARD)


class Moshi:
    """moshi's machine on one row, called like the oracle of `word_scripts`."""

    def __init__(self, machine, script):
        self.machine = tts.StateMachine(
            TOKENS, machine.second_stream_ahead, machine.max_padding, machine.initial_padding
        )
        self.state = self.machine.new_state([tts.Entry(list(e.tokens), e.text, e.padding) for e in script])

    @property
    def end_step(self) -> int:
        return -1 if self.state.end_step is None else self.state.end_step

    def step(self, number: int, sampled: int) -> tuple[int, bool]:
        return self.machine.process(number, self.state, sampled)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(word_scripts.MACHINES), word_scripts.rows)
def test_every_step_is_moshis(machine, rows):
    scripts_B, sampled_BT = zip(*rows, strict=True)
    assert word_scripts.faults(machine, scripts_B, sampled_BT, Moshi) == []


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(word_scripts.MACHINES), word_scripts.scripts, word_scripts.choices)
def test_the_times_of_words_are_moshis(machine, script, sampled_T):
    moshi = Moshi(machine, script)
    ((_, taken_T, _),) = word_scripts.run(machine, [script], [sampled_T])
    word_scripts.oracle_run(moshi, sampled_T)
    steps = [step for step, taken in enumerate(taken_T) if taken]
    assert steps == moshi.state.consumption_times
    spoken = [(entry.text, step) for entry, step in zip(script, steps, strict=False) if entry.tokens]
    assert spoken == moshi.state.transcript


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """With byte pieces, so that every word can be encoded."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model", 1500)


@settings(deadline=None, max_examples=200)
@given(turns, st.booleans(), st.integers(0, 3), st.sampled_from([12.5, 25.0, 10.0]))
def test_entries_are_moshis(tokenizer_file, turns, multi_speaker, padding_between, frame_rate):
    ours = load_tokenizer(tokenizer_file)
    theirs = sentencepiece.SentencePieceProcessor(str(tokenizer_file))
    turns = [*turns, "end"]  # moshi takes a script without words
    expected = tts.script_to_entries(theirs, TOKENS, frame_rate, turns, multi_speaker, padding_between)
    entries = entries_of(
        turns, ours, frame_rate=frame_rate, multi_speaker=multi_speaker, padding_between=padding_between
    )
    assert [(list(e.tokens), e.text, e.padding) for e in entries] == [(e.tokens, e.text, e.padding) for e in expected]


def test_the_tokens_of_the_machine_are_moshis():
    theirs = [TOKENS.new_word, TOKENS.pad, TOKENS.main, TOKENS.other, TOKENS.zero]
    assert theirs == [NEW_WORD, PAD, MAIN, OTHER, ZERO_TOKEN]
