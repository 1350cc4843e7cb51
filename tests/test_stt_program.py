"""The pure functions of the speech-to-text program, under the caller's own transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.models.streams import TokenRing
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.stt import program
from dsm_jax.stt.host import SttProgram
from dsm_jax.stt.program import DecoderState, SttInputs, SttRequest, SttSettings
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
    assert not np.array_equal(state.decoder.lm.position_B[0], after.decoder.lm.position_B[0])
    assert np.isfinite(outputs.probabilities_BT).all()


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("ahead", [1, 3])
def test_insert_and_the_first_chunk_take_the_same_first_step(parts, ahead, frames):
    lm, mimi, pcm = parts
    chunks = [pcm[:, first * 1_920 : (first + frames) * 1_920] for first in range(0, 4 * frames, frames)]

    @functools.partial(jax.jit, static_argnums=4)
    def step(lm, mimi, state, inputs, settings):
        return program.step(lm, mimi, state, inputs, settings)

    def transcribed(insert_steps):
        settings = SttSettings(2, ahead=ahead, insert_steps=insert_steps)
        state = program.init_state(lm, mimi, settings)
        made = []
        for number, pcm_BTC in enumerate(chunks):
            if number in (0, 2):  # slot 1 begins beside slot 0, which goes on; before, it is idle
                request = jax.tree.map(lambda leaf: leaf[:1], state.request)
                state = program.insert(lm, mimi, state, jnp.array([number // 2]), request, settings)
            frames_B = jnp.array([frames, frames if number >= 2 else 0])
            outputs, state = step(lm, mimi, state, SttInputs(pcm_BTC, frames_B), settings)
            made += [outputs.tokens_BT[0], outputs.tokens_BT[1] if number >= 2 else None]
        return made, state.decoder

    (before, decoder), (after, same) = transcribed(True), transcribed(False)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    np.testing.assert_array_equal(decoder.lm.position_B, [4 * frames + 1, 2 * frames + 1])
    np.testing.assert_array_equal(same.lm.position_B, decoder.lm.position_B)


def test_vmap_over_recordings_equals_a_batch(parts):
    lm, mimi, pcm = parts
    batch, _ = run(lm, mimi, pcm, jnp.array([8, 8]))
    one_by_one = jax.vmap(lambda clip: run(lm, mimi, clip[None], jnp.array([8]))[0])(pcm)
    np.testing.assert_array_equal(batch.tokens_BT, one_by_one.tokens_BT[:, 0])


def often_padding(lm):
    """Return a copy of a model that chooses padding wherever its score is above zero: as often as trained models."""
    graph, params = nnx.split(lm)
    lm = nnx.merge(graph, jax.tree.map(jnp.copy, params))
    weight_VD = lm.text_linear.weight
    weight_VD[...] = weight_VD[...].at[lm.config.existing_text_padding_id].multiply(50)
    return lm


@pytest.mark.parametrize("ahead", [2, 3, 8])
def test_passes_of_several_steps_give_the_tokens_of_single_steps(model, ahead):
    lm, mimi, pcm = often_padding(model.lm), model.codec, jnp.asarray(stt_model.recording()[: 64 * 1_920])
    pcm_BTC = jnp.stack([pcm, jnp.roll(pcm, 20_000), pcm[::-1], pcm, pcm])[:, :, None]
    prompt_BT = jnp.zeros((5, 4), jnp.int32).at[3].set(jnp.array([1, 4, 8, 10]))  # a boundary, padding and two others
    requests = SttRequest(
        key_B2=jnp.arange(10, dtype=jnp.uint32).reshape(5, 2),
        temperature_B=jnp.array([0.0, 0.8, 0.0, 0.0, 1.0]),
        top_k_B=jnp.array([0, 5, 0, 0, 0]),
        prompt_BT=prompt_BT,
        deadline_B=jnp.array([0, 0, 0, 30, 0]),
    )

    def transcribed(ahead, cuts):
        settings = SttSettings(5, prompt_tokens=4, max_top_k=8, ahead=ahead)
        state = program.init_state(lm, mimi, settings)
        state = program.insert(lm, mimi, state, jnp.arange(5), requests, settings)
        parts, start = [], 0
        for frames, frames_B in cuts:
            chunk = SttInputs(pcm_BTC[:, start * 1_920 : (start + frames) * 1_920], jnp.array(frames_B))
            outputs, state = jax.jit(program.step, static_argnums=4)(lm, mimi, state, chunk, settings)
            parts.append(outputs)
            start += frames
        return [jax.tree.map(lambda *a, row=row: np.concatenate([b[row] for b in a]), *parts) for row in range(5)]

    whole = transcribed(1, [(64, [64] * 5)])
    ragged = transcribed(ahead, [(48, [48, 48, 48, 48, 5]), (16, [16, 16, 3, 0, 0])])
    for row, frames in enumerate([64, 64, 51, 48, 5]):
        for name in ("tokens_BT", "probabilities_BT", "pauses_BTA"):
            wanted, found = (getattr(outputs[row], name)[:frames] for outputs in (whole, ragged))
            # The row of padding is 50 times as large, and so is its rounding: 2.4e-5 without AVX-512.
            np.testing.assert_allclose(found, wanted, atol=5e-5, err_msg=f"{name} of row {row}")
    padding = np.mean([outputs.tokens_BT == lm.config.existing_text_padding_id for outputs in whole])
    assert 0.2 < padding < 0.8, "a model that never pads, or only pads, would prove little"


class FixedScores:
    """A language model that likes some tokens best, in this order; in the first step one before all others."""

    config = small.STT

    def __init__(self, first: int, *best: int):
        scores_V = jnp.zeros(18).at[np.array(best)].set(np.arange(len(best), 0, -1.0))
        self.scores_2V = jnp.stack([scores_V.at[first].set(9.0), scores_V])

    def step(self, inputs_BMA, state, lengths_B):
        step_BA, _ = self.peek(inputs_BMA, state)
        return step_BA, self.commit(state, None, lengths_B)

    def peek(self, inputs_BMA, state):
        return state.position_B[:, None] + jnp.arange(inputs_BMA.shape[2]), None

    def commit(self, state, chunk, lengths_B):
        return dataclasses.replace(state, position_B=state.position_B + lengths_B)

    def text_logits(self, step_BA):
        return self.scores_2V[jnp.minimum(step_BA, 1)]

    def extra_probabilities(self, step_BA):
        return jnp.zeros((*step_BA.shape, 4, 1))


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
@pytest.mark.parametrize("most", [1, 3])
def test_a_text_prompt_is_chosen_by_the_model_or_forced_by_its_deadline(best, prompt, deadline, wanted, most):
    lm, settings = FixedScores(*best), SttSettings(1, prompt_tokens=4, ahead=most)
    prompt_BT = jnp.array([[token + 1 for token in prompt] + [0] * (4 - len(prompt))])
    zero_B = jnp.zeros((1,), jnp.int32)
    request = SttRequest(jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1,)), zero_B, prompt_BT, jnp.array([deadline]))
    ring = TokenRing.empty(lm.config, 1, ahead=most)
    state, found = DecoderState(TransformerState((), zero_B), ring, zero_B), []
    step = jax.jit(lambda state: program._text_steps(lm, state, request, jnp.array([most]), settings, most))  # pyright: ignore
    while len(found) < len(wanted):
        made, taken_B, state = step(state)
        found += made.tokens_BT[0, : int(taken_B[0])].tolist()
    assert found[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("best", "left", "taken"),
    [((3, 3), 4, 4), ((3, 3), 2, 2), ((7, 3), 4, 1), ((3, 7), 4, 2), ((3, 3), 0, 0)],
    ids=["padding", "padding, to the end of the chunk", "another at once", "another after the first", "an idle slot"],
)
def test_a_pass_keeps_its_steps_up_to_the_first_token_that_is_not_padding(best, left, taken):
    lm, settings, zero_B = FixedScores(*best), SttSettings(1, ahead=4), jnp.zeros((1,), jnp.int32)
    request = SttRequest(jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1,)), zero_B, jnp.zeros((1, 0), jnp.int32), zero_B)
    state = DecoderState(TransformerState((), zero_B), TokenRing.empty(lm.config, 1, ahead=4), zero_B)
    step = jax.jit(lambda: program._text_steps(lm, state, request, jnp.array([left]), settings, 4))  # pyright: ignore
    assert step()[1].tolist() == [taken]


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


def test_a_program_whose_growth_was_interrupted_grows_at_the_next_request(model, monkeypatch):
    grower = SttProgram(model, 1, (1,))
    state, settings = grower.init(), grower.settings
    fresh = jax.tree.map(lambda leaf: leaf[0], state.request)
    longer = dataclasses.replace(fresh, prompt_BT=jnp.array([1, 4, 8]))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SttProgram, "_inputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grower.insert(state, [0], [longer])
    assert grower.settings == settings
    grown = grower.insert(state, [0], [longer])
    assert grower.settings.prompt_tokens >= 3
    assert jax.tree.map(lambda leaf: leaf.shape, grown) == jax.tree.map(lambda leaf: leaf.shape, grower.init())
