"""The model inside the package, read by the reference from the very same files: trained weights, real speech."""

from pathlib import Path

import jax
import numpy as np
import pytest

import dsm_jax
from dsm_jax import audio, codec
from dsm_jax.models.parameters import flatten
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.step import OptimizerConfig
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


def differences(model: dsm_jax.Model, pcm: np.ndarray, ours_QT: np.ndarray, theirs_QT: np.ndarray) -> list[float]:
    """For each frame with other codes: by how much of its length a vector must move to be given the other code.

    In thousands of frames a vector lies as near to one entry as to another, as far as float32 can tell; then the order
    of a sum decides, and all later codebooks of the frame follow another residual.
    """
    mimi = model.codec
    latents_TD = np.asarray(jax.jit(lambda pcm: mimi.latents(pcm))(pcm[None, :, None]))[0].astype(np.float64)
    gaps = []
    for t in np.flatnonzero((ours_QT != theirs_QT).any(axis=0)):
        branch, first = (
            (mimi.quantizer.semantic, 0) if ours_QT[0, t] != theirs_QT[0, t] else (mimi.quantizer.acoustic, 1)
        )
        left_C = latents_TD[t] @ np.asarray(branch.input_proj.weight[...]).T
        length = np.linalg.norm(left_C)
        for q, book in enumerate(branch.codebooks, first):
            pair_2C = np.asarray(book.embedding_LC[...])[[ours_QT[q, t], theirs_QT[q, t]]]
            if ours_QT[q, t] != theirs_QT[q, t]:
                near, far = np.sort(((left_C - pair_2C) ** 2).sum(-1))
                gaps.append(float((far - near) / 2 / np.linalg.norm(pair_2C[0] - pair_2C[1]) / length))
                break
            left_C = left_C - pair_2C[0]
    return gaps


def test_codes_that_are_no_tie_would_be_noticed(model):
    pcm = audio.read(RECORDINGS[0], model.sample_rate)
    codes_QT = codec.encode(model, pcm)
    wrong_QT = codes_QT.copy()
    wrong_QT[3, 7] = (wrong_QT[3, 7] + 1) % 256
    (gap,) = differences(model, pcm, codes_QT, wrong_QT)
    assert gap > 1e-3
    assert differences(model, pcm, codes_QT, codes_QT) == []


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
def test_codes_and_tokens_equal_moshi(model, recording, streaming):
    pcm = audio.read(recording, model.sample_rate)
    padded = references.moshi_pad(pcm, references.read_config(ASSETS)["stt_config"])
    whole = padded[: padded.size // 1920 * 1920]
    assert whole.size < 10 * 24_000, "moshi's streaming codec forgets a step after its window of 10 s"
    codes_QT = codec.encode(model, whole)
    ties = differences(model, whole, codes_QT, references.moshi_codes(ASSETS, whole, streaming=streaming))
    assert len(ties) <= 1
    assert all(gap < 1e-5 for gap in ties), ties
    run = references.moshi_tokens(ASSETS, codes_QT)
    np.testing.assert_array_equal(dsm_jax.transcribe(model, pcm, frames=True).frames.text_tokens, run.tokens_T)


def test_what_adapters_learnt_is_read_by_moshi(tmp_path):
    config = FinetuneConfig(
        data=str(ROOT / "examples/new_speaker/test"),
        output=str(tmp_path / "run"),
        model="digits",
        seconds=8,
        run=RunConfig(steps=3),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup=1),
        lora=LoraConfig(rank=4),
    )
    learnt = finetune(config)
    pcm = audio.read(RECORDINGS[-1], learnt.sample_rate)
    folder = tmp_path / "run/model"
    padded = references.moshi_pad(pcm, references.read_config(folder)["stt_config"])
    codes_QT = references.moshi_codes(folder, padded)
    run = references.moshi_tokens(folder, codes_QT[:, : padded.size // 1920])
    frames = dsm_jax.transcribe(dsm_jax.load(folder), pcm, frames=True).frames
    np.testing.assert_array_equal(frames.text_tokens, run.tokens_T)
    weights = (flatten(model.lm_params)["text_linear.weight_VD"] for model in (learnt, dsm_jax.load(folder)))
    np.testing.assert_array_equal(*weights)


def test_decoded_sound_equals_moshi(model):
    codes_QT = codec.encode(model, RECORDINGS[0])
    sound = references.moshi_decode(ASSETS, codes_QT)
    np.testing.assert_allclose(codec.decode(model, codes_QT), sound, rtol=0, atol=1e-4 * np.abs(sound).max())
