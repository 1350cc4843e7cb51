"""Errors of conversions: unsupported configs, bad destinations; an error leaves nothing behind."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from dsm_jax import checkpoints
from dsm_jax.configs import MimiConfig, gating_dim
from dsm_jax.convert import convert, files, native, tokenizer
from dsm_jax.convert import transformers_mimi as mimi_layout
from dsm_jax.convert import transformers_stt as stt_layout
from dsm_jax.errors import CheckpointError, ConfigError
from tests.helpers import small
from tests.helpers.checkpoint_maker import PLAIN_STT, assert_same_weights, copy_of, make_checkpoint, model_config
from tests.helpers.tokenizer_maker import make_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write the same random model in both published layouts."""
    made = {to: make_checkpoint(tmp_path_factory.mktemp(to), to) for to in ("kyutai", "transformers")}
    return made


def test_a_codec_config_survives_transformers():
    for config in (MimiConfig(), small.MIMI):
        assert mimi_layout.read_config(mimi_layout.write_config(config), "x") == config


@pytest.mark.slow
@pytest.mark.parametrize("key", ["delays", "text_card_out", "bias_proj"])
def test_settings_that_transformers_cannot_express_are_refused(folders, tmp_path, key):
    lm = dataclasses.replace(PLAIN_STT, **{key: getattr(small.STT, key)})
    folder = make_checkpoint(tmp_path, "kyutai", lm=lm)
    with pytest.raises(ConfigError, match=rf"transformers' model has no setting for {key}"):
        convert(folder, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5_000], ids=["cut", "deep", "long"])
def test_a_config_that_cannot_be_parsed_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read as JSON \(.*\); fetch it again$"):
        files.read_json(tmp_path / "config.json")


@pytest.mark.parametrize("width", [16, 24, 64, 2048])
@pytest.mark.parametrize("ffn_dim", [2, 10, 22, 128, 11264])
def test_any_inner_width_has_a_hidden_scale(width, ffn_dim):
    scale = stt_layout._hidden_scale(width, ffn_dim, "x")
    lm = dataclasses.replace(PLAIN_STT, dim=width, hidden_scale=scale)
    assert 2 * gating_dim(width, lm.transformer.dim_feedforward) == ffn_dim


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, r"attention_bias is True; the library computes with False only"),
        ({"quantum": 1}, r"unknown keys \['quantum'\]; remove them if"),
        ({"rms_norm_eps": 1e-3}, r"rms_norm_eps is 0.001; choose one of \[1e-08, 1e-05\]"),
        ({"head_dim": 5}, r"head_dim is 5; the library computes with 4 only"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is true"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, r"rope scaling is \{'rope_type': 'yarn'\}"),
        ({"rope_parameters": None}, r"rope_theta is None"),
        ({"ffn_dim": None}, r"the keys \['ffn_dim'\] are missing"),
        ({"hidden_size": "16"}, r"config.json: hidden_size is '16'; expected a whole number from 1"),
        ({"num_codebooks": 0}, r"num_codebooks is 0; expected a whole number from 1"),
        ({"pad_token_id": None}, r"pad_token_id is None; expected a whole number from 0"),
        ({"rms_norm_eps": []}, r"rms_norm_eps is \[\]; choose one of"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, r"rope_theta is 'x'; expected a number above 0"),
        ({"num_key_value_heads": "4"}, r"num_key_value_heads is '4'; expected a whole number from 1"),
        ({"codec_config": {"num_filters": 2.5}}, r"codec_config: num_filters is 2.5; expected a whole number from 1"),
        ({"codec_config": {"upsampling_ratios": 8}}, r"upsampling_ratios is 8; expected a list"),
        ({"codec_config": {"upsampling_ratios": [4, 0]}}, r"upsampling_ratios\[1\] is 0; expected a whole number"),
        ({"codec_config": {"frame_rate": "x"}}, r"frame_rate is 'x'; expected a number above 0"),
        ({"codec_config": {"trim_right_ratio": 0.5}}, r"codec_config: trim_right_ratio is 0.5"),
        ({"codec_config": {"encoder_config": None}}, r"codec_config: unknown keys \['encoder_config'\]"),
    ],
)
def test_a_transformers_config_that_changes_the_model_is_refused(folders, tmp_path, change, message):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    change = {key: values[key] | value if key == "codec_config" else value for key, value in change.items()}
    values = {
        key: value for key, value in (values | change).items() if change.get(key, value) is not None or key != "ffn_dim"
    }
    files.write_json(folder / "config.json", values)
    with pytest.raises(ConfigError, match=message):
        checkpoints.load(folder)


def test_the_older_spellings_of_a_transformers_config_are_read(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    theta = values.pop("rope_parameters")["rope_theta"]
    values |= {"rope_theta": theta, "torch_dtype": "float32", "rope_scaling": None}
    values["codec_config"] |= {"rope_theta": values["codec_config"].pop("rope_parameters")["rope_theta"]}
    files.write_json(folder / "config.json", values)
    (folder / "preprocessor_config.json").rename(folder / "old.json")
    extractor = {"feature_extractor": files.read_json(folder / "old.json")}
    files.write_json(folder / "processor_config.json", extractor)
    assert checkpoints.load(folder).config == checkpoints.load(folders["transformers"]).config


def test_the_keys_that_unsloth_adds_to_a_config_have_no_effect(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", values | {"unsloth_fixed": True, "unsloth_version": "2025.9.1"})
    assert checkpoints.load(folder).config == checkpoints.load(folders["transformers"]).config


@pytest.mark.parametrize("to", ["orbax", "kyutai", "transformers"])
def test_a_full_disk_leaves_nothing_behind(folders, tmp_path, monkeypatch, to):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(files, "write_safetensors", full)
    monkeypatch.setattr(native, "write_params", full)
    match = r"out could not be written \(No space left on device\); make room, or give another destination"
    with pytest.raises(CheckpointError, match=match):
        convert(folders["kyutai"], tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_an_error_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match=r"out needs 0.0 GB and the disk has 0.0 GB free; make room"):
        convert(folders["kyutai"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(native, "write_params", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folders["kyutai"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_exists_is_refused_and_unchanged(folders, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out exists; remove it, or give another destination"):
        convert(folders["kyutai"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_layout_or_dtype_is_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"the layout 'gguf' is unknown; choose one of orbax, kyutai, transf"):
        convert(folders["kyutai"], tmp_path / "out", to="gguf")
    with pytest.raises(ConfigError, match=r"^dtype is 'int8'; choose one of bfloat16, float16, float32"):
        convert(folders["kyutai"], tmp_path / "out", dtype="int8")


@pytest.mark.slow
def test_a_layout_that_does_not_support_the_family_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", lm=small.TTS)
    message = (
        rf"^{folder.name} is a text-to-speech model, which the layout 'transformers' does not support; choose one of "
        r"orbax, kyutai$"
    )
    with pytest.raises(ConfigError, match=message):
        convert(folder, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_the_wrong_size_is_refused(folders, tmp_path):
    folder = copy_of(folders["kyutai"], tmp_path / "in")
    make_tokenizer(folder / "words.model", 50)
    with pytest.raises(CheckpointError, match=r"words.model has 50 pieces, the model's text_card is 64"):
        convert(folder, tmp_path / "out")


def test_a_converted_model_has_the_config_of_its_source(folders):
    assert checkpoints.load(folders["kyutai"]).config == model_config(PLAIN_STT)


def test_a_codec_config_that_is_no_object_is_refused(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    files.write_json(folder / "config.json", files.read_json(folder / "config.json") | {"codec_config": None})
    with pytest.raises(ConfigError, match=r"config.json: codec_config is None; expected an object"):
        checkpoints.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"caf\xe9", "音声 [1]".encode()])
def test_the_native_layout_lies_in_a_folder_of_any_name(folders, tmp_path, name):
    made = tmp_path / os.fsdecode(name) / "made"
    convert(folders["kyutai"], made)
    assert_same_weights(checkpoints.load(made), checkpoints.load(folders["kyutai"]))
    convert(made, made.with_name("back"), to="kyutai")
    assert_same_weights(checkpoints.load(made.with_name("back")), checkpoints.load(folders["kyutai"]))


def test_a_destination_that_is_a_link_to_nothing_is_refused(folders, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"out exists; remove it, or give another destination"):
        convert(folders["kyutai"], tmp_path / "out")


def test_a_disk_that_fills_up_is_one_sentence(folders, tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error: No space left on device [os_error_code='28'] [spec='{\"a\":{}}']")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with pytest.raises(CheckpointError, match=r"out could not be written \(No space left on device\); make room"):
        convert(folders["kyutai"], tmp_path / "out")
    Path(tmp_path / "made").mkdir()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):  # and no Exception of the tokenizers library
        tokenizer.to_json(next(folders["kyutai"].glob("*.model")), tmp_path / "made")
