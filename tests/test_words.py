"""Words, their times and the pauses between them, from the tokens of each frame."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsm_jax.errors import ConfigError
from dsm_jax.stt.events import Pause, WordEnded, WordStarted
from dsm_jax.stt.words import Timing, VadOptions, WordReader
from tests.helpers import stt_model

NO_OFFSET = Timing(frame_rate=12.5, text_offset=0.0, audio_offset=0.0)


def reader(timing: Timing = NO_OFFSET, **settings) -> WordReader:
    settings = {"padding": 3, "boundary": 0, "pauses": VadOptions(), **settings}
    return WordReader(stt_model.model().tokenizer, timing, **settings)


def read(tokens: list[int], timing: Timing = NO_OFFSET, **settings) -> list:
    r = reader(timing, **settings)
    events = [event for token in tokens for event in r.read(token, 0.5)]
    return events + r.finish()


def spans(events: list) -> list[tuple[str, float, float]]:
    """Word, and its first and last frame."""
    return [
        (e.word.text, round(e.word.start * 12.5), round(e.word.end * 12.5)) for e in events if isinstance(e, WordEnded)
    ]


def ids(text: str) -> list[int]:
    return stt_model.model().tokenizer.encode(text)


def test_a_word_lies_between_its_boundaries():
    word = ids("the")
    events = read([3, 0, *word, 3, 3, 0, 3])
    assert spans(events) == [("the", 2, 2 + len(word) + 2)]
    assert spans(read([0, 3, 3, *word, 0])) == [("the", 1, 3 + len(word))]


def test_words_that_share_a_segment_split_it_by_their_tokens():
    first, both = len(ids("the")), ids("the fox")
    (a, b) = spans(read([0, *both, 3, 0]))
    assert a == ("the", 1, 1 + first)
    assert b == ("fox", 1 + first, 1 + len(both) + 1)


def test_the_last_word_ends_after_a_second_at_the_end_of_the_stream_or_with_the_audio():
    word = ids("the")
    assert spans(read([0, *word, *[3] * 40])) == [("the", 1, 13)]
    assert spans(read([0, *word, 3, 3, 2, 3, 2])) == [("the", 1, 3 + len(word))]
    assert spans(read([2, 0, *word, *[3] * 40])) == [("the", 2, 14)], "a stream that ended before the word"
    start = len(word) + 3
    assert spans(read([0, *word, 2, 0, *word, *[3] * 40]))[1:] == [("the", start, start + 12)]
    assert spans(read([0, *word, 3])) == [("the", 1, 2 + len(word))]


def test_text_before_the_first_boundary_and_a_long_last_word_are_kept():
    word = ids("the")
    assert spans(read([3, *word, 0])) == [("the", 1, 1 + len(word))]
    fox = ids("fox")
    (only,) = spans(read([0, fox[0], *[3] * 14, *fox[1:]]))
    assert only == ("fox", 1, 1 + len(fox) + 14)


def test_times_are_in_the_audio_and_never_negative():
    word = ids("the")
    delayed = Timing(frame_rate=12.5, text_offset=0.5, audio_offset=0.0)
    (e,) = [e for e in read([*[3] * 9, 0, *word, 0], delayed) if isinstance(e, WordEnded)]
    assert e.word.start == pytest.approx(10 / 12.5 - 0.5)
    (e,) = [e for e in read([0, *word, 0], delayed) if isinstance(e, WordEnded)]
    assert e.word.start == 0.0


def test_a_stream_that_goes_on_after_an_end_begins_a_segment_with_its_next_piece():
    r, word = reader(), ids("the")
    events = [e for token in (0, *word, 3) for e in r.read(token, 0.5)] + r.finish()
    events += [e for token in (3, 3, *word, 0) for e in r.read(token, 0.5)]
    assert spans(events)[1:] == [("the", 4 + len(word), 4 + 2 * len(word))]


class LongSpelt:
    """A tokenizer that spells each word in three pieces, where the model may take one."""

    eos_id = 2

    def decode(self, tokens: list[int]) -> str:
        return " ".join("a" for _ in tokens)

    def piece(self, token: int) -> str:
        return "a"

    def encode(self, text: str) -> list[int]:
        return [11, 11, 11]


def test_no_word_of_a_segment_starts_after_what_was_read_or_ends_after_the_segment():
    r = WordReader(LongSpelt(), NO_OFFSET, padding=3, boundary=0, pauses=VadOptions())  # pyright: ignore
    events = [e for token in (0, 11, 11, 11, 11, 0) for e in r.read(token, 0.5)]
    assert spans(events) == [("a", 1, 4), ("a", 4, 5), ("a", 6, 6), ("a", 6, 6)]


def test_a_space_alone_is_no_word_and_costs_none():
    space, *rest = ids("fox")
    assert spans(read([0, space, 0, space, 0])) == []
    assert spans(read([0, space, space, *rest, 0])) == [("fox", 1, 3 + len(rest))]


def test_words_of_as_many_pieces_are_each_told_when_they_start():
    r, told = reader(), []
    for frame, token in enumerate([0, *ids("the"), 3, 0, *ids("the"), 3, 0]):
        told += [frame for e in r.read(token, 0.5) if isinstance(e, WordStarted)]
    assert told == [1 + len(ids("the")), 3 + 2 * len(ids("the"))]


def test_the_published_scripts_times_may_be_later_than_the_audio():
    r = reader()
    r.duration = 0.1
    events = [e for token in (3, 3, 3, 0, *ids("the"), 0) for e in r.read(token, 0.5)]
    assert spans(events) == [("the", 4, 4 + len(ids("the")))]


def test_a_word_is_as_sure_as_the_geometric_mean_of_its_pieces():
    r, word = reader(), ids("fox")
    assert len(word) > 1
    r.read(0, 1.0)
    for token, probability in zip(word, [0.9] + [0.4] * (len(word) - 1), strict=True):
        r.read(token, probability)
    (end,) = [e for e in r.read(0, 1.0) if isinstance(e, WordEnded)]
    assert end.word.probability == pytest.approx((0.9 * 0.4 ** (len(word) - 1)) ** (1 / len(word)))
    for token in word:
        r.read(token, 0.0)
    (end,) = [e for e in r.finish() if isinstance(e, WordEnded)]
    assert end.word.probability == pytest.approx(0.0, abs=1e-6)


def test_words_that_share_a_segment_are_each_as_sure_as_their_own_pieces():
    r, the, fox = reader(), ids("the"), ids("fox")
    for token in the:
        r.read(token, 0.9)
    for token in fox:
        r.read(token, 0.2)
    words = [e.word for e in r.read(0, 1.0) if isinstance(e, WordEnded)]
    assert [(w.text, round(w.probability, 6)) for w in words] == [("the", 0.9), ("fox", 0.2)]


def test_a_pause_before_the_audio_is_not_reported():
    prompted = Timing(frame_rate=12.5, text_offset=0.4, audio_offset=0.4)
    r = reader(prompted)
    told = [e for _ in range(8) for e in r.read(3, 1.0, (0.0, 0.0, 0.9, 0.0))]
    assert told == [Pause(pytest.approx(6 / 12.5 - 0.4), 2.0, 0.9)]


@given(st.lists(st.sampled_from([0, 0, 0, 2, 3, 3, 3, 5, 9, 12, 17, 20, 33, 50]), max_size=80))
def test_no_piece_is_lost_and_every_word_starts_once_and_in_order(tokens):
    events = read(tokens)
    words = [e.word for e in events if isinstance(e, WordEnded)]
    text = stt_model.model().tokenizer.decode([t for t in tokens if t > 3])
    assert "".join(w.text for w in words) == text.replace(" ", "")
    assert [e.start for e in events if isinstance(e, WordStarted)] == [w.start for w in words]
    assert all(w.start <= w.end for w in words)
    assert all(a.start <= b.start for a, b in itertools.pairwise(words))


def pauses(probabilities: list[float], tokens: list[int] | None = None, **settings) -> list[Pause]:
    r = reader(**settings)
    tokens = tokens or [3] * len(probabilities)
    rows = [(0.0, 0.0, p, 0.0) for p in probabilities]
    events = [e for t, row in zip(tokens, rows, strict=True) for e in r.read(t, 1.0, row)]
    return [e for e in events if isinstance(e, Pause)]


def test_a_pause_is_reported_once_until_somebody_speaks():
    assert pauses([0.4, 0.6, 0.9, 0.2, 0.7]) == [Pause(2 / 12.5, 2.0, 0.6)]
    word = ids("the")[0]
    assert len(pauses([0.6, 0.1, 0.7, 0.8], [3, word, 3, 3])) == 2


def test_another_head_or_threshold_can_decide():
    assert pauses([0.9] * 3, pauses=VadOptions(horizon=0.5)) == []
    assert pauses([0.9] * 3, pauses=VadOptions(threshold=0.95)) == []


def test_a_horizon_that_no_head_has_and_a_threshold_that_is_no_probability_are_refused():
    with pytest.raises(ConfigError, match=r"5\.0 s was asked for; the heads know \(0\.5, 1\.0, 2\.0, 3\.0\)"):
        VadOptions(horizon=5.0)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=rf"pauses is {threshold}; expected a probability from 0 to 1"):
            VadOptions(threshold=threshold)
    assert pauses([0.0, 1.0], pauses=VadOptions(threshold=0.0)) == [Pause(2 / 12.5, 2.0, 1.0)]
    assert pauses([1.0], pauses=VadOptions(threshold=1.0)) == []


def test_a_prompt_is_left_out_by_frames():
    word, name = ids("the"), ids("fox")
    assert [w for w, *_ in spans(read([0, *word, 0, *name, 0], skip=2 + len(word)))] == ["fox"]
