"""Word ends come from the sound: close to it, never over a pause, and as soon as they are known."""

import dataclasses
import itertools

import numpy as np
import pytest

from dsm_jax.configs import MimiConfig
from dsm_jax.stt.events import WordEnded, WordStarted
from dsm_jax.stt.levels import SoundLevels, _tenth, hops_of_frame, levels_of
from dsm_jax.stt.words import COMPLETE_FRAMES, Timing, VadOptions, WordReader
from tests.helpers import stt_model

RATE = 24_000
FRAME = RATE * 80 // 1000
CODEC = MimiConfig()
DELAYED = Timing(frame_rate=12.5, text_offset=0.56, audio_offset=0.0)  # the text is seven frames late


def sound(*spans: tuple[float, float], seconds: float, background: float = 1e-3) -> np.ndarray:
    """Make noise that is loud in some spans of seconds."""
    random = np.random.default_rng(0)
    time_T = np.arange(round(seconds * RATE)) / RATE
    loud_T = sum(((time_T >= start) & (time_T < end)).astype(np.float32) for start, end in spans)
    return (random.normal(size=time_T.size) * (background + 0.2 * loud_T)).astype(np.float32)


def levels_FH(pcm_T: np.ndarray) -> np.ndarray:
    whole_T = np.pad(pcm_T, (0, -pcm_T.size % FRAME))
    return np.asarray(levels_of(whole_T[None, :, None], CODEC)[0])


def levels(pcm_T: np.ndarray, frames: int = 1) -> SoundLevels:
    made, all_H = SoundLevels(CODEC), levels_FH(pcm_T).ravel()
    for start in range(0, all_H.size, 8 * frames):
        made.push(all_H[start : start + 8 * frames])
    return made


def ids(text: str) -> list[int]:
    return stt_model.model().tokenizer.encode(text)


def read(tokens: list[int], pcm_T: np.ndarray, timing: Timing = DELAYED) -> list[tuple[int, object]]:
    """Read tokens with the sound of their frames; return each event with the frame at which it came."""
    reader = WordReader(
        stt_model.model().tokenizer, timing, padding=3, boundary=0, pauses=VadOptions(), levels=SoundLevels(CODEC)
    )
    reader.duration = None
    all_FH = levels_FH(np.pad(pcm_T, (0, max(0, len(tokens) * FRAME - pcm_T.size))))
    events = []
    for frame, (token, levels_H) in enumerate(zip(tokens, all_FH, strict=False)):
        events += [(frame, event) for event in reader.read(token, 0.5, None, levels_H)]
    return events + [(len(tokens), event) for event in reader.finish()]


def words(events: list[tuple[int, object]]) -> list[tuple[str, float, float]]:
    return [(e.word.text, round(e.word.start, 2), round(e.word.end, 2)) for _, e in events if isinstance(e, WordEnded)]


def ended_at(events: list[tuple[int, object]]) -> list[int]:
    return [frame for frame, event in events if isinstance(event, WordEnded)]


def said(text: str, second: float) -> dict[int, int]:
    """Return the tokens of a word that is said at a second, by frame."""
    frame = round((second + DELAYED.text_offset) * 12.5)
    return {frame - 1: 0} | {frame + place: token for place, token in enumerate(ids(text))}


def stream(frames: int, *parts: dict[int, int]) -> list[int]:
    placed = {frame: token for part in parts for frame, token in part.items()}
    return [placed.get(frame, 3) for frame in range(frames)]


def test_a_level_is_the_mean_power_of_a_hop_of_all_channels_in_decibels():
    pcm_BTC = np.random.default_rng(1).normal(size=(2, 3 * FRAME, 2)).astype(np.float32)
    hops = pcm_BTC.astype(np.float64).reshape(2, 3, 8, 480)
    np.testing.assert_allclose(levels_of(pcm_BTC, CODEC), 10 * np.log10((hops**2).mean(axis=-1)), atol=1e-4)
    assert (levels_of(np.zeros((1, FRAME, 1), np.float32), CODEC) == -100).all()


@pytest.mark.parametrize(
    ("rate", "frame_rate", "hops"), [(24_000, 12.5, 8), (8_000, 40, 2), (22_050, 12.5, 7), (400, 200, 1)]
)
def test_a_frame_is_a_whole_number_of_hops_of_ten_milliseconds_or_more(rate, frame_rate, hops):
    seanet = dataclasses.replace(CODEC.seanet, ratios=(2,))
    config = dataclasses.replace(CODEC, sample_rate=rate, frame_rate=frame_rate, seanet=seanet)
    assert hops_of_frame(config) == hops


@pytest.mark.parametrize("size", [1, 2, 11, 997, 1_000])
def test_the_background_is_the_tenth_percentile(size):
    levels_H = np.random.default_rng(size).normal(size=size).astype(np.float32)
    assert _tenth(levels_H) == pytest.approx(np.percentile(levels_H, 10), abs=1e-6)


@pytest.mark.parametrize("frames", [1, 3, 100])
def test_the_end_of_a_sound_is_where_the_silence_after_it_begins(frames):
    found = levels(sound((1.0, 1.4), (3.0, 3.5), seconds=5.0), frames).end_of_sound(1.0, 2.9)
    assert found is not None
    assert found[0] == pytest.approx(1.42, abs=0.011)
    assert found[1] == pytest.approx(1.5, abs=0.02)


def test_neither_loud_background_nor_the_sound_before_a_word_is_its_own():
    for spans, background in ([(1.0, 1.4)], 1e-2), ([(0.5, 0.95), (1.2, 1.4)], 1e-3):
        found = levels(sound(*spans, seconds=4.0, background=background)).end_of_sound(1.0, 3.9)
        assert found is not None
        assert found[0] == pytest.approx(1.42, abs=0.011)
    assert levels(sound(seconds=1.0)).end_of_sound(2.0, 3.0) is None


def test_a_gap_within_a_word_does_not_end_it():
    found = levels(sound((1.0, 1.2), (1.35, 1.6), seconds=4.0)).end_of_sound(1.0, 3.9)
    assert found is not None
    assert found[0] == pytest.approx(1.62, abs=0.021)


def test_without_contrast_the_sound_goes_on_to_the_limit():
    for pcm_T in (sound(seconds=4.0, background=0.1), np.zeros(4 * RATE, np.float32)):
        assert levels(pcm_T).end_of_sound(1.0, 3.9) == (3.9, 0.0)


def test_only_the_last_minutes_are_kept():
    made = levels(np.concatenate([np.zeros(RATE * 400, np.float32), sound((0.5, 1.0), seconds=3.0)]), 7)
    assert made.seconds == pytest.approx(403.0, abs=0.08)
    found = made.end_of_sound(400.5, 402.9)
    assert found is not None
    assert found[0] == pytest.approx(401.02, abs=0.021)
    assert made._kept_H.size == 12_000
    assert made.end_of_sound(0.0, 280.0) is None, "forgotten"


def test_a_word_before_a_pause_ends_with_its_sound_and_is_reported_within_a_second():
    pcm_T = sound((1.0, 1.4), (9.0, 9.4), seconds=11.0)
    events = read(stream(140, said("the", 1.04), said("fox", 9.04)), pcm_T)
    ((the, _, end), (fox, start, _)) = words(events)
    assert (the, fox) == ("the", "fox")
    assert end == pytest.approx(1.42, abs=0.03)
    assert start == pytest.approx(9.04, abs=0.05)
    (frame,) = [frame for frame, event in events if isinstance(event, WordEnded) and event.word.text == "the"]
    assert (frame + 1) / 12.5 - 1.4 <= 1.0


def test_a_word_ends_once_its_text_is_complete_and_the_next_would_have_come():
    for sound_end, frame in (1.1, max(said("the", 1.04)) + COMPLETE_FRAMES), (1.6, 27):
        events = read(stream(60, said("the", 1.04)), sound((1.0, sound_end), seconds=4.0))
        # The text is 0.56 s late: the frame in which the last of the sound has its text, 0.02 s after the sound.
        assert ended_at(events) == [frame]
    now = Timing(frame_rate=12.5, text_offset=0.0, audio_offset=0.0)
    tokens = stream(60, {12: 0, **{13 + place: token for place, token in enumerate(ids("the"))}})
    ((_, _, end),) = words(read(tokens, sound((1.0, 1.3), (1.45, 1.7), seconds=4.0), now))
    assert end == pytest.approx(1.72, abs=0.03), "a gap shorter than a silence"


def test_a_boundary_that_nothing_follows_does_not_start_the_next_word():
    late = said("fox", 9.04)
    late.pop(min(late))
    stale = {round((1.6 + DELAYED.text_offset) * 12.5): 0}
    events = read(stream(140, said("the", 1.04), stale, late), sound((1.0, 1.4), (9.0, 9.4), seconds=11.0))
    assert [round(e.start, 1) for _, e in events if isinstance(e, WordStarted)] == [1.0, 9.0]


def test_a_boundary_long_before_the_last_word_does_not_shorten_it():
    pcm_T, word = sound((1.0, 1.8), seconds=2.2), said("the", 1.04)
    word.pop(min(word))
    ((_, start, end),) = words(read(stream(25, word), pcm_T))
    assert end > start + 0.2
    assert words(read(stream(25, {3: 0}, word), pcm_T)) == [("the", start, end)]


def test_a_word_in_loud_noise_lasts_a_second_after_its_last_piece_at_most():
    tokens = stream(100, said("the", 1.04))
    events = read(tokens, sound(seconds=8.0, background=0.2))
    ((_, start, end),) = words(events)
    assert ended_at(events) == [max(said("the", 1.04)) + 12], "the first frame that is a second later"
    assert end == pytest.approx(start + 0.08 * len(ids("the")) + 1.0, abs=0.011)


def test_words_in_noise_end_where_the_next_begins():
    tokens = stream(100, said("the", 1.04), said("fox", 1.84), said("the", 2.48))
    found = words(read(tokens, sound(seconds=8.0, background=0.2)))
    assert [text for text, _, _ in found] == ["the", "fox", "the"]
    assert [end for _, _, end in found[:2]] == [pytest.approx(start, abs=0.09) for _, start, _ in found[1:]]


def test_words_that_follow_at_once_end_where_the_next_begins():
    pcm_T = sound((1.0, 1.8), seconds=4.0)
    tokens = stream(60, said("the", 1.04), said("fox", 1.44))
    (_, _, end), (_, start, _) = words(read(tokens, pcm_T))
    assert end == pytest.approx(start, abs=0.09)


def test_nothing_is_later_than_the_recording():
    reader = WordReader(
        stt_model.model().tokenizer, DELAYED, padding=3, boundary=0, pauses=VadOptions(), levels=SoundLevels(CODEC)
    )
    all_FH = levels_FH(np.pad(sound((1.0, 1.5), seconds=1.5), (0, RATE * 5)))
    tokens = stream(60, said("the", 1.44))
    reader.duration = 1.5
    events = []
    for frame, token in enumerate(tokens):
        pause = (0.0, 0.0, 0.9, 0.0) if frame > 40 else None
        events += reader.read(token, 0.5, pause, all_FH[frame])
    events += reader.finish()
    times = [getattr(e, "time", None) or getattr(e, "start", None) or e.word.end for e in events]
    assert len(times) == 3
    assert max(times) <= 1.5


class SpeltInBytes:
    """A tokenizer whose pieces 11 and 12 are the two bytes of é."""

    eos_id = 2

    def decode(self, tokens: list[int]) -> str:
        return b"".join({11: b"\xc3", 12: b"\xa9"}.get(token, b" ") for token in tokens).decode(errors="replace")

    def piece(self, token: int) -> str:
        return "▁" if token == 10 else f"<0x{token}>"

    def encode(self, text: str) -> list[int]:
        return [10, 11, 12]


def test_an_unfinished_character_is_held_back():
    reader = WordReader(SpeltInBytes(), DELAYED, padding=3, boundary=0, pauses=VadOptions())  # pyright: ignore
    events = [event for token in (0, 10, 11, 3, 3, 12, 3, 0) for event in reader.read(token, 0.5)]
    assert [event.text for event in events if isinstance(event, WordStarted)] == ["é"]
    assert [event.word.text for event in events if isinstance(event, WordEnded)] == ["é"]
    cut = [event for token in (0, 10, 11, 0) for event in reader.read(token, 0.5)]
    assert [getattr(event, "text", None) or event.word.text for event in cut] == ["\ufffd"] * 2, "it never came"


def test_words_whose_pieces_do_not_tell_where_they_begin_are_told_with_the_sound_too():
    levels = SoundLevels(CODEC)
    reader = WordReader(SpeltInBytes(), DELAYED, padding=3, boundary=0, pauses=VadOptions(), levels=levels)  # pyright: ignore
    silence_H, tokens = np.full(8, -100.0, np.float32), (0, 10, 11, 12, 13, 11, 12, 0)
    events = [event for token in tokens for event in reader.read(token, 0.5, None, silence_H)]
    assert [event.word.text for event in events if isinstance(event, WordEnded)] == ["é", "é"]


def test_ends_do_not_depend_on_what_comes_later():
    """Live transcription sees no more of the sound than the whole recording does at the same frame."""
    random = np.random.default_rng(3)
    pcm_T = sound(*((t, t + 0.3) for t in random.uniform(0, 9, 8)), seconds=11.0)
    tokens = [int(t) for t in random.choice([0, 3, 3, 3, 3, 17, 20, 33], 130)]
    whole = read(tokens, pcm_T)
    cut = read(tokens[:90], pcm_T[: 90 * FRAME])
    early = [event for frame, event in whole if frame < 90]
    assert [event for frame, event in cut if frame < 90] == early
    assert len(early) > 5
    ends = [e.word for _, e in whole if isinstance(e, WordEnded)]
    assert all(w.start <= w.end for w in ends)
    assert all(a.start <= b.start for a, b in itertools.pairwise(ends))
