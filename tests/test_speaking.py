"""The recipe of `digits-tts` on made-up recordings: what is to be said, and the whole of it in miniature."""

import itertools
from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax.errors import TrainingError
from dsm_jax.training import digits, export
from dsm_jax.training.compose import Spoken
from dsm_jax.training.run import RunConfig
from dsm_jax.training.speaking import SpeakingConfig, SpeakingStage, SpokenRows, marks_of, train_speaking
from dsm_jax.tts import voices
from dsm_jax.tts.script import MAIN, OTHER
from tests import tts_model
from tests.digits_data import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), ("bob", "ann"))


def said(*words: str) -> list[Spoken]:
    return [Spoken("one", i, i + 0.5, speaker) for i, speaker in enumerate(words)]


def test_words_are_marked_where_the_speaker_changes_and_the_first_is_the_main_one():
    assert marks_of(said("bob", "bob", "ann", "bob")) == ({0: MAIN, 2: OTHER, 3: MAIN}, ["bob", "ann"])
    assert marks_of(said("ann", "ann")) == ({0: MAIN}, ["ann"])
    assert marks_of([]) == ({}, [])


def test_rows_are_said_by_one_or_two_and_some_end_in_silence(data):
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    rows = SpokenRows(takes, SpeakingStage(frames=60), digits.MIMI, (0, 0))
    turns, short = 0, 0
    for i in range(40):
        pcm_T, words = rows[i]
        np.testing.assert_array_equal(pcm_T, rows[i][0])
        assert pcm_T.shape == (60 * 1920,)
        assert words
        turns += len({word.speaker for word in words}) == 2
        short += words[-1].end < 3.0
        assert all(0.12 <= b.start - a.end <= 0.6 for a, b in itertools.pairwise(words))
    assert 2 <= turns <= 15
    assert 8 <= short <= 30


def test_the_recipe_writes_a_model_with_voices_once(data, tmp_path):
    codec = tts_model.make_checkpoint(tmp_path)
    run = RunConfig(steps=2, log_every=1, save_every=1)
    lm = SpeakingStage(strings=4, frames=20, context=8, rows=2, run=run)
    config = SpeakingConfig(data=str(data), output=str(tmp_path / "out"), codec=str(codec), lm=lm)
    whole = train_speaking(config)
    folder = tmp_path / "out/digits-tts"
    assert {"config.json", "mimi_config.json", "model.safetensors", "voices"} <= {
        path.name for path in folder.iterdir()
    }
    assert list(voices.voices_of(whole)) == ["ann", "bob"]
    np.testing.assert_array_equal([voices.read_voice(name, whole)[0] for name in ("ann", "bob")], np.eye(2))
    with pytest.raises(TrainingError, match="out/digits-tts exists, so this recipe is done; choose another output"):
        train_speaking(config, resume=True)


def test_a_model_whose_voices_cannot_be_written_is_not_there_at_all(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_voices", full)
    model = dsm_jax.load(tts_model.make_checkpoint(tmp_path))
    with pytest.raises(
        TrainingError, match=r"could not be written \(.*No space left on device\); what it learnt is in"
    ):
        export.write_model(model, tmp_path / "out", {"ann": np.zeros((1, 2), np.float32)})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".model.*"))
