"""Conditioning against the same sums in numpy. test_goldens.py compares its outputs with the reference.

Shape letters: B batch rows, X steps of a condition, C a conditioner's own width, D model width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.configs import Fuser
from dsm_jax.errors import ConfigError, StreamError
from dsm_jax.models.conditioning import Conditioning
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.nn.attention import sinusoids
from tests.helpers import small

VOICE_BXC = np.random.default_rng(0).normal(size=(2, 5, 10)).astype(np.float32)
VALUES = {"speaker_wavs": VOICE_BXC, "cfg": np.array([[1], [3]]), "control": np.array([[0], [0]])}
MASKS = {
    "speaker_wavs": np.array([[True] * 5, [True] * 3 + [False] * 2]),
    "cfg": np.array([[True], [False]]),
    "control": np.array([[True], [True]]),
}


@functools.cache
def conditioning() -> Conditioning:
    return small.build(lambda rngs: Conditioning(small.TTS, rngs=rngs))


def parts(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    conditioner = conditioning().conditioners[name]
    table = None if conditioner.table is None else np.array(conditioner.table.table)
    return table, np.array(conditioner.output_proj.weight[...]).T, np.array(conditioner.learnt_padding_D[...])


@pytest.mark.slow
def test_summed_conditions_are_added_and_a_missing_one_is_its_learnt_vector():
    sum_BD, _ = conditioning()(VALUES, MASKS)
    cfg, control = parts("cfg"), parts("control")
    both = control[0][0] @ control[1]
    np.testing.assert_allclose(sum_BD[0], cfg[0][1] @ cfg[1] + both, atol=1e-5)
    np.testing.assert_allclose(sum_BD[1], cfg[2] + both, atol=1e-5)


@pytest.mark.slow
def test_crossed_conditions_get_positions():
    _, cross_BXD = conditioning()(VALUES, MASKS)
    _, projection_CD, padding_D = parts("speaker_wavs")
    wanted_BXD = np.where(MASKS["speaker_wavs"][..., None], VOICE_BXC @ projection_CD, padding_D)
    wanted_BXD = wanted_BXD + np.array(sinusoids(jnp.arange(5)[None], 16, 10_000.0))
    np.testing.assert_allclose(cross_BXD, wanted_BXD, atol=1e-5)


def test_crossed_conditions_are_concatenated():
    fuser = Fuser(cross=("speaker_wavs", "cfg"))
    model = small.build(lambda rngs: Conditioning(dataclasses.replace(small.TTS, fuser=fuser), rngs=rngs))
    sum_BD, cross_BXD = model(VALUES, MASKS)
    assert sum_BD is None
    assert cross_BXD.shape == (2, 6, 16)
    alone_BXD = model.conditioners["cfg"](VALUES["cfg"], MASKS["cfg"])
    np.testing.assert_array_equal(cross_BXD[:, 5:], alone_BXD)


@pytest.mark.slow
def test_conditions_change_the_logits():
    lm = small.build(lambda rngs: DelayedStreamsLM(small.TTS, rngs=rngs))
    tokens_BMT = np.zeros((2, 7, 1), np.int32)

    def three_ways(values, masks):
        conditions = lm.condition(values, masks)
        assert (len(conditions.cross), conditions.cross[0][0].shape) == (2, (2, 4, 5, 4))
        alike = dataclasses.replace(conditions, cross=jax.tree.map(lambda a: a[:1].repeat(2, 0), conditions.cross))
        unsummed = dataclasses.replace(alike, sum_BD=None)
        return [lm.step(tokens_BMT, lm.init_state(2), conditions=some)[0] for some in (conditions, alike, unsummed)]

    both, summed, none = map(np.array, jax.jit(three_ways)(VALUES, MASKS))
    assert np.abs(both - summed).max() > 1e-2
    assert np.abs(summed - none).max() > 1e-2
    np.testing.assert_array_equal(none[0], none[1])


def test_conditions_that_precede_the_input_are_refused():
    with pytest.raises(
        ConfigError, match=r"^the fuser prepends control; the library fuses by sum and by cross-attention$"
    ):
        Fuser(sum=("cfg",), prepend=("control",))


def test_a_fuser_of_unknown_conditions_is_refused():
    message = r"the fuser takes \['cgf'\] and the conditioners are \['speaker_wavs', 'cfg', 'control'\]; name one of"
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(small.TTS, fuser=Fuser(sum=("cgf",)))


def test_a_model_with_cross_attention_does_not_run_without_conditions():
    lm = small.build(lambda rngs: DelayedStreamsLM(small.TTS, rngs=rngs))
    with pytest.raises(StreamError, match="has cross-attention and got no conditions; make them with `condition`"):
        lm.step(np.zeros((2, 7, 1), np.int32), lm.init_state(2))
