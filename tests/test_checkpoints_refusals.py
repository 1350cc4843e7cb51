"""Errors of checkpoints name every fault of the weights at once, and the remedy."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsm_jax import checkpoints
from dsm_jax.convert import files, kyutai, native
from dsm_jax.errors import CheckpointError, ConfigError
from tests.helpers import small
from tests.helpers.checkpoint_maker import assert_same_weights, copy_of, make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {to: make_checkpoint(tmp_path_factory.mktemp(to), to) for to in ("orbax", "kyutai", "transformers")}


@pytest.fixture
def spoilt(folders, tmp_path) -> Path:
    """Return a copy of the Kyutai folder, to be spoilt."""
    return copy_of(folders["kyutai"], tmp_path / "in")


@pytest.mark.slow
def test_a_language_models_file_alone_is_refused(folders):
    with pytest.raises(CheckpointError, match=r"model.safetensors is a language model; give its folder, which also"):
        checkpoints.load(folders["kyutai"] / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 5, 40, -100, -1])
def test_a_truncated_file_is_refused(spoilt, size):
    path = spoilt / kyutai.LM_NAME
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short or damaged: it has \d+ bytes, its head"):
        checkpoints.load(spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"PK\x03\x04 a zipped pickle" * 9, b"<!DOCTYPE html><html>" * 9])
def test_a_file_that_is_no_safetensors_is_refused(spoilt, content):
    (spoilt / kyutai.LM_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a safetensors file .*; give the .safetensors"):
        checkpoints.load(spoilt)


def test_a_foreign_safetensors_file_is_refused_with_every_fault(spoilt):
    save_file({"bert.embeddings.weight": np.zeros((3, 2), np.float32)}, spoilt / kyutai.LM_NAME)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(spoilt)
    message = str(caught.value)
    assert "the weights are not those of the model that the config describes; use the config.json" in message
    assert "unknown: bert.embeddings.weight, 3x2; the model has no place for it" in message
    assert message.count("\n  missing: ") == len(kyutai.lm_table(small.STT)) - 4 - 1  # no pause heads, no bias


def test_missing_extra_and_reshaped_tensors_of_both_files_are_one_error(spoilt):
    lm, mimi = (load_file(spoilt / name) for name in (kyutai.LM_NAME, kyutai.MIMI_NAME))
    del lm["emb.1.weight"]
    lm["stowaway"] = np.zeros(3, np.float32)
    lm["out_norm.alpha"] = np.zeros((1, 1, 5), np.float32)
    del mimi["downsample.conv.conv.conv.weight"]
    save_file(lm, spoilt / kyutai.LM_NAME)
    save_file(mimi, spoilt / kyutai.MIMI_NAME)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(spoilt)
    for fault in (
        "missing: emb.1.weight, expected 13x16",
        "unknown: stowaway, 3; the model has no place for it",
        "shape: out_norm.alpha is 1x1x5, expected 1x1x16",
        "missing: downsample.conv.conv.conv.weight, expected 16x16x4",
        "Faults (4)",
    ):
        assert fault in str(caught.value)


def test_an_alpha_without_axes_of_one_is_the_same(folders, spoilt):
    tensors = {n: t.reshape(-1) if n.endswith("alpha") else t for n, t in load_file(spoilt / kyutai.LM_NAME).items()}
    save_file(tensors, spoilt / kyutai.LM_NAME)
    assert_same_weights(checkpoints.load(spoilt), checkpoints.load(folders["kyutai"]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quantum": 1}, ConfigError, r"config.json: unknown keys \['quantum'\]"),
        ({"lora_name": "x"}, ConfigError, r"unknown keys \['lora_name'\]"),
        ({"context": "long"}, ConfigError, r"config.json: context is 'long'; expected int"),
        ({"stt_config": {"delay": 1}}, ConfigError, r"stt_config: unknown keys \['delay'\]"),
        ({"tokenizer_name": "gone.model"}, CheckpointError, r"the tokenizer .*gone.model is missing"),
        ({"mimi_name": "gone.safetensors"}, CheckpointError, r"gone.safetensors is missing; fetch the whole repos"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(spoilt, change, error, message):
    files.write_json(spoilt / "config.json", files.read_json(spoilt / "config.json") | change)
    with pytest.raises(error, match=message):
        checkpoints.load(spoilt)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model_type": "llama"}'])
def test_a_config_that_is_no_models_is_refused(spoilt, content):
    (spoilt / "config.json").write_text(content)
    match = r"cannot be read as JSON|holds list, expected an object|is of model_type 'llama'; expected Kyu.*'csm'"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(spoilt)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"has no config.json, no dsm_jax.json and 0 safetensors files; expected a"
    ):
        checkpoints.load(tmp_path)


def test_a_transformers_folder_without_its_delay_is_refused(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no audio_delay_seconds in preprocessor_config.json or processor_co"
    ):
        checkpoints.load(folder)
    with pytest.raises(CheckpointError, match=r"or, of a training, save the processor there too"):
        checkpoints.load(folder)


def test_an_index_that_does_not_fit_is_refused(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    files.write_json(folder / files.INDEX_NAME, {"weight_map": {"model.norm.weight": "gone.safetensors"}})
    with pytest.raises(CheckpointError, match=r"gone.safetensors is missing; fetch the whole repository again"):
        checkpoints.load(folder)
    with pytest.raises(
        CheckpointError, match=r"or if model.safetensors has all weights, remove model.safetensors.index"
    ):
        checkpoints.load(folder)
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    files.write_json(folder / files.INDEX_NAME, {"weight_map": names | {"lm_head.weight": "other"}})
    (folder / "other").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"index: lm_head.weight is in model.safetensors, where .* says other"):
        checkpoints.load(folder)
    files.write_json(folder / files.INDEX_NAME, {})
    with pytest.raises(CheckpointError, match=r"has no weight_map; fetch it again"):
        checkpoints.load(folder)


def test_a_delay_that_is_no_time_is_refused(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    name = "preprocessor_config.json"
    files.write_json(folder / name, files.read_json(folder / name) | {"audio_delay_seconds": "long"})
    with pytest.raises(ConfigError, match=r"the feature extractor: audio_delay_seconds is 'long'; expected float"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("format_", "remedy"),
    [(99, "upgrade dsm_jax"), (1, "convert the published model again, or with the version that wrote it")],
)
def test_a_native_folder_of_another_format_is_refused(folders, tmp_path, format_, remedy):
    folder = copy_of(folders["orbax"], tmp_path / "in")
    values = files.read_json(folder / native.CONFIG_NAME)
    files.write_json(folder / native.CONFIG_NAME, values | {"format": format_})
    with pytest.raises(CheckpointError, match=f"dsm_jax.json is of format {format_}; this version reads 3; {remedy}"):
        checkpoints.load(folder)


def test_a_native_folder_with_other_parameters_than_its_config_is_refused(folders, tmp_path):
    folder = copy_of(folders["orbax"], tmp_path / "in")
    values = files.read_json(folder / native.CONFIG_NAME)
    values["config"]["lm"] |= {"num_layers": 3, "num_heads": 4}
    files.write_json(folder / native.CONFIG_NAME, values)
    with pytest.raises(CheckpointError, match=r"missing: lm.transformer.layers.2.norm1.alpha_D, expected \[16\]"):
        checkpoints.load(folder)
    with pytest.raises(CheckpointError, match=r"that the config describes; fetch or convert the model again. Faults"):
        checkpoints.load(folder)
    values["config"]["lm"] |= {"num_layers": 1, "text_card": 63}
    files.write_json(folder / native.CONFIG_NAME, values)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder)
    assert "unknown: lm.transformer.layers.1.norm1.alpha_D, [16]; the model has no place for it" in str(caught.value)
    assert "shape: lm.text_emb.table_LW is [65, 16], expected [64, 16]" in str(caught.value)


def test_a_damaged_native_folder_is_refused(folders, tmp_path):
    folder = copy_of(folders["orbax"], tmp_path / "in")
    (folder / "params" / "0000" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"0000 cannot be read \(\w+\); convert the model again"):
        checkpoints.load(folder)


@pytest.mark.slow
def test_weights_that_git_did_not_fetch_are_named_as_such(spoilt):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    (spoilt / kyutai.LM_NAME).write_bytes(pointer)
    match = r"model.safetensors is a pointer of Git LFS in place of the weights; run `git lfs pull` in its repository$"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(spoilt)


@pytest.mark.parametrize("others", [["model.pt"], ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin"]])
def test_weights_in_another_format_are_named(folders, tmp_path, others):
    for layout in ("kyutai", "transformers"):
        folder = copy_of(folders[layout], tmp_path / layout)
        (folder / "model.safetensors").unlink()
        for name in others:
            (folder / name).write_bytes(b"PK")
        match = rf"model.safetensors is missing, and {', '.join(others)} beside it cannot be read; fetch the"
        with pytest.raises(CheckpointError, match=match):
            checkpoints.load(folder)


def test_a_file_of_another_model_is_refused_in_one_sentence(folders, tmp_path):
    adapter = tmp_path / "lora.safetensors"
    save_file({"transformer.layers.0.self_attn.in_proj.lora_A.weight": np.zeros((4, 16), np.float32)}, adapter)
    codec = {
        name: tensor
        for name, tensor in load_file(folders["transformers"] / "model.safetensors").items()
        if name.startswith("codec_model.")
    }
    save_file(codec, tmp_path / "shard.safetensors")
    for name, first in (("lora", "transformer.layers.0.self"), ("shard", "codec_model.decoder.")):
        match = rf"{name}.safetensors is no Mimi file of Kyutai's: its first tensor is {first}[^ \n]*; give the"
        with pytest.raises(CheckpointError, match=match):
            checkpoints.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moshi_name": 5}, r"config.json: moshi_name is 5; expected the name of a file"),
        ({"mimi_name": ["a"]}, r"mimi_name is \['a'\]; expected the name of a file"),
        ({"tokenizer_name": {}}, r"tokenizer_name is \{\}; expected the name of a file"),
        ({"conditioners": {"a": {"type": []}}}, r"conditioners: a: the type is \[\]; choose one of"),
        ({"lora": True, "lora_rank": 128}, r"unknown keys \['lora', 'lora_rank'\]; merge the adapters into"),
        ({"num_heads": 0}, r"num_heads is 0; expected a number above 0"),
        ({"hidden_scale": float("inf")}, r"hidden_scale is inf; expected a number above 0"),
        ({"n_q": ...}, r"the keys \['n_q'\] are missing"),
    ],
)
def test_a_value_that_no_config_has_is_named(spoilt, change, message):
    values = files.read_json(spoilt / "config.json") | change
    files.write_json(spoilt / "config.json", {key: value for key, value in values.items() if value is not ...})
    with pytest.raises(ConfigError, match=message):
        checkpoints.load(spoilt)


def test_a_codec_that_a_config_does_not_name_has_the_name_of_the_reference(spoilt):
    values = files.read_json(spoilt / "config.json")
    del values["mimi_name"]
    files.write_json(spoilt / "config.json", values)
    with pytest.raises(CheckpointError, match=r"tokenizer-e351c8d8-checkpoint125.safetensors is missing"):
        checkpoints.load(spoilt)


@pytest.mark.parametrize("weight_map", [["model.safetensors"], {"lm_head.weight": None}, {"lm_head.weight": []}])
def test_an_index_without_names_of_files_is_refused(folders, tmp_path, weight_map):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    files.write_json(folder / files.INDEX_NAME, {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=r"index.json has no weight_map; fetch it again"):
        checkpoints.load(folder)


def test_what_may_not_be_read_is_refused(folders, monkeypatch):
    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(files, "safe_open", locked)
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be opened; check its permissions$"):
            checkpoints.load(folders["kyutai"])
    monkeypatch.setattr(Path, "is_file", locked)
    with pytest.raises(CheckpointError, match=r"kyutai cannot be read \(Permission denied\); check its permissions"):
        checkpoints.load(folders["kyutai"])


@pytest.mark.parametrize("beside", ["scales", "weight_scb"])
def test_weights_that_another_package_has_quantised_are_named_as_such(spoilt, beside):
    tensors = load_file(spoilt / kyutai.LM_NAME)
    name = "transformer.layers.0.gating.linear_in"
    tensors |= {f"{name}.weight": np.zeros((44, 2), np.uint32), f"{name}.{beside}": np.zeros((44, 1), np.float32)}
    save_file(tensors, spoilt / kyutai.LM_NAME)
    match = rf"rounded to fewer bits \({name}.{beside}\), which are not read; take the model in bfloat16 or float32"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(spoilt)


def test_a_quantised_transformers_model_is_named_as_such(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    values = files.read_json(folder / "config.json") | {"quantization_config": {"load_in_4bit": True}}
    files.write_json(folder / "config.json", values)
    with pytest.raises(ConfigError, match=r"config.json: the weights are quantised, .* in bfloat16 or float32"):
        checkpoints.load(folder)


@pytest.mark.parametrize("name", ["depformer.slices.0.linear_in.weight", "depformer.0.linear_in.weight"])
def test_a_depformer_of_another_package_is_named_as_such(spoilt, name):
    tensors = load_file(spoilt / kyutai.LM_NAME) | {name: np.zeros((4, 16), np.float32)}
    save_file(tensors, spoilt / kyutai.LM_NAME)
    with pytest.raises(CheckpointError, match=r"as the packages for MLX and Rust have; use the repository for PyTorch"):
        checkpoints.load(spoilt)


def test_a_voice_and_a_folder_of_adapters_are_no_models(tmp_path):
    save_file({"speaker_wavs": np.zeros((1, 4, 2), np.float32)}, tmp_path / "ann.safetensors")
    with pytest.raises(CheckpointError, match=r"is speaker_wavs; give this file as the voice, and as the model one th"):
        checkpoints.load(tmp_path / "ann.safetensors")
    (tmp_path / "ann.safetensors").rename(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.backbone_model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((2, 4), np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"give the model that these adapters were trained for, after merging"):
        checkpoints.load(tmp_path)


def test_a_folder_above_a_model_names_the_model(folders, tmp_path):
    copy_of(folders["kyutai"], tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=rf"or one Mimi file: give {tmp_path}/run/model$"):
        checkpoints.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"or one Mimi file: give {tmp_path}/run/model$"):
        checkpoints.load(tmp_path)
    for step in (100, 200):
        copy_of(folders["kyutai"], tmp_path / "a" / "b" / "checkpoints" / f"checkpoint_000{step}" / "consolidated")
    with pytest.raises(CheckpointError, match=r"give .*/b/checkpoints/checkpoint_000200/consolidated$"):
        checkpoints.load(tmp_path / "a" / "b")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "settings.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a training writes its model at its end: continue it with --resume$"):
        checkpoints.load(tmp_path / "other")


def test_weights_of_another_name_are_named(spoilt):
    (spoilt / kyutai.LM_NAME).rename(spoilt / "consolidated.safetensors")
    match = r"has no model.safetensors, but consolidated.safetensors; name its weights in config.json: moshi_name$"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(spoilt)
    values = files.read_json(spoilt / "config.json") | {"moshi_name": "consolidated.safetensors"}
    files.write_json(spoilt / "config.json", values)
    assert checkpoints.load(spoilt).tokenizer is not None


@pytest.mark.parametrize("kept", [True, False])
def test_weights_in_a_format_that_config_json_names_are_refused(spoilt, kept):
    (spoilt / kyutai.LM_NAME).rename(spoilt / "model.q8.gguf")
    files.write_json(spoilt / "config.json", files.read_json(spoilt / "config.json") | {"moshi_name": "model.q8.gguf"})
    if not kept:  # as of a repository on the hub, of which such files are not fetched
        (spoilt / "model.q8.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"model.q8.gguf is in a format that is not read; take the model as safe"):
        checkpoints.load(spoilt)


def test_a_file_of_another_repository_is_refused(spoilt):
    values = files.read_json(spoilt / "config.json") | {"mimi_name": "hf://kyutai/stt-1b-en_fr/mimi.safetensors"}
    files.write_json(spoilt / "config.json", values)
    with pytest.raises(ConfigError, match=r"mimi_name is 'hf://.*'; expected the name of a file in the same folder"):
        checkpoints.load(spoilt)
