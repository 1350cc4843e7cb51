"""The recipe of `digits` on made-up recordings: rows of both networks, and all stages in miniature."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dsm_jax.errors import AudioError, ConfigError, TrainingError
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.losses.codec import CodecObjective
from recipes.digits import data
from recipes.digits.codec import CodecStage
from recipes.digits.data import MIMI, CodecDataset, DataMix, SttDataset, load_clips, load_sentences
from recipes.digits.stt import DigitsConfig, SttStage, train_digits
from recipes.digits.tests.made_up_data import SENTENCES, write_data
from recipes.digits.utterances import ProsodyConfig
from tests.helpers.checkpoint_maker import assert_same_weights


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_clips_are_split_by_number_and_know_the_times_of_their_words(recordings):
    clips = load_clips(recordings / "fsdd", data.TRAINING_CLIPS)
    assert [clip.word for clip in clips] == list(data.WORDS)
    for clip in clips:
        assert clip.start == pytest.approx(0.1, abs=0.03)
        assert clip.end == pytest.approx(0.6, abs=0.03)
    kinds = data.TEST_CLIPS, data.VALIDATION_CLIPS, data.TRAINING_CLIPS
    assert len(set().union(*kinds)) == sum(map(len, kinds))
    with pytest.raises(AudioError, match=r"fsdd holds no clips DIGIT_SPEAKER_NUMBER.flac of numbers \[77\]; name its"):
        load_clips(recordings / "fsdd", [77])


def test_sentences_are_held_out_and_their_digits_found(recordings):
    kept, others = (load_sentences(recordings / "kathleen", 24_000, held_out=apart) for apart in (True, False))
    assert [sentence.text for sentence in kept] == [SENTENCES[0]]
    assert [sentence.has_digits for sentence in others] == [True, False]


@pytest.mark.slow
def test_a_speaker_can_be_drawn_more_often_than_others(recordings):
    recorded = load_clips(recordings / "fsdd", data.TRAINING_CLIPS)
    clips = [dataclasses.replace(clip, speaker=name) for name in ("theo", "lucas") for clip in recorded]

    def share(mix: DataMix) -> float:
        rows = SttDataset(clips, [], 25, (0, 0), dataclasses.replace(mix, sentences=0.0, noise=0.0))
        said = [words[0].speaker for _, words in map(rows.__getitem__, range(80)) if words]
        return said.count("theo") / len(said)

    assert 0.35 < share(DataMix()) < 0.65
    assert share(DataMix(oversampled=("theo",), oversampling=9)) > 0.8
    with pytest.raises(ConfigError, match="oversampling is 0; give 1 or more"):
        DataMix(oversampling=0)


def test_words_of_a_row_are_truncated_as_the_mix_sets(recordings):
    clips = load_clips(recordings / "fsdd", data.TRAINING_CLIPS)

    def lengths(truncate: float) -> list[float]:
        mix = DataMix(sentences=0.0, noise=0.0, prosody=ProsodyConfig(truncate=truncate))
        rows = SttDataset(clips, [], 50, (0, 0), mix)
        return [word.end - word.start for i in range(10) for word in rows[i][1]]

    assert min(lengths(0.0)) == pytest.approx(0.5, abs=0.03)
    assert min(lengths(0.1)) < 0.45


def test_rows_are_the_same_whenever_they_are_drawn(recordings):
    clips = load_clips(recordings / "fsdd", data.TRAINING_CLIPS)
    sentences = load_sentences(recordings / "kathleen", 24_000, held_out=False)
    rows = CodecDataset(clips, sentences, 25, (0, 0))
    drawn = [rows[i] for i in range(30)]
    for i in (0, 11, 29):
        for name, array in drawn[i].items():
            np.testing.assert_array_equal(rows[i][name], array)
    labels = np.unique(np.concatenate([row["labels_BN"] for row in drawn]))
    assert labels.min() == -1  # a sentence with a digit in it
    assert labels.max() == data.OTHER_SPEECH
    assert all(row["pcm_BT"].shape == (48_000,) and np.abs(row["pcm_BT"]).max() <= 1 for row in drawn)

    speech = SttDataset(clips, sentences, 25, (0, 0))
    said = [speech[i][1] for i in range(30)]
    assert any(said)
    assert all(word.end <= 2.0 for words in said for word in words)
    assert [] in said


def test_labels_follow_the_sound_of_an_utterance(recordings):
    clips = load_clips(recordings / "fsdd", data.TRAINING_CLIPS)
    for pcm_T, spoken in data.plain_utterances(clips, 3):
        for word in spoken:
            middle = round((word.start + word.end) / 2 * 24_000)
            spectrum = np.abs(np.fft.rfft(pcm_T[middle - 2400 : middle + 2400]))
            assert spectrum.argmax() * 5 == pytest.approx(200 + 100 * data.WORDS.index(word.text), abs=10)


@pytest.mark.slow
def test_all_stages_run_and_a_resumed_recipe_ends_the_same(recordings, tmp_path):
    def config(output: str, steps: int) -> DigitsConfig:
        run = RunConfig(steps=steps, log_every=1, save_every=1)
        seanet = dataclasses.replace(MIMI.seanet, ratios=(32, 30))
        transformer = dataclasses.replace(MIMI.transformer, num_layers=1)
        quantizer = dataclasses.replace(MIMI.quantizer, n_q=2)
        codec = CodecStage(batch_size=2, frames=8, run=run, objective=CodecObjective(decoded_frames=4))
        return DigitsConfig(
            data=str(recordings),
            output=str(tmp_path / output),
            mimi=dataclasses.replace(MIMI, seanet=seanet, transformer=transformer, quantizer=quantizer),
            codec=codec,
            codec_augmented=codec,
            codec_truncated=codec,
            decoder=codec,
            lm=SttStage(utterances=8, frames=12, context=5, batch_size=2, run=run),
        )

    whole = train_digits(config("whole", 2))
    folder = tmp_path / "whole/digits"
    assert {"config.json", "mimi_config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    stages = "codec", "codec_augmented", "codec_truncated", "decoder", "lm"
    assert all((tmp_path / f"whole/{stage}/curve.png").is_file() for stage in stages)
    assert whole.config.stt.audio_delay_seconds == 0.64
    with pytest.raises(TrainingError, match="whole/digits exists, so this recipe is done; choose another output"):
        train_digits(config("whole", 2), resume=True)
    folder.rename(tmp_path / "first")
    assert_same_weights(train_digits(config("whole", 2), resume=True), whole)
