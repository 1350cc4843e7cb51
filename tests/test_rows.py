"""Training rows: cut between words, with the audio framing of transcription and the words that it would read."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from dsm_jax import audio, codec
from dsm_jax.configs import ModelConfig
from dsm_jax.errors import AudioError, CheckpointError, TrainingError
from dsm_jax.stt.events import WordEnded
from dsm_jax.stt.framing import word_reader
from dsm_jax.training.data import Recording, WordSpan
from dsm_jax.training.encoding import pad_to
from dsm_jax.training.parts import cut, parts_of
from dsm_jax.training.rows import SttRows
from tests.helpers.checkpoint_maker import PLAIN_STT, random_model

RATE = 400  # sample rate of the miniature codec, Hz
LM = dataclasses.replace(PLAIN_STT, card=16, num_layers=1)
MESH = Mesh(jax.devices()[:1], ("data",))


@pytest.fixture(autouse=True)
def slow_sound(monkeypatch):
    """Allow sample rates as low as the miniature codec's."""
    monkeypatch.setattr(audio, "MIN_RATE_HZ", 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"), LM)


def recording(folder, name: str, seconds: float, *words: tuple[str, float]) -> Recording:
    path = folder / f"{name}.wav"
    audio.write(path, 0.3 * np.random.default_rng(len(name)).normal(size=round(seconds * RATE)), RATE)
    return Recording(path, tuple(WordSpan(text, start, start + 0.2) for text, start in words), seconds)


def words_of(model, text_T: np.ndarray) -> list[tuple[str, float]]:
    """Read the words of a row as transcription would."""
    reader = word_reader(model.config, LM, model.tokenizer)
    heard = text_T[1:][text_T[1:] >= 0]
    events = [event for token in heard for event in reader.read(int(token), 1.0)] + reader.finish()
    return [(event.word.text, event.word.start) for event in events if isinstance(event, WordEnded)]


@pytest.mark.slow
def test_a_row_has_the_codes_and_the_text_of_transcription(model, tmp_path):
    spans = (("on", 0.3), ("a", 0.9), ("we", 1.5))
    (row_MT,) = SttRows(model, MESH, seconds=3.0, batch_size=2).encode([recording(tmp_path, "a", 2.0, *spans)])
    # 1 s of silence before, and after it the delay of 0.5 s and a second more.
    pcm = np.concatenate([np.zeros(RATE), audio.read(tmp_path / "a.wav", RATE), np.zeros(RATE * 3 // 2)])
    frames = pcm.size // 16  # whole frames
    expected = codec.encode(model, pcm[: frames * 16].astype(np.float32), codebooks=LM.n_q)
    assert row_MT.dtype == np.int32
    assert row_MT.shape == (1 + LM.n_q, (pcm.size + RATE) // 16)
    np.testing.assert_array_equal(row_MT[1:, :frames], expected)
    assert (row_MT[0, :frames] >= 0).all(), "silence after the recording counts in the loss"
    assert (row_MT[0, frames:] == -1).all()
    assert words_of(model, row_MT[0]) == [(text, pytest.approx(start, abs=0.021)) for text, start in spans]


@pytest.mark.slow
def test_rows_keep_the_order_of_recordings_for_any_encode_batch(model, tmp_path):
    several = [recording(tmp_path, name, seconds, ("on", 0.2)) for name, seconds in (("a", 1), ("bb", 2), ("ccc", 1.5))]
    together = SttRows(model, Mesh(jax.devices(), ("data",)), seconds=2.0, batch_size=3)
    assert together.codec.batch_size == 4, "as many for each device"
    alone = [SttRows(model, MESH, seconds=2.0, batch_size=1).encode([one])[0] for one in several]
    np.testing.assert_array_equal(together.encode(several), np.stack(alone))
    assert len({row.tobytes() for row in alone}) == 3


@pytest.mark.slow
def test_a_long_recording_is_cut_and_every_word_is_in_one_row_at_its_time(model, tmp_path):
    said = [("on", 0.4), ("a", 1.9), ("we", 2.5), ("he", 4.2), ("on", 6.9)]
    long = recording(tmp_path, "long", 6.5, *said)
    rows = SttRows(model, MESH, seconds=2.0, batch_size=2).encode([long])
    starts = np.array(cut(long.words, round(6.5 * RATE), RATE, 2 * RATE)[:-1]) / RATE
    assert len(rows) == len(starts) == 4
    heard = [
        (text, at + start) for start, row in zip(starts, rows, strict=True) for text, at in words_of(model, row[0])
    ]
    assert heard == [(text, pytest.approx(start, abs=0.021)) for text, start in said]


def faults(words: list[WordSpan], cuts: list[int], samples: int, rate: int, longest: int) -> list[str]:
    """List the faults of cuts: parts that are too long or empty, and words that are cut through."""
    lines = [] if (cuts[0], cuts[-1]) == (0, samples) else ["not the whole recording"]
    for first, end in itertools.pairwise(cuts):
        if not 0 < end - first <= longest:
            lines.append(f"{first} to {end} is too long or empty")
        for word in words:
            start = round(word.start * rate)
            if start < end < min(round(word.end * rate), start + 2 * rate, start + longest // 2) and end != samples:
                lines.append(f"{word.text} is cut through at {end}")
    return lines


@st.composite
def talks(draw) -> tuple[list[WordSpan], int]:
    """Draw words in order, some of them long, and the number of samples of their recording."""
    words, at = [], 0.0
    for number in range(draw(st.integers(0, 12))):
        start = at + draw(st.floats(0, 3))
        at = start + draw(st.floats(0, 4))
        words.append(WordSpan(f"w{number}", start, at))
    return words, draw(st.integers(1, 4_000))


@given(talks(), st.integers(100, 900))
def test_cuts_lie_between_words_and_parts_are_short_enough(talk, longest):
    words, samples = talk
    assert faults(words, cut(words, samples, 100, longest), samples, 100, longest) == []


def test_cuts_are_in_the_middle_of_a_gap_or_half_a_second_before_a_word():
    words = [WordSpan("a", 0.5, 1.0), WordSpan("b", 1.6, 2.4), WordSpan("c", 2.4, 9.0)]
    assert cut(words, 300, 100, 200) == [0, 130, 300]
    assert cut(words, 600, 100, 200) == [0, 130, 240, 440, 600]
    assert cut([WordSpan("late", 1.9, 2.2)], 300, 100, 200) == [0, 140, 300]
    overlapping = [WordSpan("a", 1.0, 1.8), WordSpan("b", 1.6, 2.4), WordSpan("c", 1.7, 2.4)]
    assert cut(overlapping, 300, 100, 200) == [0, 160, 300]
    within = [WordSpan("a", 0.8, 1.4), WordSpan("b", 0.9, 1.0), WordSpan("c", 1.6, 2.4)]
    assert cut(within, 300, 100, 200) == [0, 150, 300]
    assert cut([WordSpan("half a part", 0.5, 2.5)], 300, 100, 200) == [0, 200, 300]
    assert cut([WordSpan("two seconds", 7.0, 12.0)], 1500, 100, 1000) == [0, 1000, 1500]
    assert cut([], 500, 100, 200) == [0, 200, 400, 500]
    assert cut(words, 150, 100, 200) == [0, 150]


def test_a_word_belongs_to_the_part_in_which_it_starts_and_a_late_one_to_the_last():
    words = (WordSpan("a", 0.0, 0.5), WordSpan("b", 2.0, 3.0), WordSpan("late", 3.5, 4.0))
    long = Recording(np.arange(3_000) / 10_000, words, 3.0)
    (first_T, first), (second_T, second) = parts_of(long, 1_000, 2_000)
    np.testing.assert_array_equal(np.concatenate([first_T, second_T]), np.float32(long.audio))
    assert first == [words[0]]
    assert second == [WordSpan("b", 0.0, 1.0), WordSpan("late", 1.5, 2.0)]


def test_a_recording_that_was_cut_short_makes_no_rows(tmp_path):
    audio.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 32_000), 8_000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"a\.flac lacks .* of its 4\.0 s"):
        list(parts_of(Recording(tmp_path / "a.flac", (), 4.0), 8_000, 16_000))


def test_the_checker_sees_a_word_that_is_cut_through():
    words = [WordSpan("a", 0.5, 1.0), WordSpan("b", 1.6, 2.4)]
    assert faults(words, [0, 200, 300], 300, 100, 200) == ["b is cut through at 200"]
    assert faults(words, [0, 250], 250, 100, 200) == ["0 to 250 is too long or empty"]


def test_models_of_other_families_are_refused(model):
    codec = ModelConfig(model_type="mimi", mimi=model.config.mimi)
    for other, message in (
        (dataclasses.replace(model, tokenizer=None), "random has no tokenizer; add the published one, and name it in"),
        (dataclasses.replace(model, config=codec), "random is a codec without a language model; to transcribe, load a"),
    ):
        with pytest.raises(CheckpointError, match=message):
            SttRows(other, MESH, seconds=2.0, batch_size=1)


def test_a_word_that_cannot_be_spelt_is_refused_before_anything_is_encoded(model):
    rows = SttRows(model, MESH, seconds=2.0, batch_size=1)
    rows.check("on")
    with pytest.raises(TrainingError, match="'語' cannot be spelt"):
        rows.check("語")


def test_pad_to_adds_zeros_at_the_end_of_the_first_axis():
    np.testing.assert_array_equal(pad_to(np.ones((2, 2)), 3), [[1, 1], [1, 1], [0, 0]])
