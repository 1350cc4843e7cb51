"""The model inside the package, read by the reference from the very same files: trained weights, real speech."""

from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax import audio, codec
from tests.parity import references

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "dsm_jax/assets/digits"
RECORDINGS = [
    *sorted((ROOT / "examples/audio").glob("*.flac")),
    *sorted((ROOT / "examples/new_speaker/test").glob("*.ogg")),
]


@pytest.fixture(scope="module")
def model():
    return dsm_jax.load("digits")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
def test_codes_and_tokens_equal_moshi(model, recording, streaming):
    pcm = audio.read(recording, model.sample_rate)
    padded = references.moshi_pad(pcm, references.read_config(ASSETS)["stt_config"])
    whole = padded[: padded.size // 1920 * 1920]
    assert whole.size < 10 * 24_000, "moshi's streaming codec forgets a step after its window of 10 s"
    codes_QT = references.moshi_codes(ASSETS, whole, streaming=streaming)
    np.testing.assert_array_equal(codec.encode(model, whole), codes_QT)
    run = references.moshi_tokens(ASSETS, codes_QT)
    np.testing.assert_array_equal(dsm_jax.transcribe(model, pcm, frames=True).frames.text_tokens, run.tokens_T)


def test_decoded_sound_equals_moshi(model):
    codes_QT = codec.encode(model, RECORDINGS[0])
    sound = references.moshi_decode(ASSETS, codes_QT)
    np.testing.assert_allclose(codec.decode(model, codes_QT), sound, rtol=0, atol=1e-4 * np.abs(sound).max())
