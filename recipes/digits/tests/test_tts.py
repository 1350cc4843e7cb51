"""The recipe of `digits-tts` on made-up recordings: its utterances, and the whole recipe in miniature."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from dsm_jax.errors import TrainingError
from dsm_jax.training.loop import RunConfig
from dsm_jax.tts import voices
from recipes.digits.data import MIMI, TRAINING_CLIPS, load_clips
from recipes.digits.tests.made_up_data import write_data
from recipes.digits.tts import DigitsTtsConfig, TtsDataset, TtsStage, train_digits_tts
from tests.helpers import tts_model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), ("bob", "ann"))


def test_rows_have_one_or_two_speakers_and_some_end_in_silence(data):
    clips = load_clips(data / "fsdd", TRAINING_CLIPS)
    rows = TtsDataset(clips, TtsStage(frames=60), MIMI, (0, 0))
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


@pytest.mark.slow
def test_the_recipe_writes_a_model_with_voices_once(data, tmp_path):
    codec = tts_model.make_checkpoint(tmp_path)
    run = RunConfig(steps=2, log_every=1, save_every=1)
    lm = TtsStage(utterances=4, frames=20, context=8, batch_size=2, run=run)
    config = DigitsTtsConfig(data=str(data), output=str(tmp_path / "out"), codec=str(codec), lm=lm)
    whole = train_digits_tts(config)
    folder = tmp_path / "out/digits-tts"
    assert {"config.json", "mimi_config.json", "model.safetensors", "voices"} <= {
        path.name for path in folder.iterdir()
    }
    assert list(voices.voices_of(whole)) == ["ann", "bob"]
    np.testing.assert_array_equal([voices.read_voice(name, whole)[0] for name in ("ann", "bob")], np.eye(2))
    with pytest.raises(TrainingError, match="out/digits-tts exists, so this recipe is done; choose another output"):
        train_digits_tts(config, resume=True)
