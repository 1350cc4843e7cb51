"""The pure functions of the speech-to-text program, under the caller's own transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.stt import program
from dsm_jax.stt.program import SttInputs, SttProgram, SttSettings
from tests.helpers import stt_model
from tests.helpers.optimized import compile_optimized

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return stt_model.model()


@pytest.fixture(scope="module")
def parts(model):
    lm, mimi = model.lm, model.codec
    pcm = jnp.asarray(stt_model.recording()[: 8 * 1_920])[None, :, None]
    return lm, mimi, jnp.concatenate([pcm, 0.5 * pcm])


def run(lm, mimi, pcm_BTC, frames_B, state=None):
    def pure(lm, mimi, pcm_BTC, frames_B, state):
        settings = SttSettings(pcm_BTC.shape[0])
        if state is None:
            state = program.init_state(lm, mimi, settings)
            state = program.insert(lm, mimi, state, jnp.arange(settings.slots), state.request, settings)
        return program.step(lm, mimi, state, SttInputs(pcm_BTC, frames_B), settings)

    return jax.jit(pure)(lm, mimi, pcm_BTC, frames_B, state)


def test_a_row_without_frames_is_untouched(parts):
    lm, mimi, pcm = parts
    _, state = run(lm, mimi, pcm, jnp.array([8, 8]))
    outputs, after = run(lm, mimi, pcm, jnp.array([8, 0]), state)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before[1], now[1])
    assert not np.array_equal(state.lm.position_B[0], after.lm.position_B[0])
    assert np.isfinite(outputs.probabilities_BF).all()


def test_vmap_over_recordings_equals_a_batch(parts):
    lm, mimi, pcm = parts
    batch, _ = run(lm, mimi, pcm, jnp.array([8, 8]))
    one_by_one = jax.vmap(lambda clip: run(lm, mimi, clip[None], jnp.array([8]))[0])(pcm)
    np.testing.assert_array_equal(batch.tokens_BF, one_by_one.tokens_BF[:, 0])


def test_the_loss_of_a_clip_has_finite_gradients(model, parts):
    _, mimi, pcm = parts
    codes = jax.jit(lambda mimi, pcm: mimi.encode(pcm))(mimi, pcm)
    text = jnp.ones((2, 1, codes.shape[2]), jnp.int32)

    def loss(params):
        logits = nnx.merge(model.lm_def, params)(jnp.concatenate([text, codes], axis=1)).text_logits_BTV
        return -jax.nn.log_softmax(logits)[..., 1].mean()

    grads = jax.jit(jax.grad(loss))(model.lm_params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(grads)) > 0


def test_the_state_is_updated_where_it_lies(model):
    made = SttProgram(model, 2, (1, 4))
    state = made.init()
    for frames in made.chunks:
        lowered = made._step._jitted.lower(made._params, state, made._inputs([None] * 2, frames))
        memory = compile_optimized(lowered).memory_analysis()
        assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
