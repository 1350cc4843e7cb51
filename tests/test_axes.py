"""Axis letters: the name of every parameter and state field ends in letters of the glossary."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from dsm_jax.csm import program as csm_program
from dsm_jax.models.csm import CsmLM
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.nn.linear import Linear
from dsm_jax.runtime.compile import compiled
from dsm_jax.runtime.steps import step_limits
from dsm_jax.sharding import RULES, Sharding, letters_of
from dsm_jax.stt import program as stt_program
from dsm_jax.tts import program as tts_program
from dsm_jax.tts.state import TtsSettings
from dsm_jax.tts.words import WordMachine
from tests.helpers import csm_model, small

GLOSSARY = Path(__file__).resolve().parents[1] / "docs/axes.md"


def glossary() -> dict[str, str]:
    """Read the mesh axis of every letter from the glossary; "" for letters that are never split."""
    return dict(re.findall(r"^\| ([A-Z]) \|[^|]*\| ?(\w*) ?\|$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE))


def axis_faults(tree: Any) -> list[str]:
    faults = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        name = next((name for name in reversed(names) if letters_of(name)), names[-1])
        letters = letters_of(name)
        if len(letters) != len(leaf.shape):
            faults.append(f"{'.'.join(names)} has {len(leaf.shape)} axes and {len(letters)} letters")
        faults += [f"{'.'.join(names)}: {letter} is not in docs/axes.md" for letter in letters if letter not in known()]
    return faults


def known() -> set[str]:
    return glossary().keys() | set("123456789")


@pytest.mark.slow
@pytest.mark.parametrize("config", [small.STT, small.TTS], ids=["stt", "tts"])
def test_names_of_the_language_model_end_in_axis_letters(config):
    lm = nnx.eval_shape(lambda: DelayedStreamsLM(config, rngs=nnx.Rngs(0)))
    assert axis_faults(nnx.state(lm)) == []
    assert axis_faults(jax.eval_shape(lambda: lm.init_state(2))) == []


def test_names_of_conversational_speech_end_in_axis_letters():
    lm = nnx.eval_shape(lambda: CsmLM(csm_model.CSM, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(lm)
    assert axis_faults(params) == []
    tokens_BMT = jnp.zeros((2, 5, 9), jnp.int32)
    assert axis_faults(jax.eval_shape(lambda params: nnx.merge(graph, params)(tokens_BMT), params)) == []


def test_names_of_the_codec_end_in_axis_letters():
    mimi = nnx.eval_shape(lambda: Mimi(small.MIMI, rngs=nnx.Rngs(0)))
    assert axis_faults(nnx.state(mimi)) == []
    assert axis_faults(jax.eval_shape(lambda: (mimi.encoder.init_state(2), mimi.decoder.init_state(2)))) == []


@pytest.mark.slow
def test_names_of_the_programs_states_and_outputs_end_in_axis_letters():
    def shapes(program, config, settings, inputs, network=DelayedStreamsLM):
        makers = lambda: network(config, rngs=nnx.Rngs(0)), lambda: Mimi(small.MIMI, rngs=nnx.Rngs(0))
        graphs, params = zip(*(nnx.split(nnx.eval_shape(make)) for make in makers), strict=True)
        state = compiled(program.init_state, graphs, settings).shapes(params)
        outputs, _ = compiled(program.step, graphs, settings).shapes(params, state, inputs)
        return state, outputs

    limits = step_limits([None] * 3, 4, waiting=False)
    chunk = stt_program.SttInputs(np.zeros((3, 2 * small.MIMI.frame_size, 1), np.float32), np.zeros(3, np.int32))
    stt = shapes(stt_program, small.STT, stt_program.SttSettings(3, 64), chunk)
    machine = WordMachine(small.TTS.text_card + 1)
    settings = TtsSettings(slots=3, machine=machine, delay_steps=2, guided=True, prefix_frames=64)
    tts, said = shapes(tts_program, small.TTS, settings, limits)
    conditions = dataclasses.replace(tts, conditions=None)  # tuples of keys and values, whose letters the layers know
    csm = shapes(csm_program, csm_model.CSM, csm_program.CsmSettings(slots=3, positions=64), limits, CsmLM)
    assert axis_faults((stt, conditions, said, csm)) == []


def test_frames_of_outputs_are_on_every_device_of_their_rows():
    outputs = stt_program.FrameOutputs(*(jnp.zeros((2, 4, 2)[:axes]) for axes in (2, 2, 3, 3)))
    places = Sharding(Mesh(jax.devices()[:2], ("model",))).places(outputs)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(places))


def test_the_glossary_and_the_sharding_agree():
    assert {letter: axis for letter, axis in glossary().items() if axis} == dict(RULES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planted:
    rows_BZ: jax.Array
    tail_BT: jax.Array
    position: jax.Array


def test_an_unknown_letter_and_a_missing_letter_are_caught():
    planted = Planted(jnp.zeros((2, 3)), jnp.zeros((2, 3, 4)), jnp.zeros(2))
    assert axis_faults(planted) == [
        "rows_BZ: Z is not in docs/axes.md",
        "tail_BT has 3 axes and 2 letters",
        "position has 1 axes and 0 letters",
    ]
    linear = nnx.eval_shape(lambda: Linear({"D": 3}, {"Z": 2}, rngs=nnx.Rngs(0)))
    assert axis_faults(nnx.state(linear)) == ["weight_ZD.value: Z is not in docs/axes.md"]
