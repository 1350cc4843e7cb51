"""Quantised weights: accuracy and dtype of their products, and models that run with them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsm_jax
from dsm_jax import checkpoints
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models.csm import CsmLM
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.parameters import flatten
from dsm_jax.nn import quant
from dsm_jax.nn.linear import Embedding, Linear
from dsm_jax.nn.precision import set_compute_dtype
from dsm_jax.nn.quant import QuantizedArray
from tests.helpers import csm_model, small
from tests.helpers.optimized import compile_optimized

ROOT = Path(__file__).resolve().parents[1]
RECORDING, DIGITS = ROOT / "examples/audio/digits_jackson.flac", ROOT / "dsm_jax/assets/digits"


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(), (1,), (2, 3)])
@pytest.mark.parametrize(("inputs", "outputs"), [((64,), (3, 2, 4)), ((4, 16), (5,))])
def test_an_int8_product_is_close_to_the_float_product(rows, inputs, outputs):
    x, weight = noise(*rows, *inputs), noise(*outputs, *inputs)
    whole = quant.matmul(x, weight, inputs=len(inputs))
    near = quant.matmul(x, quant.quantize_array(weight, inputs=len(inputs)), inputs=len(inputs))
    assert near.shape == whole.shape == (*rows, *outputs)
    assert near.dtype == jnp.float32
    # Both factors are off by at most half of a step of 1/127 of the largest value; 64 such errors add up at random.
    np.testing.assert_allclose(near, whole, atol=0.4)
    assert np.abs(near - whole).max() > 0


@pytest.mark.slow
def test_an_int8_product_of_exact_values_is_exact():
    x = jnp.asarray([[127.0, -3.0], [0.0, 0.0]])
    weight = jnp.asarray([[127.0, 1.0], [5.0, 127.0]])
    np.testing.assert_array_equal(quant.matmul(x, quant.quantize_array(weight, inputs=1)), x @ weight.T)


@pytest.mark.slow
def test_int8_values_have_a_scale_for_each_output():
    weight = noise(5, 4, 16) * jnp.asarray([1, 10, 100, 1000, 0.0])[:, None, None]
    stored = quant.quantize_array(weight, inputs=2)
    assert (stored.values.shape, stored.values.dtype) == ((5, 4, 16), jnp.int8)
    assert (stored.scale.shape, stored.scale.dtype) == ((5,), jnp.float32)
    assert np.abs(np.asarray(stored.values[:4], int)).max((1, 2)).tolist() == [127] * 4
    assert not np.any(stored.values[4])
    assert (np.asarray(stored.scale) > 0).all(), "0 / 0 is no number, and what int8 makes of it is not defined"
    back = stored.values.astype(jnp.float32) * stored.scale[:, None, None]
    np.testing.assert_allclose(back, weight, atol=float(np.abs(weight).max() / 254) * 1.001)  # half a step


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [((64,), (3, 4, 16)), ((4, 1, 16), (128,))])
def test_an_int8_product_multiplies_integers_and_copies_no_weight(inputs, outputs, split):
    weight = quant.quantize_array(noise(*outputs, *inputs), inputs=len(inputs))

    def product(x: jax.Array, weight: QuantizedArray) -> jax.Array:
        return quant.matmul(x, weight, inputs=len(inputs), split=split)

    compiled = compile_optimized(jax.jit(product).lower(noise(1, 1, *inputs), weight))
    (line,) = [line for line in compiled.as_text().splitlines() if " dot(" in line]
    rows_and_outputs = [2, weight.scale.size]
    kind, shape = re.findall(r"= (\w+)\[([\d,]+)\]", line)[0]
    assert (kind, sorted(map(int, shape.split(",")))) == ("s32", rows_and_outputs)
    assert compiled.memory_analysis().temp_size_in_bytes < weight.values.nbytes


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("split", [False, True])
def test_a_float_product_copies_no_weight(split, rows):
    weight = noise(3, 4, 16, 64)
    lowered = jax.jit(lambda x, w: quant.matmul(x, w, split=split)).lower(noise(rows, 1, 64), weight)
    compiled = compile_optimized(lowered)
    assert compiled.memory_analysis().temp_size_in_bytes < weight.nbytes / 4


@pytest.mark.parametrize(("rows", "shape"), [(2, "96,2"), (64, "96,64"), (65, "65,96")])
@pytest.mark.parametrize("kind", ["f32", "s32"])
def test_a_weight_is_the_left_operand_of_a_product_of_few_rows(kind, rows, shape):
    # XLA on CPU packs the right operand at every call, and swaps the operands where it can fold a transposition.
    weight = noise(96, 64) if kind == "f32" else quant.quantize_array(noise(96, 64), inputs=1)
    compiled = compile_optimized(jax.jit(quant.matmul).lower(noise(rows, 64), weight))
    (line,) = [line for line in compiled.as_text().splitlines() if " dot(" in line]
    assert re.findall(rf"= {kind}\[([\d,]+)\]", line) == [shape]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4, 80])
def test_a_product_and_its_gradients_are_the_same_for_any_number_of_rows(rows):
    x, weight = noise(rows, 2, 8), noise(3, 5, 2, 8)

    def total(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(quant.matmul(x, weight, inputs=2)))

    def wanted(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.einsum("nij,abij->nab", x, weight)))

    found = jax.value_and_grad(total, (0, 1))(x, weight)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.value_and_grad(wanted, (0, 1))(x, weight)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.slow
def test_split_weights_give_the_same_products():
    x, weight = noise(2, 3, 4, 16), noise(2, 5, 4, 16)
    for stored in (weight, quant.quantize_array(weight, inputs=2)):
        whole, split = (quant.matmul(x, stored, inputs=2, split=split) for split in (False, True))
        np.testing.assert_allclose(split, whole, rtol=1e-6, atol=1e-5)  # sums in another order


@pytest.mark.slow
def test_an_int8_table_returns_scaled_rows():
    rows = quant.take(quant.quantize_array(noise(9, 6), inputs=1), jnp.asarray([[3, 8]]))
    np.testing.assert_allclose(rows, noise(9, 6)[jnp.asarray([[3, 8]])], atol=0.02)  # half a step of 3 / 127


def test_a_packed_table_returns_the_bfloat16_rows_in_float32():
    table = noise(9, 6).astype(jnp.bfloat16)
    rows = quant.take(quant.pack_bfloat16(table), jnp.asarray([3, 8]))
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, table[jnp.asarray([3, 8])].astype(jnp.float32))


@pytest.mark.slow
def test_only_the_linears_of_the_layers_are_quantised():
    params = nnx.state(small.build(lambda rngs: DelayedStreamsLM(small.TTS, rngs=rngs)))
    before, after = flatten(params), flatten(quant.quantize(params))
    changed = {name for name, leaf in after.items() if isinstance(leaf, QuantizedArray)}
    kept = before.keys() - changed
    assert {name.split(".")[0] for name in changed} == {"transformer", "depformer"}
    layer = "transformer.layers.1."
    assert {name.removeprefix(layer) for name in changed if name.startswith(layer)} == {
        *(f"self_attn.{name}" for name in ("in_proj.weight_PKHD", "out_proj.weight_DKGH")),
        *(f"cross_attention.{name}" for name in ("q_proj.weight_KHD", "kv_proj.weight_PKHD", "out_proj.weight_DKH")),
        *(f"feedforward.{name}" for name in ("linear_in.weight_PFD", "linear_out.weight_DF")),
    }
    assert all(after[name] is before[name] for name in kept)
    assert {name for name in kept if "norm" not in name and "emb" not in name and "conditioning" not in name} == {
        "text_linear.weight_VD"
    }
    everything = flatten(quant.quantize(params, ["weight_"]))
    assert isinstance(everything["text_linear.weight_VD"], QuantizedArray)


def test_of_a_conversational_speech_model_the_linears_of_both_decoders_are_quantised():
    lm = nnx.eval_shape(lambda: CsmLM(csm_model.CSM, rngs=nnx.Rngs(0)))
    weights = {name for name, shape in flatten(nnx.state(lm)).items() if ".layers." in name and len(shape.shape) > 1}
    assert {name.partition(".")[0] for name in weights} == {"backbone", "depth"}
    assert quant.chosen(nnx.state(lm)).keys() == weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [small.STT, small.TTS], ids=["stt", "tts"])
def test_int8_weights_change_neither_the_dtype_of_activations_nor_of_caches(config, dtype):
    graph, params = nnx.split(small.build(lambda rngs: DelayedStreamsLM(config, dtype=dtype, rngs=rngs)))
    lm = nnx.merge(graph, quant.quantize(params))
    state, conditions = lm.init_state(2), None
    if config.conditioners:
        values = {
            "speaker_wavs": noise(2, 3, 10),
            "cfg": jnp.zeros((2, 1), jnp.int32),
            "control": jnp.zeros((2, 1), jnp.int32),
        }
        masks = {name: jnp.ones(value.shape[:2], bool) for name, value in values.items()}
        conditions = lm.condition(values, masks)
        assert {a.dtype.name for a in jax.tree.leaves(conditions.cross)} == {dtype}
    hidden_BTD, after = jax.jit(lm.step)(jnp.zeros((2, config.n_q + 1, 1), jnp.int32), state, None, conditions)
    assert hidden_BTD.dtype.name == dtype
    assert {a.dtype.name for cache in after.caches for a in jax.tree.leaves(cache)} == {dtype}


@pytest.mark.slow
def test_a_float32_model_with_bfloat16_weights_has_float32_caches():
    lm = small.build(lambda rngs: DelayedStreamsLM(small.STT, rngs=rngs))
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), lm)
    hidden_BTD, state = jax.jit(narrow.step)(jnp.zeros((1, 4, 1), jnp.int32), narrow.init_state(1))
    assert {hidden_BTD.dtype, state.caches[0].k_BKSH.dtype} == {jnp.dtype("float32")}


def test_set_compute_dtype_changes_all_but_conditioning():
    lm = small.build(lambda rngs: DelayedStreamsLM(small.TTS, rngs=rngs))
    set_compute_dtype(lm, jnp.bfloat16)
    assert lm.dtype == lm.text_emb.dtype == lm.depformer.audio_embs[0].dtype == jnp.bfloat16
    assert lm.init_state(1).caches[0].k_BKSH.dtype == jnp.bfloat16
    assert lm.conditioning.conditioners["cfg"].table.dtype == jnp.float32


def test_a_bias_is_added_once_in_the_dtype_of_the_input():
    linear = small.build(lambda rngs: Linear({"D": 3}, {"A": 2, "O": 4}, bias=True, rngs=rngs))
    x = noise(5, 3).astype(jnp.bfloat16)
    assert linear(x).dtype == jnp.bfloat16
    weight, bias = np.asarray(linear.weight_AOD[...]), np.asarray(linear.bias_AO[...])
    wanted = np.einsum("bd,aod->bao", np.asarray(x, np.float32), weight) + bias
    np.testing.assert_allclose(np.asarray(linear(x), np.float32), wanted, rtol=0.05, atol=0.05)  # bfloat16 rounding


def test_each_stream_has_its_own_table():
    embedding = small.build(lambda rngs: Embedding(5, 2, streams=3, rngs=rngs))
    found = embedding(jnp.asarray([[0, 4, -1]]))
    table = np.asarray(embedding.table_QLW[...])
    np.testing.assert_array_equal(found[0], [table[0, 0], table[1, 4], np.zeros(2)])


@pytest.mark.slow
def test_an_int8_model_transcribes_the_same_words_and_cannot_be_saved(tmp_path):
    model, light = dsm_jax.load("digits"), dsm_jax.load("digits", quantize="int8")
    whole, near = (dsm_jax.transcribe(m, RECORDING) for m in (model, light))
    assert near.text == whole.text != ""
    with pytest.raises(CheckpointError, match="digits has int8 weights; save the model that was loaded without them"):
        checkpoints.save(light, tmp_path / "saved")


@pytest.mark.slow
def test_loading_in_int8_rounds_the_stored_weights_of_the_layers_and_no_others():
    model = dsm_jax.load("digits", dtype="float32")
    for dtype in ("float32", "bfloat16"):  # rounded from what is stored, not from bfloat16
        light = dsm_jax.load("digits", dtype=dtype, quantize="int8")
        found, wanted = flatten(light.lm_params), flatten(quant.quantize(model.lm_params))
        assert found.keys() == wanted.keys()
        for name, leaf in wanted.items():
            if isinstance(leaf, QuantizedArray):
                jax.tree.map(np.testing.assert_array_equal, found[name], leaf)
            else:
                np.testing.assert_array_equal(found[name], leaf.astype(dtype))
        assert (light.dtype, light.quantize, light.num_parameters) == (dtype, "int8", model.num_parameters)
        assert f"M parameters, {dtype} with int8 layers, on " in repr(light)
    assert model.quantize is None


def test_forms_of_weights_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="quantize is 'int4'; choose 'int8', or None for weights that are not rounde"):
        dsm_jax.load("digits", quantize="int4")
    codec = next(path for path in DIGITS.iterdir() if path.name.startswith("mimi-"))
    with pytest.raises(ConfigError, match=f"{codec.name} is a codec, which is always float32; leave out quantize"):
        dsm_jax.load(codec, quantize="int8")
