"""The model inside the package that speaks, read by the reference from the very same files: trained weights."""

from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.step import OptimizerConfig
from dsm_jax.tts import Request, SynthesizeOptions
from tests.parity import references

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "dsm_jax/assets/digits-tts"
TURNS = ("seven four nine one", 'zero <break time="0.4s"/> three', "eight")
VOICES = ("theo", "jackson")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_frames_words_and_samples_equal_moshi(guidance):
    how = references.How(padding_between=1, cfg_coef=guidance)
    files = [ASSETS / f"voices/{voice}.safetensors" for voice in VOICES]
    (spoken,), pcm = references.moshi_speech(ASSETS, [TURNS], how, voices=[files])
    options = SynthesizeOptions(temperature=0.0, guidance_scale=guidance)
    speech = dsm_jax.synthesize(dsm_jax.load("digits-tts"), Request(TURNS, VOICES), options=options)
    np.testing.assert_array_equal(speech.frames, spoken.frames_KF)
    assert [(word.text, round(word.start * 12.5)) for word in speech.words] == spoken.transcript
    np.testing.assert_allclose(speech.pcm, pcm[0], rtol=0, atol=1e-4 * np.abs(pcm).max())


def test_frames_of_a_fine_tuned_model_equal_moshi(tmp_path):
    config = FinetuneConfig(
        data=str(ROOT / "examples/new_speaker/test"),
        output=str(tmp_path / "run"),
        model="digits-tts",
        seconds=8,
        voice="theo",
        run=RunConfig(steps=3),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup=1),
        lora=LoraConfig(rank=4),
    )
    finetune(config)
    folder = tmp_path / "run/model"
    voice = folder / "voices/theo.safetensors"
    (spoken,), _ = references.moshi_speech(folder, [TURNS[:1]], references.How(padding_between=1), voices=[[voice]])
    tuned, original = (
        dsm_jax.synthesize(
            dsm_jax.load(name), TURNS[0], voice="theo", options=SynthesizeOptions(temperature=0.0, guidance_scale=1.0)
        )
        for name in (folder, "digits-tts")
    )
    np.testing.assert_array_equal(tuned.frames, spoken.frames_KF)
    assert not np.array_equal(tuned.frames, original.frames)
