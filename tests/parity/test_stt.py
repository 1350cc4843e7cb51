"""Codes and greedy tokens against the live references, on real speech, through both published layouts."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import dsm_jax
from dsm_jax import codec
from tests.goldens import make_stt
from tests.parity import references

RECORDINGS = ("librispeech", "bria")  # bria is 45 s: well past every attention window


@pytest.fixture(scope="module", params=["in_proj_weight", "in_projs"])
def kyutai(request):
    folder = references.kyutai_stt(extra_heads=True, spelling=request.param)
    return folder, dsm_jax.load(folder)


@pytest.mark.parametrize("recording", RECORDINGS)
def test_codes_and_tokens_equal_moshi(kyutai, recording):
    folder, model = kyutai
    pcm = references.speech(recording)
    padded = references.moshi_pad(pcm, references.read_config(folder)["stt_config"])
    codes = references.moshi_codes(folder, padded)
    np.testing.assert_array_equal(codec.encode(model, padded), codes)

    run = references.moshi_tokens(folder, codes[:, : padded.size // 1920])
    frames = dsm_jax.transcribe(model, pcm, frames=True).frames
    np.testing.assert_array_equal(frames.text_tokens, run.tokens_T)
    # float32 on both sides, summed in another order.
    np.testing.assert_allclose(frames.pause_probabilities, run.pauses_TH, rtol=0, atol=2e-5)


@pytest.mark.parametrize("books", [1, 2, 5, 8])
def test_any_number_of_codebooks_encodes_and_decodes(kyutai, books):
    folder, model = kyutai
    codes = codec.encode(model, references.speech("librispeech"), codebooks=books)
    np.testing.assert_array_equal(codes, references.moshi_codes(folder, references.speech("librispeech"))[:books])
    sound = references.moshi_decode(folder, codes)
    np.testing.assert_allclose(codec.decode(model, codes), sound, rtol=0, atol=1e-4 * np.abs(sound).max())


@pytest.mark.parametrize("recording", RECORDINGS)
@pytest.mark.parametrize("shard", ["50GB", "500KB"])
def test_codes_and_tokens_equal_transformers(recording, shard):
    folder = references.transformers_stt(max_shard_size=shard)
    model = dsm_jax.load(folder)
    pcm = references.speech(recording)
    padded = references.moshi_pad(pcm, references.read_config(references.kyutai_stt())["stt_config"])
    whole = padded[: padded.size // 1920 * 1920]
    np.testing.assert_array_equal(codec.encode(model, whole), references.transformers_codes(folder, whole))
    # generate() stops one step earlier and starts one earlier: its first token has heard nothing.
    tokens = dsm_jax.transcribe(model, pcm, frames=True).frames.text_tokens
    generated = references.transformers_tokens(folder, pcm, audio_window_frames=whole.size // 1920)
    np.testing.assert_array_equal(tokens[:-1], generated[1:])


def test_the_stored_outputs_are_what_their_maker_makes():
    arrays, _ = make_stt.outputs(make_stt.FOLDER / "checkpoint")
    stored = load_file(make_stt.FOLDER / "expected.safetensors")
    assert arrays.keys() == stored.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, stored[name], rtol=1e-4, atol=1e-4, err_msg=name)
