"""The published checkpoints, by structure: every listed tensor has its place, and every parameter is filled."""

import collections
import dataclasses
import functools
import json
from pathlib import Path

import pytest

from dsm_jax.configs import ModelConfig, presets
from dsm_jax.convert import (
    kyutai,
    kyutai_config,
    pieces,
    sesame,
    transformers_csm,
    transformers_mimi,
    transformers_stt,
)
from dsm_jax.models.family import abstract_model

pytestmark = pytest.mark.slow

PUBLISHED = Path(__file__).with_name("published")
NAMES = ("stt-1b-en_fr", "stt-2.6b-en", "tts-1.6b-en_fr")


def listing(name: str) -> dict[str, pieces.Tensor]:
    """Return the tensors of a published file, as its listing has them; they cannot be read."""
    lines = (PUBLISHED / f"{name}.tensors.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    assert len({row[0] for row in rows}) == len(rows)

    def read(rows):
        raise AssertionError("a listing holds no values")

    return {name: pieces.Tensor(tuple(map(int, shape.split("x"))), dtype, read) for name, dtype, shape in rows}


def csm_faults(tables, tensors) -> list[str]:
    """Return the faults of CSM's tensors, by network, under the published config."""
    config, _ = published_csm()
    plans = {part: pieces.plan(table, tensors[part], parameters(config, part)) for part, table in tables.items()}
    return [fault for _, faults in plans.values() for fault in faults]


def csm_layout(layout: str):
    """Return the tables and the listed tensors of a layout of CSM, by network."""
    config, csm = published_csm()
    if layout == "sesame":
        tables = {"lm": sesame.table(csm), "mimi": kyutai.mimi_table(config.mimi)}
        return tables, {"lm": listing("csm-1b-original"), "mimi": listing("mimi")}
    prefix = transformers_csm.CODEC_PREFIX
    tables = {"lm": transformers_csm.table(csm), "mimi": transformers_mimi.table(config.mimi, prefix)}
    split = {"lm": {}, "mimi": {}}
    for name, tensor in listing("csm-1b-trfs").items():
        split["mimi" if name.startswith(prefix) else "lm"][name] = tensor
    return tables, split


@functools.cache
def published_csm():
    """Return the published config of CSM, and that of its language model; the tokenizer names the end of a text."""
    values = json.loads((PUBLISHED / "csm-1b.config.json").read_text())
    return transformers_csm.read_config(values, 128_001, "csm-1b")


def published_config(name: str) -> ModelConfig:
    config, _, _ = kyutai_config.read_config(json.loads((PUBLISHED / f"{name}.config.json").read_text()), name)
    return config


@functools.cache
def parameters(config: ModelConfig, network: str):
    return abstract_model(config)[network].parameters


def faults_of(name: str, tensors: dict[str, pieces.Tensor] | None = None) -> list[str]:
    tensors = listing(name) if tensors is None else tensors
    if name == "mimi":
        config = ModelConfig(model_type="mimi")
        return pieces.plan(kyutai.mimi_table(config.mimi), tensors, parameters(config, "mimi"))[1]
    config = published_config(name)
    config = dataclasses.replace(config, lm=kyutai_config.with_extra_heads(config.lm, tensors))
    return pieces.plan(kyutai.lm_table(config.lm), tensors, parameters(config, "lm"))[1]


@pytest.mark.parametrize(
    ("name", "count"), [("mimi", 318), ("stt-1b-en_fr", 131), ("stt-2.6b-en", 323), ("tts-1.6b-en_fr", 418)]
)
def test_every_published_tensor_has_its_place_and_every_parameter_is_filled(name, count):
    tensors = listing(name)
    assert len(tensors) == count
    assert faults_of(name, tensors) == []


@pytest.mark.parametrize(("layout", "counts"), [("sesame", (187, 318)), ("transformers", (188, 350))])
def test_every_tensor_of_csm_has_its_place_and_every_parameter_is_filled(layout, counts):
    tables, tensors = csm_layout(layout)
    assert (len(tensors["lm"]), len(tensors["mimi"])) == counts
    assert csm_faults(tables, tensors) == []


def test_the_shards_of_csm_have_126_and_412_tensors():
    shards = [line.split("\t")[1] for line in (PUBLISHED / "csm-1b-trfs.shards.tsv").read_text().splitlines()]
    assert sorted(collections.Counter(shards).values()) == [126, 412]
    names = [line.split("\t")[0] for line in (PUBLISHED / "csm-1b-trfs.shards.tsv").read_text().splitlines()]
    assert set(names) == listing("csm-1b-trfs").keys()


@pytest.mark.parametrize("layout", ["sesame", "transformers"])
def test_a_fault_in_the_tensors_of_csm_is_reported(layout):
    tables, tensors = csm_layout(layout)
    lm = tensors["lm"]
    for victim in [name for name in lm if "embed_audio_tokens" not in name and "depth_decoder.model.embed" not in name]:
        (fault,) = csm_faults(tables, tensors | {"lm": without_first(lm, victim)})
        assert fault == f"missing: {victim}, expected {pieces.shown(lm[victim].shape)}"
    reshaped = dataclasses.replace(lm["projection.weight" if layout == "sesame" else "lm_head.weight"], shape=(7, 7))
    victim = "projection.weight" if layout == "sesame" else "lm_head.weight"
    (fault,) = csm_faults(tables, tensors | {"lm": lm | {victim: reshaped}})
    assert fault == f"shape: {victim} is 7x7, expected {pieces.shown(lm[victim].shape)}"
    (fault,) = csm_faults(tables, tensors | {"lm": lm | {"stowaway": reshaped}})
    assert fault == "unknown: stowaway, 7x7; the model has no place for it"


def test_the_published_config_of_csm_is_the_papers():
    config, csm = published_csm()
    assert (csm.n_q, csm.card, csm.text_card) == (32, 2051, 128_256)
    assert (csm.begin_id, csm.end_id, csm.audio_id, csm.audio_end_id) == (128_000, 128_001, 128_002, 128_003)
    sizes = [(d.d_model, d.inner_width, d.num_layers, d.num_heads, d.num_kv_heads) for d in (csm.backbone, csm.depth)]
    assert sizes == [(2048, 8192, 16, 32, 8), (1024, 8192, 4, 8, 2)]
    assert (csm.backbone.context, csm.depth.context) == (2048, 33)
    assert config.mimi == ModelConfig(model_type="mimi").mimi
    assert len(parameters(config, "lm")) == 6 * 20 + 7  # six for each layer


def test_transformers_default_config_of_csm_is_the_published_one_without_scaling():
    values = json.loads((PUBLISHED / "csm-1b-trfs.defaults.config.json").read_text())
    found = transformers_csm.read_config(values, 128_001, "defaults")[1]
    published = published_csm()[1]
    assert found.backbone.rope_scaling is found.depth.rope_scaling is None
    for part in ("backbone", "depth"):
        scaled = dataclasses.replace(getattr(found, part), rope_scaling=getattr(published, part).rope_scaling)
        found = dataclasses.replace(found, **{part: scaled})
    assert found == published


def test_the_twin_with_four_pause_heads_has_its_place():
    tensors = listing("stt-1b-en_fr")
    like = tensors["text_linear.weight"]
    tensors |= {f"extra_heads.{p}.weight": dataclasses.replace(like, shape=(6, 2048)) for p in range(4)}
    assert len(tensors) == 135
    assert faults_of("stt-1b-en_fr", tensors) == []


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_twin_for_mlx_has_its_place(name):
    renamed = {}
    for old, tensor in listing(name).items():
        new = old.replace(".alpha", ".weight").replace(".in_proj_weight", ".in_proj.weight")
        new = f"audio_embs{new.removeprefix('emb')}" if new.startswith("emb.") else new
        renamed[new] = dataclasses.replace(tensor, shape=tensor.shape[-1:]) if old.endswith(".alpha") else tensor
    assert len(renamed.keys() - listing(name).keys()) > 32
    assert faults_of(name, renamed) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_published_config_is_read(name):
    assert published_config(name).lm is not None


@pytest.mark.parametrize(
    ("name", "preset"),
    [("stt-1b-en_fr", presets.STT_1B), ("stt-2.6b-en", presets.STT_2_6B), ("tts-1.6b-en_fr", presets.TTS_1_6B)],
)
def test_the_presets_are_the_published_configs(name, preset):
    assert dataclasses.replace(published_config(name), model_id=preset.model_id) == preset


@pytest.mark.parametrize("name", NAMES)
def test_a_published_config_is_written_back_key_for_key(name):
    published = json.loads((PUBLISHED / f"{name}.config.json").read_text())
    config, lm, files = kyutai_config.read_config(published, name)
    written = kyutai_config.write_config(config, lm, files)
    written |= {key: None for key in ("text_card_out",) if key in published}  # said, and None by default
    assert json.loads(json.dumps(written)) == published


def without_first(tensors: dict[str, pieces.Tensor], name: str) -> dict[str, pieces.Tensor]:
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize("name", ["mimi", *NAMES])
def test_a_missing_tensor_is_reported_with_its_shape(name):
    tensors = listing(name)
    others = [n for n in tensors if not n.endswith("_initialized")]
    packed = [n for n in others if "in_proj" in n or n.startswith("depformer.layers.0")]
    for first in [*others[:: len(tensors) // 5], *packed[:6]]:
        (fault,) = faults_of(name, without_first(tensors, first))
        assert fault.startswith(f"missing: {first}, expected ")
        expected = fault.rpartition(" ")[2]
        assert expected.removeprefix("1x1x") == pieces.shown(tensors[first].shape).removeprefix("1x1x")


@pytest.mark.parametrize("name", ["mimi", *NAMES])
def test_an_extra_tensor_is_reported(name):
    tensors = listing(name)
    extra = {"stowaway.weight": next(iter(tensors.values()))}
    (fault,) = faults_of(name, tensors | extra)
    assert fault.startswith("unknown: stowaway.weight, ")
    assert fault.endswith("; the model has no place for it")


@pytest.mark.parametrize("name", ["mimi", *NAMES])
def test_a_reshaped_tensor_is_reported_with_both_shapes(name):
    tensors = listing(name)
    for victim in list(tensors)[:: len(tensors) // 5]:
        shape = tensors[victim].shape
        changed = dataclasses.replace(tensors[victim], shape=(*shape[:-1], shape[-1] + 1))
        (fault,) = faults_of(name, tensors | {victim: changed})
        assert fault == f"shape: {victim} is {pieces.shown(changed.shape)}, expected {pieces.shown(shape)}"


def test_a_tensor_in_two_spellings_is_reported():
    tensors = listing("stt-1b-en_fr")
    name = "transformer.layers.3.self_attn.in_proj_weight"
    other = "transformer.layers.3.self_attn.in_projs.0.weight"
    faults = faults_of("stt-1b-en_fr", tensors | {other: tensors[name]})
    assert f"twice: {name} and {other} are spellings of one tensor" in faults


def test_all_faults_are_reported_at_once():
    tensors = listing("stt-1b-en_fr")
    victim = dataclasses.replace(tensors["out_norm.alpha"], shape=(1, 1, 7))
    faults = faults_of("stt-1b-en_fr", without_first(tensors, "emb.0.weight") | {"out_norm.alpha": victim, "x": victim})
    assert [fault.partition(":")[0] for fault in faults] == ["missing", "shape", "unknown"]
    message = str(pieces.fit_error("somewhere", faults))
    assert all(fault in message for fault in faults)
    assert "Faults (3)" in message


def test_transformers_default_configs_are_read_and_name_the_published_shapes():
    values = json.loads((PUBLISHED / "stt-2.6b-en-trfs.defaults.config.json").read_text())
    # The class default of the rotary period is not the released model's.
    values["rope_parameters"]["rope_theta"] = 100_000.0
    extractor = {"audio_delay_seconds": 2.5, "audio_silence_prefix_seconds": 1.0}
    config, lm = transformers_stt.read_config(values, extractor, "trfs")
    published = published_config("stt-2.6b-en")
    assert (lm, config.mimi, config.stt) == (published.lm, published.mimi, published.stt)
    mimi = json.loads((PUBLISHED / "mimi-trfs.defaults.config.json").read_text())
    assert transformers_mimi.read_config(mimi, "mimi") == published.mimi


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_is_written_for_transformers_has_the_published_sizes(name):
    config = published_config(name)
    shapes = parameters(config, "lm")
    written = {o.name: o.shape for o in pieces.save(transformers_stt.table(config.lm), shapes, shapes.get)}
    assert written["model.embed_tokens.embed_tokens.weight"] == (config.lm.text_card + 1 + 32 * 2049 + 1, 2048)
    assert written["lm_head.weight"] == (config.lm.text_card + 1, 2048)
    assert written["model.layers.0.mlp.fc1.weight"] == (11264, 2048)
