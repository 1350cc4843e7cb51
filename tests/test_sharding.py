"""Sharding: placement of arrays, number of collectives, and equality with the results of one device."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import dsm_jax
from dsm_jax import checkpoints, csm, synthesis
from dsm_jax.configs import TransformerConfig
from dsm_jax.errors import ConfigError
from dsm_jax.nn import quant
from dsm_jax.nn.transformer import Transformer
from dsm_jax.sharding import Sharding, letters_of, set_sharding
from dsm_jax.streaming import KVCache
from dsm_jax.tts import Request, SynthesizeOptions, synthesize_each
from tests.helpers import csm_model, small, stt_model, tts_model
from tests.helpers.optimized import compile_optimized

pytestmark = pytest.mark.slow

RECORDING = Path(__file__).resolve().parents[1] / "examples/audio/digits_jackson.flac"

CONFIG = TransformerConfig(
    d_model=64, num_heads=4, num_layers=2, dim_feedforward=96, context=512, gating="silu", norm="rms_norm_f32"
)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def over(*axes: str) -> Sharding:
    """Make a mesh with two devices along the first axis."""
    return Sharding(Mesh(np.array(jax.devices()[:2]).reshape(2, *(1,) * (len(axes) - 1)), axes))


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Count the collectives of each kind in a program."""
    text = compiled.as_text() or ""
    found = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return {kind: count for kind, count in found.items() if count}


def split_transformer(sharding: Sharding, **changes: Any) -> tuple[nnx.GraphDef, nnx.State]:
    config = dataclasses.replace(CONFIG, **changes)
    module = small.build(lambda rngs: Transformer(config, rngs=rngs))
    set_sharding(module, sharding)
    graph, params = nnx.split(module)
    return graph, jax.device_put(params, sharding.places(params))


def test_letters_of_returns_the_axis_letters_of_a_name():
    assert [letters_of(name) for name in ("k_BKSH", "weight_VD", "position", "x_y_B1", "BT")] == [
        *("BKSH", "VD", "", "B1", "BT"),
    ]


def test_a_mesh_axis_splits_one_axis_that_divides():
    sharding = over("model", "data")
    assert sharding.spec("BKSH", (4, 2, 3, 5)) == PartitionSpec("data", "model", None, None)
    assert sharding.spec("KF", (4, 4)) == PartitionSpec("model", None)
    assert sharding.spec("VD", (3, 4)) == PartitionSpec(None, None)
    assert over("data").spec("KB", (4, 4)) == PartitionSpec(None, "data")


def test_rules_for_an_axis_that_the_mesh_lacks_are_refused():
    with pytest.raises(ConfigError, match=r"the rules name the mesh axes \['model'\]; the mesh has \['data'\]"):
        Sharding(over("data").mesh, (("F", "model"),))


def test_a_mesh_that_would_split_nothing_is_refused():
    with pytest.raises(ConfigError, match=r'the mesh has the axes \[\'tp\'\], which split nothing; name one "data",'):
        over("tp")
    assert Sharding(over("data").mesh, (("F", "data"),)).spec("F", (2,)) == PartitionSpec("data")


def test_int8_weights_are_split_like_the_float_weights():
    sharding = over("model")
    _, params = split_transformer(sharding)
    places = sharding.places(quant.quantize(params, ["weight"]))
    layer = places["layers"][0]
    assert layer["self_attn"]["in_proj"]["weight_PKHD"].get_value() == quant.QuantizedArray(
        *(jax.NamedSharding(sharding.mesh, PartitionSpec(None, "model", *rest)) for rest in ((None, None), (None,)))
    )
    assert layer["feedforward"]["linear_out"]["weight_DF"].get_value().values.spec == PartitionSpec(None, "model")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kv_repeat", [1, 2])
def test_a_layer_split_by_heads_costs_two_sums_and_copies_no_cache(steps, kv_repeat):
    sharding = over("model")
    graph, params = split_transformer(sharding, kv_repeat=kv_repeat)
    init = jax.jit(lambda params: nnx.merge(graph, params).init_state(2))
    state = init(params)
    x_BTD = jnp.zeros((2, steps, 64))
    step = jax.jit(lambda params, x_BTD, state: nnx.merge(graph, params).step(x_BTD, state), donate_argnums=2)
    compiled = compile_optimized(step.lower(params, x_BTD, state))
    assert collectives(compiled) == {"all-reduce": 2 * CONFIG.num_layers}
    part = state.caches[0].k_BKSH.nbytes // 2
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < part
    assert memory.alias_size_in_bytes >= 2 * CONFIG.num_layers * part


def test_the_count_of_collectives_finds_a_planted_one():
    # Without its sharding the module writes as on one device, and XLA gathers the heads.
    sharding = over("model")
    graph, params = split_transformer(sharding)
    module = nnx.merge(graph, params)
    state = module.init_state(2)
    set_sharding(module, None)
    plain = nnx.graphdef(module)
    step = jax.jit(lambda params, x_BTD, state: nnx.merge(plain, params).step(x_BTD, state), donate_argnums=2)
    compiled = compile_optimized(step.lower(params, jnp.zeros((2, 1, 64)), state))
    assert collectives(compiled).keys() > {"all-reduce"}


@pytest.mark.parametrize("jitted", [False, True])
def test_a_cache_is_never_whole_on_one_device(jitted):
    graph, params = split_transformer(over("model", "data"))

    def init(params: nnx.State) -> Any:
        return nnx.merge(graph, params).init_state(2)

    if jitted:
        compiled = compile_optimized(jax.jit(init).lower(params))
        caches = 2 * CONFIG.num_layers * 2 * 4 * 512 * 16 * 4
        assert compiled.memory_analysis().output_size_in_bytes < 0.6 * caches
    state = (jax.jit(init) if jitted else init)(params)
    for cache in state.caches:
        assert isinstance(cache, KVCache)
        assert {s.data.shape for s in cache.k_BKSH.addressable_shards} == {(2, 2, 512, 16)}


def test_a_split_model_has_the_outputs_of_one_device():
    sharding = over("model")
    graph, params = split_transformer(sharding, context=5)
    module = nnx.merge(graph, params)
    set_sharding(module, None)
    plain = jax.device_put(nnx.state(module), jax.devices()[0])
    x_BTD = np.random.default_rng(0).normal(size=(2, 12, 64)).astype(np.float32)
    outputs = []
    for one_graph, one in ((graph, params), (nnx.graphdef(module), plain)):
        step = jax.jit(lambda p, x, state, g=one_graph: nnx.merge(g, p).step(x, state))
        state, ys = nnx.merge(one_graph, one).init_state(2), []
        for start, stop in ((0, 1), (1, 4), (4, 5), (5, 10), (10, 12)):
            y, state = step(one, x_BTD[:, start:stop], state)
            ys.append(np.asarray(y))
        outputs.append(np.concatenate(ys, axis=1))
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5)  # sums of two parts, in another order


def test_rows_on_different_devices_need_no_collectives():
    sharding = over("data")
    graph, params = split_transformer(sharding)
    state = jax.jit(lambda params: nnx.merge(graph, params).init_state(2))(params)
    state = jax.device_put(state, sharding.places(state))

    def step(params: nnx.State, x_BTD: jax.Array, state: Any) -> Any:
        y_BTD, state = nnx.merge(graph, params).step(x_BTD, state)
        return {"y_BTD": y_BTD, "state": state}

    rows = jax.jit(sharding.over_rows(step), donate_argnums=2)
    compiled = compile_optimized(rows.lower(params, jnp.zeros((2, 1, 64)), state))
    assert collectives(compiled) == {}
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 64)), jnp.float32)
    wanted = jax.jit(step)(params, x_BTD, state)
    found = rows(params, x_BTD, state)
    assert found["y_BTD"].sharding.spec[0] == found["state"].caches[0].k_BKSH.sharding.spec[0] == "data"
    assert found["state"].position_B.tolist() == [1, 1]
    np.testing.assert_allclose(found["y_BTD"], wanted["y_BTD"], rtol=0, atol=1e-6)  # sums of one row or of two at once


def test_over_rows_refuses_a_result_without_rows():
    total = over("data").over_rows(lambda x_BT: {"total": x_BT.sum()})
    with pytest.raises(ConfigError, match=r"the result \(\) has no axis B; name its axes, or leave it out"):
        total(jnp.ones((2, 3)))


def test_over_rows_runs_rows_that_do_not_divide_unsplit():
    doubled = over("data").over_rows(lambda x_BT: {"y_BT": 2 * x_BT})
    np.testing.assert_array_equal(doubled(jnp.ones((3, 2)))["y_BT"], 2)


def test_speech_to_text_with_split_parameters_gives_the_tokens_of_one_device():
    recording = stt_model.recording()
    whole = dsm_jax.transcribe(stt_model.model(), recording, frames=True)
    split = dsm_jax.load(stt_model.CHECKPOINT, sharding=over("model"))
    found = dsm_jax.transcribe(split, recording, frames=True)
    assert found.frames.text_tokens == whole.frames.text_tokens


def test_int8_speech_to_text_with_split_parameters_gives_the_tokens_of_one_device():
    whole, split = (dsm_jax.load("digits", quantize="int8", sharding=over(axis)) for axis in ("data", "model"))
    in_proj = split.lm_params["transformer"]["layers"][0]["self_attn"]["in_proj"]["weight_PKHD"].get_value()
    assert in_proj.scale.sharding.spec == PartitionSpec(None, "model")
    assert in_proj.values.sharding.spec == PartitionSpec(None, "model", None, None)
    found, wanted = (dsm_jax.transcribe(model, RECORDING, frames=True) for model in (split, whole))
    assert found.frames.text_tokens == wanted.frames.text_tokens


@pytest.mark.parametrize("axis", ["data", "model"])
def test_recordings_in_slots_on_two_devices_give_the_tokens_of_one_device(axis):
    recording = stt_model.recording()
    clips = [recording[:70_001], recording[30_000:60_000], recording[10_000:50_003]]
    found, wanted = (
        [result.frames.text_tokens for result in dsm_jax.transcribe(model, clips, batch_size=2, frames=True)]
        for model in (dsm_jax.load(stt_model.CHECKPOINT, sharding=over(axis)), stt_model.model())
    )
    assert found == wanted


@pytest.mark.parametrize(("axis", "goes_on"), [("data", False), ("model", False), ("data", True), ("model", True)])
def test_speech_in_slots_on_two_devices_has_the_frames_of_one_device(tmp_path, axis, goes_on):
    folder = tts_model.make_checkpoint(tmp_path, tts_model.PREFIX if goes_on else tts_model.SPEAKERS)
    samples_of = np.random.default_rng(0).normal(scale=0.1, size=(2, 3000)).astype(np.float32)
    voices = list(samples_of) if goes_on else [tts_model.voice(0), tts_model.voice(1)]
    texts = "good morning everyone", "at the station"
    requests = [Request(text, (voice,)) for text, voice in zip(texts, voices, strict=True)]
    options = SynthesizeOptions(temperature=0.8, seed=3)
    frames = []
    for sharding in (None, over(axis)):
        results = synthesize_each(dsm_jax.load(folder, sharding=sharding), requests, options=options, batch_size=2)
        frames.append({index: speech.frames for index, speech in results})
    for index in range(len(requests)):
        np.testing.assert_array_equal(frames[1][index], frames[0][index])


@pytest.mark.parametrize("axis", ["data", "model"])
def test_conversations_in_slots_on_two_devices_have_the_codes_of_one_device(tmp_path, axis):
    checkpoints.save(csm_model.random_model(tmp_path), tmp_path / "saved")
    heard = csm.Segment("hi", 1, np.random.default_rng(0).normal(scale=0.1, size=1500).astype(np.float32))
    requests = [csm.Request("hello there.", 0), csm.Request("no", 1, [heard]), csm.Request("what?", 0, [heard, heard])]
    options = csm.CsmOptions(temperature=0.8, seed=3, max_frames=12)
    found = []
    for sharding in (None, over(axis)):
        model = dsm_jax.load(tmp_path / "saved", sharding=sharding)
        results = dict(synthesis.synthesize_each(model, requests, options=options, batch_size=2))
        speeches = [results[index] for index in range(len(requests))]
        found.append([getattr(speech, "speech", speech).frames for speech in speeches])
    for on_one, on_two in zip(*found, strict=True):
        np.testing.assert_array_equal(on_two, on_one)
