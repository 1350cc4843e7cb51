"""From turns to entries, and entries to arrays. That moshi makes the same is in tests/parity/test_words.py."""

import dataclasses
import re

import numpy as np
import pytest

from dsm_jax.errors import SpeechError, UnsayableError
from dsm_jax.tokenizers import Tokenizer, load_tokenizer
from dsm_jax.tts.script import MAIN, OTHER, Entry, entries_of, more_entries, pack
from tests.helpers.tokenizer_maker import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Return a tokenizer of letters and a few whole words; no digits, brackets or apostrophes."""
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model", 80))


@pytest.fixture(scope="module")
def read(tokenizer):
    """Return entries at 12.5 steps a second, of a model that knows two speakers unless told."""

    def entries(*turns: str, multi_speaker: bool = True, padding_between: int = 0) -> list[Entry]:
        return entries_of(
            turns, tokenizer, frame_rate=12.5, multi_speaker=multi_speaker, padding_between=padding_between
        )

    return entries


def texts(entries: list[Entry]) -> list[str]:
    return [entry.text for entry in entries]


def test_words_lie_between_spaces_and_keep_their_text(read, tokenizer):
    entries = read("  the quick\n brown\u00a0fox ", multi_speaker=False)
    assert texts(entries) == ["the", "quick", "brown", "fox"]
    assert [list(entry.tokens) for entry in entries] == [tokenizer.encode(word) for word in texts(entries)]
    assert {entry.padding for entry in entries} == {0}


def test_colons_are_spaces_and_brackets_are_left_out(read):
    assert texts(read("one:two (three) (fo)ur : ()")) == ["one", "two", "three", "four"]


def test_words_that_normalise_to_nothing_are_left_out(read):
    assert texts(read("one \u200b two \ufeff \u00ad three")) == ["one", "two", "three"]


def test_a_typographic_apostrophe_is_a_plain_one(read, tokenizer):
    spelt = dataclasses.replace(tokenizer, _encode=lambda word: [5] * len(word))
    entries = entries_of(["don’t"], spelt, frame_rate=12.5, multi_speaker=False)
    assert texts(entries) == ["don't"]


def test_the_speaker_is_marked_where_it_changes(read, tokenizer):
    entries = read("the fox", "jumps", "", "over", "the dog", '<break time="1s"/>', "in silence")
    told = [(entry.text, entry.tokens[0]) for entry in entries if entry.tokens[:1] in [(MAIN,), (OTHER,)]]
    # Nobody speaks in the third turn, so the fourth goes on with the second's speaker; nor in the sixth.
    assert told == [("the", MAIN), ("jumps", OTHER), ("the", MAIN)]
    assert list(entries[0].tokens) == [MAIN, *tokenizer.encode("the")]


def test_an_empty_first_turn_lets_the_other_speaker_begin(read):
    (entry,) = read("", "the")
    assert entry.tokens[0] == OTHER


@pytest.mark.parametrize(("speaker", "marked"), [(None, True), (OTHER, True), (MAIN, False)])
def test_text_that_goes_on_is_marked_unless_its_speaker_spoke_before(tokenizer, speaker, marked):
    (entry,) = more_entries(["the"], tokenizer, frame_rate=12.5, multi_speaker=True, speaker=speaker)
    assert (entry.tokens[0] == MAIN) == marked


def test_what_cannot_be_said_is_an_error_with_the_entries_before_it_or_is_left_out_and_logged(tokenizer, caplog):
    turns, model = ["the fox 12 <laugh/> jumps"], {"frame_rate": 12.5, "multi_speaker": False}
    with pytest.raises(UnsayableError, match="the word '12'") as caught:
        entries_of(turns, tokenizer, **model)
    assert texts(caught.value.before) == ["the", "fox"]
    assert caplog.messages == []
    assert texts(entries_of(turns, tokenizer, **model, skip_unsayable=True)) == ["the", "fox", "jumps"]
    assert [message.split(",")[0] for message in caplog.messages] == [
        "left out: turn 1 has the word '12'",
        "left out: turn 1 has '<laugh/>'",
    ]


def test_a_script_for_a_model_of_one_speaker_has_no_marks(read, tokenizer):
    assert [list(entry.tokens) for entry in read("the", "fox", multi_speaker=False)] == [
        tokenizer.encode("the"),
        tokenizer.encode("fox"),
    ]


@pytest.mark.parametrize(
    ("tag", "padding"),
    [
        ('<break time="1s"/>', 12),  # 12.5 steps, and halves go to the even number
        ('<break time="3s"/>', 38),
        ('<break time="0.5s">', 6),
        ('<break\n  time="2.s"  />', 25),
        ('<break time="0s"/>', 0),
        ('<break time="3600s"/>', 45_000),
    ],
)
def test_a_break_is_an_entry_without_tokens(read, tag, padding):
    assert read(f"the{tag}fox {tag}")[1::2] == [Entry((), "", padding)] * 2


def test_padding_between_counts_every_token_of_the_word(read):
    entries = read('the<break time="1s"/> glockenspiel', padding_between=2)
    assert [entry.padding for entry in entries] == [len(entries[0].tokens) + 1, 12, len(entries[2].tokens) + 1]
    assert entries[0].tokens[0] == MAIN
    assert len(entries[2].tokens) > 1


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], r"the text \(0 turns\) has no word in it, and at least one is needed: give a text to say"),
        (["", ' :() <break time="1s"/>'], r"the text \(2 turns\) has no word in it"),
        (
            ["the", "café 12"],
            r"turn 2 has the word '12', which t.model encodes as \[\d+, 0\], and every word must become",
        ),
        (["\u200b"], r"the text \(1 turn\) has no word in it"),
        (["one tw\ud800"], r"turn 1 has the word 'tw\\ud800', which t.model encodes as \[\], and every word must"),
        (["one < two"], "turn 1 has a '<' that belongs to no tag, and a tag has both '<' and '>': remove it"),
        (["one", "two> three"], "turn 2 has a '>' that belongs to no tag"),
        (["one <<break time='1s'/>"], "turn 1 has a '<' that belongs to no tag"),
        (["one <laugh/>"], "turn 1 has '<laugh/>', an unknown tag, and only breaks such as <break time=\"0.5s\"/> are"),
        (["one <>"], "turn 1 has '<>', an unknown tag"),
        (['one <break time="1x5s"/>'], "turn 1 has '<break time=\"1x5s\"/>', a break that cannot be read, and only"),
        (['one <break time="1"/>'], "a break that cannot be read, and only breaks such as .*: write one so, or remove"),
        (['one <break time="1 s"/>'], "a break that cannot be read"),
        (['one <break time="-1s"/>'], "a break that cannot be read"),
        (['one <break time="3601s"/>'], "turn 1 has a break of 3601 s, and 3600 s is the longest: write a shorter one"),
        ([f'one <break time="{"9" * 400}s"/>'], "turn 1 has a break of 9+ s, and 3600 s is the longest"),
    ],
)
def test_an_unsayable_text_is_refused(read, turns, message):
    with pytest.raises(SpeechError, match=message):
        read(*turns)


@pytest.mark.parametrize("steps", [-1, 45_001])
def test_a_padding_out_of_range_is_refused(read, steps):
    with pytest.raises(SpeechError, match=rf"^padding_between is {steps} steps, which must lie between 0 and one hour"):
        read("one", padding_between=steps)


@pytest.mark.parametrize("token", [0, 3, 9])
def test_a_word_made_of_the_machines_own_tokens_or_of_one_without_text_is_refused(tokenizer, token):
    odd = dataclasses.replace(tokenizer, _encode=lambda _: [7, token], _silent=frozenset({9}))
    with pytest.raises(SpeechError, match=rf"the word 'one', which t.model encodes as \[7, {token}\]"):
        entries_of(["one"], odd, frame_rate=12.5, multi_speaker=False)


def test_a_row_reads_back_as_its_entries():
    entries = [Entry((1, 7, 8), "a", 2), Entry((), "", 5), Entry((), "", 0), Entry((9,), "b", 0), Entry((4, 4), "c", 1)]
    rows = [entries, [], entries[1:]]
    script = pack(rows, [True, False, False])
    for row, known in enumerate(rows):
        spans = zip(script.start_BL[row].tolist(), script.end_BL[row].tolist(), strict=True)
        read = [tuple(script.tokens_BT[row, start:end].tolist()) for start, end in spans][: len(known)]
        assert read == [entry.tokens for entry in known]
        assert script.padding_BL[row, : len(known)].tolist() == [entry.padding for entry in known]
        of_words = [e for e, entry in enumerate(known) if entry.tokens]
        assert script.word_BL[row, : len(of_words)].tolist() == of_words
        before = [sum(word < e for word in of_words) for e in range(len(known))]
        assert script.words_before_BL[row, : len(known)].tolist() == before
        assert (script.count_B[row], script.words_B[row]) == (len(known), len(of_words))
    assert script.complete_B.tolist() == [True, False, False]
    assert pack(rows).complete_B.all()


@pytest.mark.parametrize(
    ("entries", "tokens", "shape"),
    [(0, 0, (1024, 4096)), (1024, 4, (1024, 4096)), (1025, 1, (2048, 4096)), (10, 410, (1024, 8192))],
)
def test_capacities_are_powers_of_two(entries, tokens, shape):
    script = pack([[Entry((5,) * tokens, "a", 0)] * entries, []])
    arrays = {field.name: np.asarray(getattr(script, field.name)) for field in dataclasses.fields(script)}
    assert {name: array.shape for name, array in arrays.items()} == {
        name: {"B": (2,), "L": (2, shape[0]), "T": (2, shape[1])}[re.sub(".*_B?", "", name) or "B"] for name in arrays
    }
    assert {array.dtype for name, array in arrays.items() if name != "complete_B"} == {np.dtype(np.int32)}
