"""The depformer: the inputs and the weights of each step. test_goldens.py compares its outputs with the reference.

Shape letters: B batch rows, T frames, M streams, Q generated codebooks, V vocabulary, D model width.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from dsm_jax.convert.kyutai_config import flat_lm, read_lm
from dsm_jax.errors import ConfigError
from dsm_jax.models.depformer import Depformer
from tests.helpers import small


@functools.cache
def depformer() -> Depformer:
    return small.build(lambda rngs: Depformer(small.TTS, rngs=rngs))


@functools.cache
def clip() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(2, 3, 16)).astype(np.float32), random.integers(0, 12, (2, 7, 3)).astype(np.int32)


@functools.cache
def scores():
    return jax.jit(depformer().__call__)


@pytest.mark.slow
def test_a_codebook_depends_on_the_text_and_on_the_codebooks_before_it():
    hidden_BTD, target_BMT = clip()
    before_BQTV = np.array(scores()(hidden_BTD, target_BMT))
    assert before_BQTV.shape == (2, 4, 3, 12)
    assert before_BQTV.dtype == np.float32
    for stream in range(7):
        changed_BMT = target_BMT.copy()
        changed_BMT[:, stream] = (changed_BMT[:, stream] + 1) % 12
        moved_Q = (np.array(scores()(hidden_BTD, changed_BMT)) != before_BQTV).any(axis=(0, 2, 3))
        # Stream k is codebook k - 1, the input of step k. The last codebook, and those that are not generated, are the
        # input of no step.
        assert moved_Q.tolist() == [q >= stream for q in range(4)]


@pytest.mark.slow
def test_frames_do_not_see_each_other():
    hidden_BTD, target_BMT = clip()
    before_BQTV = np.array(scores()(hidden_BTD, target_BMT))
    other_BTD, other_BMT = hidden_BTD.copy(), target_BMT.copy()
    other_BTD[:, 1] += 1
    other_BMT[:, :, 1] = 5
    after_BQTV = np.array(scores()(other_BTD, other_BMT))
    assert (after_BQTV != before_BQTV).any(axis=(0, 1, 3)).tolist() == [False, True, False]


@pytest.mark.slow
def test_steps_share_weights_by_the_schedule():
    model = depformer()
    assert (len(model.inputs), len(model.linears), len(model.audio_embs)) == (3, 4, 3)
    assert [len(part) for part in (model.layers[0].in_projs, model.layers[0].out_projs, model.layers[0].gating)] == [
        3
    ] * 3
    unscheduled = dataclasses.replace(small.TTS.depformer, weights_per_step_schedule=None)
    own = dataclasses.replace(small.TTS, depformer=unscheduled)
    assert len(nnx.eval_shape(lambda: Depformer(own, rngs=nnx.Rngs(0))).inputs) == 4
    hidden_BTD, target_BMT = clip()
    changed = nnx.merge(*nnx.split(model))
    changed.layers[0].gating = nnx.List([*model.layers[0].gating[:2], model.layers[0].gating[0]])
    moved = np.array(jax.jit(changed.__call__)(hidden_BTD, target_BMT)) != np.array(scores()(hidden_BTD, target_BMT))
    assert moved.any(axis=(0, 2, 3))[2:].all()  # the last set serves the third and the fourth codebook


@pytest.mark.parametrize(
    ("key", "value", "published"),
    [
        ("depformer_multi_linear", False, True),
        ("depformer_weights_per_step", False, True),
        ("depformer_pos_emb", "sin", "none"),
        ("depformer_gating", "none", "silu"),
        ("depformer_layer_scale", 0.1, None),
        ("depformer_norm", "rms_norm", None),
        ("bias_proj", True, False),
    ],
)
def test_depformer_settings_that_no_published_model_has_are_refused(key, value, published):
    config = read_lm(flat_lm(small.TTS) | {key: value}, "config.json")
    with pytest.raises(ConfigError, match=f"{key} is {value!r}; every published depformer has {published!r}"):
        Depformer(config, rngs=nnx.Rngs(0))


def test_a_depformer_that_does_not_see_a_whole_frame_is_refused():
    def config(context: int):
        return dataclasses.replace(small.TTS, depformer=dataclasses.replace(small.TTS.depformer, context=context))

    small.build(lambda rngs: Depformer(config(small.TTS.dep_q), rngs=rngs))
    with pytest.raises(ConfigError, match="depformer_context is 3; the depformer attends to all of a frame's 4 codebo"):
        Depformer(config(3), rngs=nnx.Rngs(0))
