"""The model inside the package that speaks, read by the reference from the very same files: trained weights."""

from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax.tts import SpeechOptions
from tests.parity import references

ASSETS = Path(__file__).resolve().parents[2] / "dsm_jax/assets/digits-tts"
TURNS = ("seven four nine one", 'zero <break time="0.4s"/> three', "eight")
VOICES = ("theo", "jackson")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_frames_words_and_samples_equal_moshi(guidance):
    how = references.How(padding_between=1, cfg_coef=guidance)
    files = [ASSETS / f"voices/{voice}.safetensors" for voice in VOICES]
    (spoken,), pcm = references.moshi_speech(ASSETS, [TURNS], how, voices=[files])
    options = SpeechOptions(temperature=0.0, guidance=guidance)
    speech = dsm_jax.synthesize(dsm_jax.load("digits-tts"), TURNS, speaker=VOICES, options=options)
    np.testing.assert_array_equal(speech.frames, spoken.frames_KF)
    assert [(word.text, round(word.start * 12.5)) for word in speech.words] == spoken.transcript
    np.testing.assert_allclose(speech.pcm, pcm[0], rtol=0, atol=1e-4 * np.abs(pcm).max())
