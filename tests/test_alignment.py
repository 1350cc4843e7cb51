"""Words to the text stream and back: what `WordReader` reads from it is what was written."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsm_jax.errors import TrainingError
from dsm_jax.stt.events import Word, WordEnded
from dsm_jax.stt.words import Timing, VadOptions, WordReader
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training.alignment import text_stream, tokens_of
from dsm_jax.training.data import WordSpan
from tests.helpers import small, stt_model

TOKENIZER = load_tokenizer(next(stt_model.CHECKPOINT.glob("*.model")))
RATE = 12.5
TIMING = Timing(RATE, text_offset=1.5, audio_offset=1.0)
LM = dataclasses.replace(small.STT, delays=(0, 0, 0, 0))
WORDS = ("mister", "the", "fox", "a", "quilter", "everyone", "i")


def stream(words: list[WordSpan], *, frames: int = 400, timing: Timing = TIMING, lm=LM) -> np.ndarray:
    return text_stream(words, TOKENIZER, lm, timing, frames=frames)


def read(stream_T: np.ndarray, *, timing: Timing = TIMING, lm=LM) -> list[Word]:
    """Return the words of a stream; frame i is in column i + 1, less the text's own delay."""
    reader = WordReader(TOKENIZER, timing, padding=3, boundary=0, pauses=VadOptions())
    of_frames = stream_T[1 - lm.delays[0] :] if lm.delays[0] <= 1 else [*[3] * (lm.delays[0] - 1), *stream_T]
    events = [event for token in of_frames for event in reader.read(int(token), 1.0)] + reader.finish()
    return [event.word for event in events if isinstance(event, WordEnded)]


def spoken(*words: tuple[str, float]) -> list[WordSpan]:
    return [WordSpan(text, start, start + 0.2) for text, start in words]


@st.composite
def apart(draw) -> list[WordSpan]:
    """Draw words with room for a boundary and all pieces before the next one, and 2 frames at least."""
    words, at = [], draw(st.floats(0, 2))
    for text in draw(st.lists(st.sampled_from(WORDS), max_size=8)):
        words.append(WordSpan(text, at, at + 0.1))
        frames = max(2, 1 + len(TOKENIZER.encode(text)))
        at += (frames + 1) / RATE + draw(st.floats(0, 1.5))  # one more, as both ends are rounded
    return words


def faults(said: list[WordSpan], heard: list[Word]) -> list[str]:
    """Return what is wrong of words that were read back: each is there, in its place, at its time."""
    lines = []
    if [w.text for w in said] != [w.text for w in heard]:
        return [f"{[w.text for w in said]} was written and {[w.text for w in heard]} read"]
    for wrote, got in zip(said, heard, strict=True):
        if abs(wrote.start - got.start) > 0.5 / RATE + 1e-9:
            lines.append(f"{wrote.text} starts at {wrote.start} and was read at {got.start}")
    return lines


@pytest.mark.slow
@given(apart(), st.sampled_from([0, 1, 2, 5]))
def test_words_come_back_with_their_times(words, text_delay):
    lm = dataclasses.replace(LM, delays=(text_delay, 0, 0, 0))
    assert faults(words, read(stream(words, lm=lm), lm=lm)) == []


def without_last_piece(stream_T: np.ndarray) -> np.ndarray:
    return np.where(np.arange(stream_T.size) == np.flatnonzero(stream_T > 3)[-1], 3, stream_T)


@pytest.mark.parametrize(
    "spoil",
    [lambda stream_T: np.roll(stream_T, 1), lambda stream_T: np.where(stream_T == 0, 3, stream_T), without_last_piece],
    ids=["a frame late", "no boundaries", "a piece lost"],
)
def test_a_planted_fault_does_not_come_back(spoil):
    words = spoken(("mister", 1.0), ("the", 2.0))
    assert faults(words, read(stream(words))) == []
    assert faults(words, read(spoil(stream(words)))) != []


def test_the_stream_is_a_boundary_and_pieces_in_padding():
    pieces = TOKENIZER.encode("the")
    (at,) = np.flatnonzero(stream(spoken(("the", 1.0))) == 0)
    # Said 1.0 s into the audio, which is 1.5 s behind: frame 31.25, so its first piece is column 32.
    assert at == 31
    expected = np.full(400, 3, np.int32)
    expected[31 : 32 + len(pieces)] = [0, *pieces]
    np.testing.assert_array_equal(stream(spoken(("the", 1.0))), expected)
    assert stream([]).dtype == np.int32
    assert set(stream([])) == {3}


@pytest.mark.slow
@given(st.lists(st.sampled_from(WORDS), min_size=2, max_size=12), st.floats(0, 3))
def test_crowded_words_come_later_and_none_is_lost(texts, start):
    words = [WordSpan(text, start, start) for text in texts]
    heard = read(stream(words))
    assert [w.text for w in heard] == texts
    assert faults(words[:1], heard[:1]) == []
    lengths = [1 + len(TOKENIZER.encode(text)) for text in texts]
    expected = heard[0].start + np.cumsum([0, *lengths[:-1]]) / RATE
    np.testing.assert_allclose([w.start for w in heard], expected, atol=1e-9)


def test_a_word_after_a_crowd_is_on_time_again():
    words = spoken(("mister", 1.0), ("quilter", 1.0), ("everyone", 1.0), ("fox", 6.0))
    assert faults(words[3:], read(stream(words))[3:]) == []


def test_a_word_at_the_very_start_does_not_use_the_step_without_audio():
    timing = Timing(RATE, text_offset=0.0, audio_offset=0.0)
    stream_T = stream(spoken(("the", 0.0)), timing=timing)
    assert stream_T[0] == 3
    assert stream_T[1] == 0
    assert [w.text for w in read(stream_T, timing=timing)] == ["the"]


def test_what_comes_after_the_last_frame_is_cut_off():
    pieces = TOKENIZER.encode("mister")
    assert len(pieces) > 1
    words = spoken(("mister", 1.0), ("the", 9.0))
    np.testing.assert_array_equal(stream(words, frames=33), stream(words)[:33])
    assert list(stream(words, frames=33)[31:]) == [0, pieces[0]]
    assert set(stream(words, frames=20)) == {3}


def test_words_out_of_order_are_refused():
    with pytest.raises(TrainingError, match=r"'the' starts at 1\.0 s, before the one ahead of it \(2\.0 s\); sort"):
        stream(spoken(("mister", 2.0), ("the", 1.0)))


@pytest.mark.parametrize("word", ["語", "語the", "the語", "   ", "one\ud800"])
def test_a_word_that_cannot_be_spelt_is_refused(word):
    with pytest.raises(
        TrainingError, match=f"the word {re.escape(repr(word))} cannot be spelt by the model's tokenizer; leave it"
    ):
        stream(spoken((word, 1.0)))


def test_the_tokens_of_a_word_are_the_tokenizers():
    assert tokens_of("quilter", TOKENIZER, LM) == TOKENIZER.encode("quilter")


def test_a_mark_stands_between_the_boundary_and_the_tokens_of_its_word():
    words = spoken(("fox", 0.4), ("quilter", 1.4))
    plain_T = stream(words)
    marked_T = text_stream(words, TOKENIZER, LM, TIMING, frames=400, prefixes={1: 2})
    first = int(np.flatnonzero(plain_T == 0)[1])
    np.testing.assert_array_equal(marked_T[: first + 1], plain_T[: first + 1])
    assert marked_T[first + 1] == 2
    np.testing.assert_array_equal(marked_T[first + 2 :], plain_T[first + 1 : -1])
