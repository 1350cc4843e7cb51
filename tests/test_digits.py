"""The model inside the package: what it must do on recordings that training did not see."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax import audio, cli
from dsm_jax.checkpoints import Model
from dsm_jax.evaluation.metrics import corpus_wer
from dsm_jax.training.data import WordSpan
from recipes.digits.word_errors import word_errors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "dsm_jax/assets/digits"
RECORDINGS = sorted((ROOT / "examples/audio").glob("digits_*.flac"))
STRINGS = sorted((ROOT / "tests/data/digits").glob("*.flac"))  # of nine digits, one by each of the six
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@functools.cache
def model() -> Model:
    return dsm_jax.load("digits")


def said(recording: Path) -> list[dict]:
    return json.loads(recording.with_suffix(".json").read_text(encoding="utf-8"))["words"]


def test_it_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert {"README.md", "config.json", "mimi_config.json", "model.safetensors"} <= files.keys()
    assert [model().tokenizer.piece(i) for i in range(4, 14)] == [f"▁{word}" for word in WORDS]


def test_digits_are_transcribed_with_their_times():
    paths = RECORDINGS + STRINGS
    heard = dsm_jax.transcribe(model(), paths)
    truth = [[WordSpan(word["text"], word["start"], word["end"]) for word in said(path)] for path in paths]
    figures = word_errors(zip(truth, heard, strict=True))
    assert sum(one.words for one in figures.errors) == 15 + 54
    assert corpus_wer(figures.errors) <= 0.08  # of so few words; the model card has the rate
    assert np.median(np.abs(figures.start_errors)) <= 0.08
    assert np.abs(figures.start_errors).max() <= 0.3


@pytest.mark.parametrize("milliseconds", [7, 80, 333])
def test_live_words_are_the_same(milliseconds):
    pcm_T = audio.read(RECORDINGS[0], model().sample_rate)
    size = model().sample_rate * milliseconds // 1000
    events = dsm_jax.transcribe_stream(model(), (pcm_T[i : i + size] for i in range(0, pcm_T.size, size)))
    words = [event.word for event in events if isinstance(event, dsm_jax.WordEnded)]
    expected = dsm_jax.transcribe(model(), pcm_T).words
    assert [(word.text, word.start, word.end) for word in words] == [(w.text, w.start, w.end) for w in expected]


def test_silence_hiss_hum_and_rumble_have_an_empty_transcript():
    rate, random = model().sample_rate, np.random.default_rng(0)
    hiss_T = random.normal(size=30 * rate)
    hum_T = np.sin(2 * np.pi * 50 * np.arange(30 * rate) / rate)
    rumble_T = np.cumsum(hiss_T)
    rumble_T = (rumble_T - rumble_T.mean()) / rumble_T.std()
    rooms = [0.0 * hiss_T, 0.003 * hiss_T, 0.05 * hiss_T, 0.05 * hum_T + 0.001 * hiss_T]
    rooms += [0.01 * rumble_T, 0.1 * rumble_T]
    transcripts = dsm_jax.transcribe(model(), [room_T.astype(np.float32) for room_T in rooms])
    assert [transcript.text for transcript in transcripts] == [""] * len(rooms)


def test_the_command_line_knows_it_by_name(capsys):
    assert cli.main(["transcribe", str(RECORDINGS[0]), "--model", "digits", "--no-cache", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == dsm_jax.transcribe(model(), RECORDINGS[0]).text != ""
