"""The pure functions of the speech-to-text program, under the caller's own transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.models.streams import TokenRing
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.stt import program
from dsm_jax.stt.program import SttInputs, SttProgram, SttRequest, SttSettings, SttState
from tests.helpers import small, stt_model
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


class FixedScores:
    """A language model that likes some tokens best, in this order; in the first step one before all others."""

    config = small.STT

    def __init__(self, first: int, *best: int):
        scores_V = jnp.zeros(18).at[np.array(best)].set(np.arange(len(best), 0, -1.0))
        self.scores_2V = jnp.stack([scores_V.at[first].set(9.0), scores_V])

    def step(self, inputs_BM1, state, lengths_B):
        return state.position_B, dataclasses.replace(state, position_B=state.position_B + lengths_B)

    def text_logits(self, step_B):
        return self.scores_2V[jnp.minimum(step_B, 1)][:, None]

    def extra_probabilities(self, step_B):
        return jnp.zeros((1, 1, 4, 1))


@pytest.mark.parametrize(
    ("best", "prompt", "deadline", "wanted"),
    [
        # A boundary is silent, but is the prompt's own from the first frame on; the rest is forced just in time.
        ((15, 15, 0), (0, 7, 9), 6, [0, 0, 0, 0, 0, 7, 9, 15]),
        ((0, 15, 3), (0, 7), 4, [0, 3, 3, 0, 7, 15]),
        # A token that the model would choose waits for the first frame, as what is made before it is lost.
        ((7, 15, 7, 3), (7, 9), 4, [3, 7, 3, 3, 9, 15]),
    ],
)
def test_a_text_prompt_is_chosen_by_the_model_or_forced_by_its_deadline(best, prompt, deadline, wanted):
    lm, settings = FixedScores(*best), SttSettings(1, prompt_tokens=4)
    prompt_BT = jnp.array([[token + 1 for token in prompt] + [0] * (4 - len(prompt))])
    zero_B = jnp.zeros((1,), jnp.int32)
    request = SttRequest(jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1,)), zero_B, prompt_BT, jnp.array([deadline]))
    state = SttState(None, TransformerState((), zero_B), TokenRing.empty(lm.config, 1), zero_B, request)  # pyright: ignore
    step, found = jax.jit(lambda state: program._text_step(lm, state, jnp.array([True]), settings)), []
    for _ in wanted:
        (token_B, _, _), state = step(state)
        found.append(int(token_B[0]))
    assert found == wanted


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
