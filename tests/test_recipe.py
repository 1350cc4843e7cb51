"""The recipe of `digits` on made-up recordings: rows for both networks, and all stages in miniature."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dsm_jax.errors import AudioError, ConfigError, TrainingError
from dsm_jax.training import digits
from dsm_jax.training.codec import CodecObjective
from dsm_jax.training.codec_stages import CodecStage
from dsm_jax.training.compose import Delivery
from dsm_jax.training.recipe import DigitsConfig, LmStage, train_digits
from dsm_jax.training.run import RunConfig
from tests.checkpoint_maker import assert_same_weights
from tests.digits_data import SENTENCES, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_takes_are_split_by_number_and_know_where_they_speak(data):
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    assert [take.word for take in takes] == list(digits.WORDS)
    for take in takes:
        assert take.start == pytest.approx(0.1, abs=0.03)
        assert take.end == pytest.approx(0.6, abs=0.03)
    kinds = digits.TEST_TAKES, digits.VALIDATION_TAKES, digits.TRAINING_TAKES
    assert len(set().union(*kinds)) == sum(map(len, kinds))
    with pytest.raises(AudioError, match=r"fsdd holds no takes DIGIT_SPEAKER_NUMBER.flac of numbers \[77\]; name its"):
        digits.load_takes(data / "fsdd", [77])


def test_sentences_are_kept_apart_and_digits_in_them_are_seen(data):
    kept, others = (digits.load_sentences(data / "kathleen", 24_000, held_out=apart) for apart in (True, False))
    assert [sentence.text for sentence in kept] == [SENTENCES[0]]
    assert [sentence.has_digits for sentence in others] == [True, False]


def test_a_speaker_can_be_drawn_more_often_than_others(data):
    recorded = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    takes = [dataclasses.replace(take, speaker=name) for name in ("theo", "lucas") for take in recorded]

    def share(mix: digits.Mix) -> float:
        rows = digits.SpeechRows(takes, [], 25, (0, 0), dataclasses.replace(mix, sentences=0.0, noise=0.0))
        said = [words[0].speaker for _, words in map(rows.__getitem__, range(80)) if words]
        return said.count("theo") / len(said)

    assert 0.35 < share(digits.Mix()) < 0.65
    assert share(digits.Mix(often={"theo": 9})) > 0.8
    with pytest.raises(
        ConfigError, match=r"theo is drawn 0\.5 times as often as another; give a whole number, 1 or more"
    ):
        digits.Mix(often={"theo": 0.5})


def test_words_of_a_row_are_cut_where_the_mix_says_so(data):
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)

    def lengths(cut: float) -> list[float]:
        mix = digits.Mix(sentences=0.0, noise=0.0, delivery=Delivery(cut=cut))
        rows = digits.SpeechRows(takes, [], 50, (0, 0), mix)
        return [word.end - word.start for i in range(10) for word in rows[i][1]]

    assert min(lengths(0.0)) == pytest.approx(0.5, abs=0.03)
    assert min(lengths(0.1)) < 0.45


def test_rows_are_the_same_whenever_they_are_drawn(data):
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    sentences = digits.load_sentences(data / "kathleen", 24_000, held_out=False)
    rows = digits.CodecRows(takes, sentences, 25, (0, 0))
    drawn = [rows[i] for i in range(30)]
    for i in (0, 11, 29):
        for name, array in drawn[i].items():
            np.testing.assert_array_equal(rows[i][name], array)
    labels = np.unique(np.concatenate([row["labels_BN"] for row in drawn]))
    assert labels.min() == -1  # a sentence with a digit in it
    assert labels.max() == digits.OTHER
    assert all(row["pcm_BT"].shape == (48_000,) and np.abs(row["pcm_BT"]).max() <= 1 for row in drawn)

    speech = digits.SpeechRows(takes, sentences, 25, (0, 0))
    said = [speech[i][1] for i in range(30)]
    assert any(said)
    assert all(word.end <= 2.0 for words in said for word in words)
    assert [] in said


def test_labels_follow_the_sound_of_a_string(data):
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    for pcm_T, spoken in digits.plain_strings(takes, 3):
        for word in spoken:
            middle = round((word.start + word.end) / 2 * 24_000)
            spectrum = np.abs(np.fft.rfft(pcm_T[middle - 2400 : middle + 2400]))
            assert spectrum.argmax() * 5 == pytest.approx(200 + 100 * digits.WORDS.index(word.text), abs=10)


def test_all_stages_run_and_a_resumed_recipe_ends_the_same(data, tmp_path):
    def config(output: str, steps: int) -> DigitsConfig:
        run = RunConfig(steps=steps, log_every=1, save_every=1)
        seanet = dataclasses.replace(digits.MIMI.seanet, ratios=(32, 30))
        transformer = dataclasses.replace(digits.MIMI.transformer, num_layers=1)
        quantizer = dataclasses.replace(digits.MIMI.quantizer, n_q=2)
        codec = CodecStage(rows=2, frames=8, run=run, objective=CodecObjective(decoded_frames=4))
        return DigitsConfig(
            data=str(data),
            output=str(tmp_path / output),
            mimi=dataclasses.replace(digits.MIMI, seanet=seanet, transformer=transformer, quantizer=quantizer),
            codec=codec,
            hardened=codec,
            cut=codec,
            decoder=codec,
            lm=LmStage(strings=8, frames=12, context=5, rows=2, run=run),
        )

    whole = train_digits(config("whole", 2))
    folder = tmp_path / "whole/digits"
    assert {"config.json", "mimi_config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    stages = "codec", "hardened", "cut", "decoder", "lm"
    assert all((tmp_path / f"whole/{stage}/curve.png").is_file() for stage in stages)
    assert whole.config.stt.audio_delay_seconds == 0.64
    with pytest.raises(TrainingError, match="whole/digits exists, so this recipe is done; choose another output"):
        train_digits(config("whole", 2), resume=True)
    folder.rename(tmp_path / "first")
    assert_same_weights(train_digits(config("whole", 2), resume=True), whole)
