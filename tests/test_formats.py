"""A transcript renders to every format with all its words, in order, at times that a player accepts."""

import json
import re
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsm_jax.errors import ConfigError, DsmError
from dsm_jax.stt.events import Pause, Word
from dsm_jax.stt.subtitles import MAX_CUE_MS, MAX_LINE_CHARACTERS, MAX_LINES, Cue, cues
from dsm_jax.stt.transcript import SUFFIXES, Frames, Transcript


def spoken(*timed: tuple[str, float, float]) -> tuple[Word, ...]:
    return tuple(Word(text, start, end, 0.9) for text, start, end in timed)


def transcript(words: tuple[Word, ...]) -> Transcript:
    return Transcript(" ".join(word.text for word in words), words, (), duration=words[-1].end if words else 0.0)


HELLO = transcript(spoken(("Hello", 0.08, 0.4), ("there.", 0.48, 1.2), ("R&D", 4.0, 4.2), ("<ok>", 4.24, 4.4)))


def test_srt():
    assert HELLO.render("srt") == (
        "1\n00:00:00,080 --> 00:00:01,200\nHello there.\n\n2\n00:00:04,000 --> 00:00:04,400\nR&D <ok>\n"
    )


def test_vtt_escapes_markup():
    assert HELLO.render("vtt") == (
        "WEBVTT\n\n00:00:00.080 --> 00:00:01.200\nHello there.\n\n00:00:04.000 --> 00:00:04.400\nR&amp;D &lt;ok&gt;\n"
    )


def test_tsv_has_one_row_per_cue():
    words = spoken(("tab\tand\nline", 0.0, 0.5), ("end", 0.6, 0.9))
    assert transcript(words).render("tsv") == "start\tend\ttext\n0\t900\ttab and line end\n"


def test_text():
    assert HELLO.render("text") == "Hello there. R&D <ok>\n"


def test_json_keeps_every_field_and_every_letter():
    result = Transcript(
        text="déjà",
        words=(Word("déjà", np.float32(0.1234567), 0.48, np.float32(0.987654)),),
        pauses=(Pause(1.04, 2.0, 0.54321),),
        duration=1.23456,
        audio="a.wav",
        model="tiny",
    )
    content = result.render("json")
    assert "déjà" in content
    expected = {
        "audio": "a.wav",
        "model": "tiny",
        "duration": 1.235,
        "text": "déjà",
        "words": [{"text": "déjà", "start": 0.123, "end": 0.48, "probability": 0.9877}],
        "segments": [{"text": "déjà", "start": 0.123, "end": 0.48}],
        "pauses": [{"time": 1.04, "horizon": 2.0, "probability": 0.5432}],
    }
    assert json.loads(content) == expected
    assert list(json.loads(content)) == list(expected)

    rows = (tuple(np.float32([0.12345678, 0.25, 0.5, 1.0])),)
    framed = json.loads(replace(result, frames=Frames((np.int32(3),), rows)).render("json"))
    assert framed["frames"] == {"text_tokens": [3], "pause_probabilities": [[0.123457, 0.25, 0.5, 1.0]]}
    headless = replace(result, frames=Frames((3, 0), None)).to_dict()
    assert headless["frames"] == {"text_tokens": [3, 0], "pause_probabilities": None}


def test_an_empty_transcript_renders_to_nothing_but_headers():
    empty = transcript(())
    assert empty.render("text") == ""
    assert empty.render("srt") == ""
    assert empty.render("vtt") == "WEBVTT\n"
    assert empty.render("tsv") == "start\tend\ttext\n"
    assert json.loads(empty.render("json"))["words"] == []


def test_every_format_has_a_suffix_and_no_other_is_known():
    for name, suffix in SUFFIXES.items():
        assert suffix.startswith(".")
        assert isinstance(HELLO.render(name), str)
    with pytest.raises(DsmError, match="format 'docx' is unknown; expected one of text, json, srt, vtt, tsv"):
        HELLO.render("docx")


def test_a_suffix_of_any_case_chooses_the_format_of_a_file(tmp_path):
    for suffix in (".srt", ".JSON"):
        HELLO.save(tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_text(encoding="utf-8") == HELLO.render(suffix[1:].lower())
    with pytest.raises(DsmError, match=r"a\.docx ends in '\.docx'; expected one of \.txt, \.json, \.srt, \.vtt, \.tsv"):
        HELLO.save(tmp_path / "a.docx")


def test_a_place_that_cannot_be_written_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^nope/x\.srt cannot be written: there is no folder nope; make it first$"):
        HELLO.save("nope/x.srt")
    Path("taken.srt").mkdir()
    with pytest.raises(ConfigError, match=r"^taken\.srt cannot be written \(Is a directory\)\. Choose another"):
        HELLO.save("taken.srt")


def test_a_pause_stands_behind_the_words_that_ended_before_it():
    paused = replace(HELLO, pauses=(Pause(1.2, 2.0, 0.9), Pause(4.3, 2.0, 0.9)))
    assert paused.text_with_pauses() == "Hello there. [pause] R&D [pause] <ok>"


def test_transcripts_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        HELLO.words[0].start = 3.0


@pytest.mark.parametrize(
    ("seconds", "clock"),
    [
        (0.0, "00:00:00,000"),
        (59.9994, "00:00:59,999"),
        (59.9996, "00:01:00,000"),
        (3_599.9996, "01:00:00,000"),
        (360_000.5, "100:00:00,500"),
    ],
)
def test_clocks_carry_their_rounding(seconds, clock):
    content = transcript(spoken(("late", seconds, seconds + 1))).render("srt")
    assert content.splitlines()[1].startswith(clock + " --> ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # A silence of more than a second.
        (spoken(("a", 0.0, 0.5), ("b", 1.5, 2.0)), ["a b"]),
        (spoken(("a", 0.0, 0.5), ("b", 1.6, 2.0)), ["a", "b"]),
        # The end of a sentence, quoted or not, once the cue has lasted a second.
        (spoken(("No.", 0.0, 0.5), ("b", 0.6, 1.0)), ["No. b"]),
        (spoken(("Well,", 0.0, 0.4), ("no.”", 0.5, 1.0), ("b", 1.1, 1.5)), ["Well, no.”", "b"]),
        (spoken(("Well,", 0.0, 0.4), ("no.\n", 0.5, 1.0), ("b", 1.1, 1.5)), ["Well, no.", "b"]),
        (spoken(("Well,", 0.0, 0.4), ("no,", 0.5, 1.0), ("b", 1.1, 1.5)), ["Well, no, b"]),
        # Two lines of 42 characters.
        (spoken(("x" * 42, 0.0, 0.2), ("y" * 42, 0.3, 0.5), ("z", 0.6, 0.7)), ["x" * 42 + "\n" + "y" * 42, "z"]),
        (spoken(("x" * 50, 0.0, 0.2), ("y", 0.3, 0.5)), ["x" * 50 + "\ny"]),
        (spoken(("x", 0.0, 0.2), ("y" * 30 + "-" + "z" * 30, 0.3, 0.5)), ["x\n" + "y" * 30 + "-" + "z" * 30]),
        # Seven seconds.
        (spoken(("a", 0.0, 3.0), ("b", 3.0, 7.0)), ["a b"]),
        (spoken(("a", 0.0, 3.0), ("b", 3.0, 7.1)), ["a", "b"]),
        # Blank words.
        (spoken((" ", 0.0, 0.1), ("a", 0.2, 0.3), ("", 0.4, 0.5)), ["a"]),
    ],
)
def test_where_a_cue_ends(words, expected):
    assert ["\n".join(cue.lines) for cue in cues(words)] == expected


def test_how_long_a_cue_shows():
    short, long = spoken(("a", 1.0, 1.1)), spoken(("a", 1.0, 20.0))
    assert cues(short) == [Cue(1_000, 1_300, ("a",))]
    assert cues(long) == [Cue(1_000, 8_000, ("a",))]
    cut_off = spoken(("x" * 80, 1.0, 1.1), ("y" * 80, 1.1, 1.2), ("z", 1.15, 1.5))
    assert [(cue.start_ms, cue.end_ms) for cue in cues(cut_off)] == [(1_000, 1_150), (1_150, 1_500)]


def check_cues(words: list[Word]) -> None:
    """Fail unless the cues of these words keep every promise of `formats`."""
    made = cues(words)
    texts = [" ".join(word.text.split()) for word in words]
    assert [line for cue in made for line in " ".join(cue.lines).split()] == " ".join(texts).split()
    for cue in made:
        assert 0 <= cue.start_ms < cue.end_ms <= cue.start_ms + MAX_CUE_MS
        assert 1 <= len(cue.lines) <= MAX_LINES or " ".join(cue.lines) in texts  # a long text given as one word
        assert all(line == " ".join(line.split()) for line in cue.lines)
        assert all(len(line) <= MAX_LINE_CHARACTERS or " " not in line for line in cue.lines)
    for cue, following in pairwise(made):
        assert cue.end_ms <= following.start_ms


TEXTS = st.text(alphabet='abc .?!"\n\té，。<>&', min_size=1, max_size=12) | st.text(min_size=1, max_size=60)
SECONDS = st.floats(0.0, 3.0)


@pytest.mark.slow
@given(st.lists(st.tuples(TEXTS, SECONDS, SECONDS), max_size=40), st.booleans())
def test_cues_hold_all_words_in_order_within_the_limits(steps, in_order):
    words, now = [], 0.0
    for text, wait, length in steps:
        start = now + wait if in_order else wait  # a model may also give times that repeat or go back
        words.append(Word(text, start, start + length, 1.0))
        now = start + length
    check_cues(words)

    whole = transcript(tuple(words))
    times = re.findall(r"^(\S+) --> (\S+)$", whole.render("srt"), re.MULTILINE)
    assert [time for pair in times for time in pair] == sorted(time for pair in times for time in pair)
    for name in SUFFIXES:
        content = whole.render(name)
        assert content == "" or content.endswith("\n")
    assert len(whole.render("tsv").split("\n")) == len(cues(words)) + 2
    assert json.loads(whole.render("json")) == whole.to_dict()


@pytest.mark.parametrize(
    "broken",
    [
        [],
        [Cue(0, 400, ("b", "a"))],
        [Cue(0, 9_000, ("a", "b"))],
        [Cue(0, 0, ("a", "b"))],
        [Cue(0, 400, ("a",)), Cue(399, 700, ("b",))],
        [Cue(0, 400, ("a", "", "b"))],
    ],
)
def test_the_check_can_fail(monkeypatch, broken):
    words = list(spoken(("a", 0.0, 0.2), ("b", 0.2, 0.4)))
    check_cues(words)
    monkeypatch.setitem(globals(), "cues", lambda _: broken)
    with pytest.raises(AssertionError):
        check_cues(words)
