"""The codec. test_goldens.py compares its codes with the reference's, test_streaming.py checks that it streams.

Shape letters: B batch rows, T samples or frames, C audio channels, D latent width, Q codebooks.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.configs import MimiConfig
from dsm_jax.errors import StreamError
from dsm_jax.models.mimi import Mimi, MimiDecoder, MimiEncoder, pad_to_frames
from tests.helpers import small
from tests.helpers.check import check_in_place

FRAME = small.MIMI.frame_size


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    return small.build(lambda rngs: Mimi(small.MIMI, rngs=rngs))


@pytest.fixture(scope="module")
def samples_BTC() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 12 * FRAME - 5, 1)).astype(np.float32)


@pytest.mark.slow
def test_encoding_a_stream_gives_the_codes_of_the_clip(mimi, samples_BTC):
    codes_BQT = jax.jit(mimi.encode)(samples_BTC)
    assert codes_BQT.shape == (2, 4, 12)
    step, state, found = jax.jit(mimi.encode_step), mimi.encoder.init_state(2), []
    for chunk_BTC in np.split(np.pad(samples_BTC, ((0, 0), (0, 5), (0, 0))), 12, axis=1):
        codes, state = step(chunk_BTC, state)
        found.append(codes)
    np.testing.assert_array_equal(np.concatenate(found, axis=2), codes_BQT)


@pytest.mark.slow
def test_decoding_a_stream_gives_the_samples_of_the_clip(mimi):
    codes_BQT = np.random.default_rng(0).integers(0, 16, size=(2, 4, 9)).astype(np.int32)
    audio_BTC = jax.jit(mimi.decode)(codes_BQT)
    assert audio_BTC.shape == (2, 9 * FRAME, 1)
    step, state, found = jax.jit(mimi.decode_step), mimi.decoder.init_state(2), []
    for t in range(9):
        audio, state = step(codes_BQT[:, :, t : t + 1], state)
        found.append(audio)
    np.testing.assert_allclose(np.concatenate(found, axis=1), audio_BTC, atol=2e-5)


@pytest.mark.slow
def test_fewer_codebooks_give_the_first_codes_of_all(mimi, samples_BTC):
    def two_ways(frame_BTC):
        state = mimi.encoder.init_state(2)
        return [mimi.encode_step(frame_BTC, state, codebooks=codebooks)[0] for codebooks in (2, None)]

    two_BQT, all_BQT = jax.jit(two_ways)(samples_BTC[:, :FRAME])
    np.testing.assert_array_equal(two_BQT, all_BQT[:, :2])
    assert all_BQT.shape == (2, 4, 1)


def test_the_end_is_padded_with_zeros_to_a_whole_frame(samples_BTC):
    padded_BTC = np.pad(samples_BTC, ((0, 0), (0, 5), (0, 0)))
    np.testing.assert_array_equal(pad_to_frames(jnp.asarray(samples_BTC), FRAME), padded_BTC)
    np.testing.assert_array_equal(pad_to_frames(jnp.asarray(padded_BTC), FRAME), padded_BTC)


@pytest.mark.parametrize("samples", [0, 1, FRAME - 1, FRAME + 1])
def test_a_chunk_must_be_whole_frames(mimi, samples):
    message = (
        f"Mimi got {samples} samples; a chunk is a positive multiple of {FRAME} samples, so hold back what is over"
    )
    with pytest.raises(StreamError, match=re.escape(message)):
        mimi.encode_step(jnp.zeros((1, samples, 1)), mimi.encoder.init_state(1))


@pytest.mark.slow
def test_the_published_codec_has_12_frames_and_a_half_of_32_codes_a_second():
    def run(samples_BTC):
        mimi = Mimi(MimiConfig(), rngs=nnx.Rngs(0))
        codes_BQT = mimi.encode(samples_BTC)
        return codes_BQT, mimi.decode(codes_BQT)

    codes_BQT, audio_BTC = jax.eval_shape(run, jax.ShapeDtypeStruct((1, 48_000, 1), jnp.float32))
    assert (codes_BQT.shape, codes_BQT.dtype) == ((1, 32, 25), jnp.int32)
    assert audio_BTC.shape == (1, 48_000, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "chunk"), [(MimiEncoder, (2, FRAME, 1)), (MimiDecoder, (2, 1, 16))])
def test_a_step_of_one_frame_updates_its_caches_in_place(side, chunk):
    transformer = dataclasses.replace(small.MIMI.transformer, context=8192)
    config = dataclasses.replace(small.MIMI, transformer=transformer)
    module = small.build(lambda rngs: side(config, rngs=rngs))
    check_in_place(module.step, jnp.zeros(chunk), module.init_state(2))
