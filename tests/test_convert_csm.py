"""CSM's two published layouts: exact in every direction, strict, and read as they are published."""

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from dsm_jax import checkpoints
from dsm_jax.configs import MimiConfig, ModelConfig
from dsm_jax.convert import convert, csm_files, files, kyutai_config, sesame, transformers_csm
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.tokenizers import load_tokenizer
from tests.helpers import csm_model
from tests.helpers.checkpoint_maker import arrays_of, assert_same_weights, copy_of, drawn_model
from tests.helpers.tokenizer_maker import make_byte_tokenizer

pytestmark = pytest.mark.slow  # the models compile for seconds

PUBLISHED = Path(__file__).with_name("published")
LAYOUTS = ("orbax", "transformers", "sesame")
DEPTH_TABLE = "depth_decoder.model.embed_tokens.weight"
BACKBONE_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
CONFIG = ModelConfig(model_type="csm", csm=csm_model.CSM, mimi=csm_model.MIMI)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write the same random model in every layout."""
    made = tmp_path_factory.mktemp("csm")
    tokenizer = load_tokenizer(csm_model.make_tokenizer(made / "tokenizer.json"))
    checkpoints.save(drawn_model(CONFIG, tokenizer), made / "orbax")
    for to in LAYOUTS[1:]:
        convert(made / "orbax", made / to, to=to)
    return {to: made / to for to in LAYOUTS}


def changed(source: Path, target: Path, *, name: str = "config.json", **values) -> Path:
    """Copy a folder and change keys of a JSON file; a value of ... removes the key."""
    folder = copy_of(source, target)
    content = files.read_json(folder / name) | values
    files.write_json(folder / name, {key: value for key, value in content.items() if value is not ...})
    return folder


def with_tensors(source: Path, target: Path, change, name: str = "model.safetensors") -> Path:
    """Copy a folder and change the tensors of one of its files."""
    folder = copy_of(source, target)
    save_file(change(load_file(folder / name)), folder / name)
    return folder


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("to", LAYOUTS)
def test_every_layout_converts_to_every_other_bit_for_bit(folders, tmp_path, source, to):
    report = convert(folders[source], tmp_path / "out", to=to)
    before, after = checkpoints.load(folders[source]), checkpoints.load(tmp_path / "out")
    assert_same_weights(after, before)
    assert after.config == before.config == CONFIG
    assert after.tokenizer.encode("[1]well, hello.") == before.tokenizer.encode("[1]well, hello.")
    assert {m.parameter for m in report.moved} == {n.partition(".")[2] for n in arrays_of(before)}
    assert (report.source_layout, report.destination_layout, report.dropped, report.notes) == (source, to, (), ())


def test_the_written_files_hold_what_each_layout_has(folders):
    names = {to: load_file(folders[to] / "model.safetensors").keys() for to in LAYOUTS[1:]}
    assert DEPTH_TABLE in names["transformers"]
    assert BACKBONE_TABLE not in names["transformers"]
    assert not any("codec" in name for name in names["sesame"])
    assert {p.name for p in folders["sesame"].iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", sesame.MIMI_NAME, kyutai_config.MIMI_CONFIG_NAME)
    }


@pytest.mark.parametrize("held", [(BACKBONE_TABLE,), (DEPTH_TABLE, BACKBONE_TABLE)])
def test_the_shared_table_may_have_either_name_or_both(folders, tmp_path, held):
    def rename(tensors):
        table = tensors.pop(DEPTH_TABLE)
        return tensors | {name: table for name in held}

    folder = with_tensors(folders["transformers"], tmp_path / "in", rename)
    report = convert(folder, tmp_path / "out")
    assert_same_weights(checkpoints.load(tmp_path / "out"), checkpoints.load(folders["orbax"]))
    copies = [(left.name, left.why) for left in report.unused if "table" not in left.why and "flag" not in left.why]
    assert copies == [(BACKBONE_TABLE, f"a copy of {DEPTH_TABLE}")] * (len(held) - 1)
    in_file = set(load_file(folder / "model.safetensors"))
    assert {m.tensor for m in report.moved} | {u.name for u in report.unused} == in_file


def test_unequal_copies_of_the_shared_table_are_a_fault_among_the_others(folders, tmp_path):
    def damage(tensors):
        other = tensors[DEPTH_TABLE].copy()
        other[-1, -1] += 1
        return tensors | {BACKBONE_TABLE: other, "stowaway": other}

    folder = with_tensors(folders["transformers"], tmp_path / "in", damage)
    with pytest.raises(CheckpointError, match=r"Faults \(2\)") as raised:
        checkpoints.load(folder)
    assert "unknown: stowaway, 76x16; the model has no place for it" in str(raised.value)
    unequal = f"unequal: {BACKBONE_TABLE} and {DEPTH_TABLE} are one table of the model, but their values differ"
    assert unequal in str(raised.value)


def test_a_copy_of_another_shape_is_a_fault(folders, tmp_path):
    def cut(tensors):
        return tensors | {BACKBONE_TABLE: tensors[DEPTH_TABLE][:-1]}

    folder = with_tensors(folders["transformers"], tmp_path / "in", cut)
    match = rf"Faults \(1\):\n  shape: {re.escape(BACKBONE_TABLE)} is 75x16, expected 76x16$"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("layout", "file"),
    [("transformers", "model.safetensors"), ("sesame", "model.safetensors"), ("sesame", sesame.MIMI_NAME)],
)
def test_a_tensor_that_is_missing_superfluous_or_reshaped_is_reported(folders, tmp_path, layout, file):
    names = [name for name in load_file(folders[layout] / file) if "initialized" not in name]
    for i, victim in enumerate(names[:: len(names) // 6]):
        folder = with_tensors(
            folders[layout],
            tmp_path / str(i),
            lambda tensors, victim=victim: {n: t for n, t in tensors.items() if n != victim},
            file,
        )
        with pytest.raises(CheckpointError, match=rf"Faults \(1\):\n  missing: {re.escape(victim)}, expected"):
            checkpoints.load(folder)
        folder = with_tensors(
            folders[layout],
            tmp_path / f"{i}-shape",
            lambda tensors, victim=victim: tensors | {victim: np.concatenate([tensors[victim]] * 2)},
            file,
        )
        with pytest.raises(CheckpointError, match=rf"Faults \(1\):\n  shape: {re.escape(victim)} is"):
            checkpoints.load(folder)
    folder = with_tensors(folders[layout], tmp_path / "more", lambda tensors: tensors | {"x": np.zeros(3, "f4")}, file)
    with pytest.raises(CheckpointError, match=r"Faults \(1\):\n  unknown: x, 3; the model has no place for it"):
        checkpoints.load(folder)


def published_folder(folders: dict[str, Path], target: Path, monkeypatch) -> Path:
    """Write a folder as sesame/csm-1b is: transformers' layout in shards with an index of its own, and Sesame's."""
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)
    convert(folders["orbax"], target, to="transformers")
    index_name = "transformers.safetensors.index.json"
    index = files.read_json(target / files.INDEX_NAME)
    for shard in set(index["weight_map"].values()):
        (target / shard).rename(target / shard.replace("model", "transformers"))
    where = {name: shard.replace("model", "transformers") for name, shard in index["weight_map"].items()}
    files.write_json(target / index_name, index | {"weight_map": where})
    (target / files.INDEX_NAME).unlink()

    def other_weights(tensors):
        return {name: tensor + 1 for name, tensor in tensors.items()}

    save_file(other_weights(load_file(folders["sesame"] / "model.safetensors")), target / "model.safetensors")
    own = {key: v for key, v in files.read_json(folders["sesame"] / "config.json").items() if key != "csm_config"}
    config = files.read_json(target / "config.json") | own | {"transformers_weights": index_name}
    files.write_json(target / "config.json", config)
    return target


def test_of_a_folder_that_holds_both_layouts_transformers_is_read(folders, tmp_path, monkeypatch):
    folder = published_folder(folders, tmp_path / "in", monkeypatch)
    assert len(list(folder.glob("transformers-*.safetensors"))) > 3
    assert convert(folder, tmp_path / "out").source_layout == "transformers"
    assert_same_weights(checkpoints.load(folder), checkpoints.load(folders["orbax"]))


def test_a_missing_shard_is_named(folders, tmp_path, monkeypatch):
    folder = published_folder(folders, tmp_path / "in", monkeypatch)
    lost = sorted(folder.glob("transformers-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name} is missing; fetch the whole repository again$"):
        checkpoints.load(folder)


def test_without_its_index_transformers_weights_are_missing_unless_sesames_are_there(folders, tmp_path, monkeypatch):
    folder = published_folder(folders, tmp_path / "in", monkeypatch)
    (folder / "transformers.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"in has no {sesame.MIMI_NAME}, which this layout takes from elsewhere"):
        checkpoints.load(folder)
    (folder / "model.safetensors").unlink()
    match = r"transformers.safetensors.index.json is missing; fetch the whole repository again$"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(folder)


def test_a_folder_without_weights_says_which_file_is_missing(folders, tmp_path):
    for layout in ("transformers", "sesame"):
        folder = copy_of(folders[layout], tmp_path / layout)
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model.safetensors is missing; fetch the whole repository again$"):
            checkpoints.load(folder)


def test_settings_of_sampling_that_are_not_the_published_ones_are_named(folders, tmp_path, caplog):
    own = {"temperature": 0.7, "top_k": 20, "max_new_tokens": None}
    folder = changed(folders["transformers"], tmp_path / "in", name="generation_config.json", **own)
    note = "generation_config.json has temperature 0.7, top_k 20, not kept: give it as an option of speech"
    assert convert(folder, tmp_path / "out", to="transformers").notes == (note,)
    assert convert(folders["transformers"], tmp_path / "again").notes == ()
    with caplog.at_level("INFO", logger="dsm_jax"):
        checkpoints.load(folder)
    assert f"in: {note}" in caplog.messages


def test_the_older_spelling_of_transformers_config_is_read(folders, tmp_path):
    values = files.read_json(folders["transformers"] / "config.json")

    def older(part):
        rope = dict(part["rope_parameters"])
        theta = rope.pop("rope_theta")
        scaling = {} if rope == {"rope_type": "default"} else {"rope_scaling": rope}
        return {"rope_parameters": ..., "rope_theta": theta} | scaling

    def part(name):
        return {key: value for key, value in (values[name] | older(values[name])).items() if value is not ...}

    parts = {name: part(name) for name in ("depth_decoder_config", "codec_config")}
    folder = changed(
        folders["transformers"],
        tmp_path / "in",
        **older(values),
        **parts,
        tie_word_embeddings=False,
        torch_dtype="float32",
        dtype=...,
    )
    assert checkpoints.load(folder).config == CONFIG


DEPTH = "depth_decoder_config"
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantum": 1}, r"config.json: unknown keys \['quantum'\]; remove them if"),
        ({DEPTH: {"quantum": 1}}, r"depth_decoder_config: unknown keys \['quantum'\]"),
        ({"codec_config": {"quantum": 1}}, r"codec_config: unknown keys \['quantum'\]"),
        (
            {"tie_codebooks_embeddings": False},
            r"tie_codebooks_embeddings is False; the library computes with True only",
        ),
        ({DEPTH: {"tie_word_embeddings": True}}, r"tie_word_embeddings is True; the library computes with False only"),
        ({"rms_norm_eps": 1e-6}, r"rms_norm_eps is 1e-06; the library computes with 1e-05 only"),
        ({DEPTH: {"mlp_bias": True}}, r"depth_decoder_config: mlp_bias is True"),
        ({DEPTH: {"backbone_hidden_size": 8}}, r"backbone_hidden_size is 8; the library computes with 16 only"),
        ({DEPTH: {"num_codebooks": 5}}, r"num_codebooks is 5; the library computes with 4 only"),
        ({"head_dim": 5}, r"head_dim is 5; the library computes with 4 only"),
        ({"audio_vocab_size": 20}, r"audio_vocab_size is 20; the library computes with 19 only"),
        ({"codebook_eos_token_id": 1}, r"codebook_eos_token_id is 1; the library computes with 0 only"),
        ({"hidden_size": ...}, r"the keys \['hidden_size'\] are missing; fetch the published config.json again"),
        ({"audio_token_id": ...}, r"the keys \['audio_token_id'\] are missing"),
        ({DEPTH: {"hidden_size": ...}}, r"depth_decoder_config: the keys \['hidden_size'\] are missing"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            r"expected a theta, and rope_type 'default' or 'llama3' with factor",
        ),
        ({"rope_parameters": LLAMA3}, r"rope_parameters \{'rope_type': 'llama3', .* expected a theta, and rope_type"),
        ({"vocab_size": "19"}, r"config.json: vocab_size is '19'; expected a whole number from 1"),
        ({"bos_token_id": None}, r"bos_token_id is None; expected a whole number from 0"),
        ({"num_hidden_layers": []}, r"num_hidden_layers is \[\]; expected a whole number from 1"),
        ({DEPTH: {"num_attention_heads": 0}}, r"depth_decoder_config: num_attention_heads is 0; expected a whole"),
        ({"rope_parameters": {"rope_type": []}}, r"expected a theta, and rope_type"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta is \[1\]; expected a number above 0"),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": "32"}},
            r"rope_parameters: original_context is '32'; expected int",
        ),
        ({"rope_scaling": LLAMA3}, r"rope_scaling \{'rope_type': 'llama3'.* expected a theta"),
    ],
)
def test_a_transformers_config_that_changes_the_model_is_refused(folders, tmp_path, change, message):
    values = files.read_json(folders["transformers"] / "config.json")
    nested = {
        key: {k: v for k, v in (values[key] | value).items() if v is not ...}
        for key, value in change.items()
        if key in (DEPTH, "codec_config")
    }
    folder = changed(folders["transformers"], tmp_path / "in", **change | nested)
    with pytest.raises(ConfigError, match=message):
        checkpoints.load(folder)


def test_a_config_without_rope_has_no_scaling(folders, tmp_path):
    folder = changed(folders["transformers"], tmp_path / "in", rope_parameters=...)
    backbone = checkpoints.load(folder).config.csm.backbone
    assert (backbone.rope_scaling, backbone.max_period) == (None, 500_000.0)
    convert(folder, tmp_path / "out", to="transformers")
    assert checkpoints.load(tmp_path / "out").config.csm.backbone == backbone


def test_a_decoder_that_transformers_cannot_express_is_refused(tmp_path):
    csm = csm_model.CSM
    for change in ({"layer_scale": 0.1}, {"positional_embedding": "sin_rope"}, {"norm": "rms_norm_f32"}):
        other = dataclasses.replace(csm, depth=dataclasses.replace(csm.depth, **change))
        (key,) = change
        with pytest.raises(ConfigError, match=rf"transformers' model has no setting for depth\.{key} "):
            transformers_csm.write_config(dataclasses.replace(CONFIG, csm=other), other, "float32")


def test_an_inner_width_that_is_derived_is_written_as_it_is(tmp_path):
    csm = csm_model.CSM
    depth = dataclasses.replace(csm.depth, gated_width=None)
    other = dataclasses.replace(csm, depth=depth)
    written = transformers_csm.write_config(dataclasses.replace(CONFIG, csm=other), other, "float32")
    assert written[DEPTH]["intermediate_size"] == depth.inner_width == math.floor(2 * depth.dim_feedforward / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantum": 1}, r"unknown keys \['quantum'\]; remove them, or use one of \['audio_num_codebooks', 'audio_"),
        (
            {"audio_vocab_size": ...},
            r"the keys \['audio_vocab_size'\] are missing; fetch the published config.json again",
        ),
        ({"audio_num_codebooks": "4"}, r"audio_num_codebooks is '4'; expected a whole number from 1"),
        ({"csm_config": ..., "backbone_flavor": []}, r"the flavor is \[\]; choose one of"),
        ({"csm_config": ...}, r"the flavor is 'other'; choose one of \['llama-100M', 'llama-1B'\]$"),
        ({"audio_vocab_size": 20}, r"'audio_vocab_size': 20.*, but csm_config has .*'audio_vocab_size': 19"),
        ({"csm_config": {"n_q": 4}}, r"csm_config: the keys \['backbone', 'card', 'depth', 'text_card'\] are missing"),
    ],
)
def test_a_config_of_sesames_that_is_not_understood_is_refused(folders, tmp_path, change, message):
    folder = changed(folders["sesame"], tmp_path / "in", **change)
    with pytest.raises(ConfigError, match=message):
        checkpoints.load(folder)


def test_sesames_layout_says_where_the_codec_and_the_tokenizer_come_from(folders, tmp_path):
    for i, (name, message) in enumerate(
        (
            (sesame.MIMI_NAME, r"; add it: the codec, from kyutai/moshiko-pytorch-bf16$"),
            ("tokenizer.json", r"; add it: of meta-llama/Llama-3.2-1B or sesame/csm-1b$"),
        )
    ):
        folder = copy_of(folders["sesame"], tmp_path / str(i))
        (folder / name).unlink()
        with pytest.raises(
            CheckpointError, match=rf"{i} has no {name}, which this layout takes from elsewhere{message}"
        ):
            checkpoints.load(folder)


def test_the_published_model_needs_sesames_five_keys_only():
    values = json.loads((PUBLISHED / "csm-1b.config.json").read_text())
    five = {
        "audio_num_codebooks": 32,
        "audio_vocab_size": 2051,
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": 128_256,
    }
    csm = sesame.read_config(five, "five")
    assert sesame.read_config(values, "both") == csm
    assert transformers_csm.read_config(values, 128_001, "trfs")[1] == csm
    assert sesame.write_config(csm) == five
    for field in ("begin_id", "audio_end_id"):
        other = dataclasses.replace(csm, **{field: 5})
        assert sesame.read_config(sesame.write_config(other), "six") == other
    with pytest.raises(ConfigError, match=r"both: \['backbone'\] of transformers' keys and of the flavors differ; use"):
        sesame.read_config(values | {"intermediate_size": 4096}, "both")


def test_the_processors_files_are_the_published_ones(tmp_path):
    csm, _ = published()
    marks = {128_000: "<|begin_of_text|>", 128_001: "<|end_of_text|>", 128_002: "<|AUDIO|>", 128_003: "<|audio_eos|>"}
    added = [{"id": i, "content": content, "special": True} for i, content in marks.items()]
    files.write_json(tmp_path / "in.json", {"added_tokens": added})
    (tmp_path / "out").mkdir()
    csm_files.write(tmp_path / "in.json", csm, MimiConfig(), tmp_path / "out", "published")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "in.json").read_bytes()
    for path in PUBLISHED.glob("csm-1b.*"):
        name = path.name.removeprefix("csm-1b.")
        if name == "config.json":
            continue
        if name.endswith(".jinja"):
            assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()
            continue
        expected = json.loads(path.read_text())
        expected.pop("transformers_version", None)
        assert files.read_json(tmp_path / "out" / name) == expected, name
    assert len(list(PUBLISHED.glob("csm-1b.*"))) == 5


def test_the_published_config_is_written_back_in_todays_spelling():
    csm, config = published()
    values = json.loads((PUBLISHED / "csm-1b.config.json").read_text())
    written = transformers_csm.write_config(config, csm, "float32")

    def same(old, new, gone):
        assert {key: new[key] for key in old.keys() & new.keys()} == {key: old[key] for key in old.keys() & new.keys()}
        rope = dict(new["rope_parameters"])
        assert rope.pop("rope_theta") == old["rope_theta"]
        assert rope == old.get("rope_scaling", {"rope_type": "default"})
        assert old.keys() - new.keys() - gone == {"rope_theta", "rope_scaling"} & old.keys()

    plain = {"attention_dropout", "initializer_range", "use_cache", "torch_dtype", "transformers_version"}
    own = {*transformers_csm.ORIGINAL_KEYS, transformers_csm.INDEX_KEY}
    old_codec, new_codec = values.pop("codec_config"), written.pop("codec_config")
    same(old_codec, new_codec, plain | {"_name_or_path", "max_position_embeddings", "normalize"})
    same(values.pop(DEPTH), written.pop(DEPTH), plain)
    assert (values.pop("tie_word_embeddings"), written.pop("tie_word_embeddings")) == (False, True)
    same(values, written, plain | own)


@functools.cache
def published():
    """Return the published config of the language model, and of the whole."""
    values = json.loads((PUBLISHED / "csm-1b.config.json").read_text())
    config, csm = transformers_csm.read_config(values, 128_001, "published")
    return csm, config


def test_llamas_own_tokenizer_gets_the_names_that_transformers_looks_for(folders, tmp_path):
    folder = copy_of(folders["sesame"], tmp_path / "in")
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
    csm = dataclasses.replace(csm_model.CSM, text_card=280, begin_id=276, end_id=277, audio_id=278, audio_end_id=279)
    make_byte_tokenizer(folder / "tokenizer.json", 280, names)
    files.write_json(folder / "config.json", sesame.write_config(csm))
    table = "text_embeddings.weight"
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {table: np.resize(tensors[table], (280, 16))}, path)
    convert(folder, tmp_path / "out", to="transformers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(276, 280)] == [*names[:2], "<|AUDIO|>", "<|audio_eos|>"]
    ids = (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("[0]Hello", add_special_tokens=False).ids
    )
    assert tokenizer.encode("[0]Hello").ids == [276, *ids, 277]
    assert checkpoints.load(tmp_path / "out").config.csm == csm


def test_a_tokenizer_of_another_kind_is_refused(folders, tmp_path):
    for to in ("transformers", "sesame"):
        folder = copy_of(folders["orbax"], tmp_path / to)
        values = files.read_json(folder / "dsm_jax.json")
        files.write_json(folder / "dsm_jax.json", values | {"tokenizer": None})
        match = rf"the tokenizer of {to} is missing; expected tokenizer.json, as published with the weights$"
        with pytest.raises(CheckpointError, match=match):
            convert(folder, tmp_path / "out", to=to)
    folder = copy_of(folders["orbax"], tmp_path / "unmarked")
    content = files.read_json(folder / "tokenizer.json")
    for token in content["added_tokens"][2:]:
        token["special"] = False
    files.write_json(folder / "tokenizer.json", content)
    match = r"the tokenizer of unmarked has no control tokens with the ids \[38, 39\]; use the one that was published"
    with pytest.raises(CheckpointError, match=match):
        convert(folder, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


def test_transformers_layout_needs_the_token_that_ends_a_text(folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = copy_of(folders["transformers"], tmp_path / f"no-{name}")
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name} is missing; fetch the whole repository again$"):
            checkpoints.load(folder)
    name = "tokenizer_config.json"
    folder = changed(folders["transformers"], tmp_path / "a", name=name, eos_token={"content": "<|end_of_text|>"})
    assert checkpoints.load(folder).config == CONFIG
    folder = changed(folders["transformers"], tmp_path / "b", name=name, eos_token="</s>")
    with pytest.raises(CheckpointError, match=r"has the eos_token '</s>', which is no control token of tokenizer.json"):
        checkpoints.load(folder)


@pytest.mark.parametrize("added", [None, 3, ["<|end_of_text|>"], [{"id": 1, "content": "a"}], [{"special": True}]])
def test_a_tokenizer_whose_control_tokens_are_damaged_is_refused(tmp_path, added):
    files.write_json(tmp_path / "tokenizer.json", {"added_tokens": added})
    files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|end_of_text|>"})
    message = (
        r"tokenizer\.json has added_tokens that are no list of objects with id, content and special; fetch it again$"
    )
    with pytest.raises(CheckpointError, match=message):
        csm_files.end_id(tmp_path)


def test_weights_alone_are_refused_with_a_sentence(folders, tmp_path):
    for layout in ("transformers", "sesame"):
        path = Path(shutil.copyfile(folders[layout] / "model.safetensors", tmp_path / f"{layout}.safetensors"))
        with pytest.raises(
            CheckpointError, match=r"is a language model; give its folder, which also holds config.json"
        ):
            checkpoints.load(path)
