"""Every program compiles for a TPU and for a GPU, updates its state in place, and has no fault of `hlo.faults`."""

import jax
import pytest

from dsm_jax.configs import MimiConfig, presets
from tests.targets import hlo
from tests.targets.devices import DEVICES, devices
from tests.targets.programs import (
    LAYERS,
    Model,
    Program,
    codec_step,
    codec_training_step,
    lm_training_step,
    nbytes,
    shortened,
    shortened_codec,
)

MODELS = {"stt": presets.STT_1B, "tts": presets.TTS_1_6B, "csm": presets.CSM_1B}
PROGRAMS = [("stt", "insert"), ("stt", "step"), ("stt", "chunk")]
PROGRAMS += [(model, program) for model in ("tts", "csm") for program in ("insert", "step")]
WEIGHTS = {"bfloat16": ("bfloat16", None), "int8": ("bfloat16", "int8"), "float32": ("float32", None)}
SLOTS = 4
CODEC = shortened_codec(MimiConfig())
# Known copies on a GPU: a step without sound, whose branch leaves the caches of the codec's decoder alone, copies them,
# and int8 text to speech keeps some caches transposed while a call lasts: docs/decisions/0026.
COPIED = {
    ("tts", "step", "bfloat16"): {"f32[4,8,250,64]": 2 * LAYERS},
    ("csm", "step", "bfloat16"): {"f32[4,8,250,64]": 2 * LAYERS},
    ("tts", "step", "int8"): {"f32[4,8,250,64]": 2 * LAYERS, "bf16[4,16,500,128]": LAYERS},
    ("csm", "step", "int8"): {"f32[4,8,250,64]": 2 * LAYERS},
}


def check(program: Program, device: str, copied: dict[str, int] | None = None) -> None:
    """Raise AssertionError unless a program updates its state in place and has no fault.

    Args:
      program: compiled for the device.
      device: one of `DEVICES`.
      copied: the caches that are known to be copied, and how often, on a GPU.
    """
    text, memory = program.compiled.as_text() or "", program.compiled.memory_analysis()
    assert hlo.faults(text) == []
    # Arrays are padded on a TPU, so that more bytes are updated than the state has. A whole chunk sets the flags of the
    # codec's rows without a look at them.
    flags = [leaf for leaf in jax.tree.leaves(program.state) if leaf.dtype == bool]
    assert memory.alias_size_in_bytes >= nbytes(program.state) - nbytes(flags)
    if device == "h200":  # a TPU has arrays in several layouts, and copies between them
        assert hlo.copies(text, program.caches) == (copied or {})


def compile_one(model: str, name: str, device: str, weights: str = "bfloat16") -> Program:
    dtype, quantize = WEIGHTS[weights]
    made = Model(shortened(MODELS[model]), devices(device)[:1], dtype, quantize)
    return made.programs(SLOTS)[name]()


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_of_the_codec_updates_its_state_in_place(device):
    # First, as it compiles longest: minutes for a TPU.
    check(codec_training_step(CODEC, devices(device)[0], rows=1, frames=8), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "name"), PROGRAMS)
def test_a_program_updates_its_state_in_place(model, name, device):
    check(compile_one(model, name, device), device, COPIED.get((model, name, "bfloat16")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["int8", "float32"])
def test_a_step_of_layers_in_another_dtype_updates_its_state_in_place(weights, device):
    check(compile_one("stt", "insert", device, weights), device)  # it takes the first step of a language model


@pytest.mark.parametrize("model", ["tts", "csm"])
def test_a_step_of_int8_speech_updates_its_state_in_place(model):
    check(compile_one(model, "step", "h200", "int8"), "h200", COPIED[model, "step", "int8"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_step_of_the_codec_updates_its_state_in_place(part, device):
    check(codec_step(CODEC, devices(device)[0], part, rows=1, frames=1), device)


def test_layers_split_over_four_chips_cost_two_sums_each_and_gather_no_cache():
    model = Model(shortened(MODELS["stt"]), devices("v5e"))
    program = model.programs(SLOTS)["insert"]()  # it takes the first step of the language model
    found = hlo.collectives(program.compiled.as_text() or "")
    assert found.pop("all-reduce") == ["bf16[4,1,2048]"] * 2 * LAYERS
    # The most probable token is the best of each chip's part of the vocabulary.
    assert found.keys() == {"all-gather"}
    assert set(found["all-gather"]) == {"f32[4,1,4]", "s32[4,1,4]"}
    caches = [cache for cache in program.caches if cache.dtype == "bfloat16"]
    assert len(caches) == 2 * LAYERS
    memory = program.compiled.memory_analysis()
    assert nbytes(caches) // 4 <= memory.alias_size_in_bytes < nbytes(program.state) // 2
    assert memory.temp_size_in_bytes < nbytes(caches[0]) // 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_updates_its_state_in_place(device):
    check(lm_training_step(shortened(presets.STT_1B), devices(device)[0], rows=2, frames=64), device)
