"""Conversion between layouts: exact both ways, every tensor accounted for, nothing half written."""

import dataclasses
import errno
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dsm_jax import checkpoints
from dsm_jax.configs import MimiConfig
from dsm_jax.convert import files, kyutai, native, pieces, transforms
from dsm_jax.convert import transformers_mimi as mimi_layout
from dsm_jax.convert import transformers_stt as stt_layout
from dsm_jax.convert.command import convert
from dsm_jax.errors import CheckpointError, ConfigError
from tests import small
from tests.checkpoint_maker import PLAIN_STT, arrays_of, assert_same_weights, make_checkpoint, model_config

WITH_HEADS = dataclasses.replace(PLAIN_STT, extra_heads_num_heads=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same random model in every layout, and a codec alone."""
    made = {to: make_checkpoint(tmp_path_factory.mktemp(to), to) for to in ("orbax", "kyutai", "transformers")}
    made["heads"] = make_checkpoint(tmp_path_factory.mktemp("heads"), "kyutai", lm=WITH_HEADS)
    made["codec"] = make_checkpoint(tmp_path_factory.mktemp("codec"), "transformers", lm=None)
    return made


# --- Blocks ---


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["conv", "transpose", "depthwise", "halves", "linear", "pointwise"]), st.data())
def test_every_transform_is_undone_exactly(kind, data):
    n = st.integers(1, 4)
    a, b, stride = data.draw(n), data.draw(n), data.draw(n)
    how, shape = {
        "conv": (transforms.CONV, (a, b, stride)),
        "transpose": (transforms.conv_transpose(stride), (a, b, 2 * stride)),
        "depthwise": (transforms.depthwise(stride), (a, 1, 2 * stride)),
        "halves": (transforms.half_split(a), (a * 2 * stride, b)),
        "linear": (transforms.LINEAR, (a, b)),
        "pointwise": (transforms.POINTWISE, (a, b, 1)),
    }[kind]
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (back,) = how.save(how.load(tensor))
    np.testing.assert_array_equal(back, tensor)


def test_a_transposed_convolution_has_the_tap_of_the_older_step_first():
    w_CDM = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    w_MCE = transforms.conv_transpose(2).load(w_CDM)
    for c in range(2):
        for s in range(2):
            np.testing.assert_array_equal(w_MCE[0, c, s * 3 : s * 3 + 3], w_CDM[c, :, 2 + s])
            np.testing.assert_array_equal(w_MCE[1, c, s * 3 : s * 3 + 3], w_CDM[c, :, s])


def test_halves_become_neighbours():
    w_D1 = np.arange(8.0)[:, None]  # two heads, [0, 1 | 2, 3] and [4, 5 | 6, 7]
    assert transforms.half_split(2).load(w_D1)[0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_codebook_is_sums_over_counts_and_an_unused_entry_is_not_divided_by_zero():
    sums = np.array([[2.0, 4.0], [3.0, 3.0]], np.float32)
    loaded = transforms.CODEBOOK.load(sums, np.array([2.0, 0.0], np.float32))
    np.testing.assert_array_equal(loaded, np.array([[1.0, 2.0], sums[1] / np.float32(1e-5)], np.float32))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_copy_in_strips_changes_nothing(rows, columns):
    matrix = np.arange(rows * columns).reshape(rows, columns).T
    copy = transforms.contiguous(matrix)
    np.testing.assert_array_equal(copy, matrix)
    assert copy.flags.c_contiguous


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ([pieces.piece("a", "w", at=(slice(0, 1),))], "unfilled: the table fills 3 of the 6 values of w"),
        ([pieces.piece("a", "w"), pieces.piece("b", "w")], "unfilled: the table fills 12 of the 6 values of w"),
        (
            [pieces.piece("a", "w", at=(slice(0, 1),)), pieces.piece("b", "w", at=(slice(0, 1),))],
            "unfilled: the table fills 6 of the 6 values of w",
        ),
        ([pieces.piece("a", "w"), pieces.piece("b", "gone")], "the table fills gone, which the model does not have"),
        (
            [pieces.piece("a", "w", at=(0,), rows=(0, 3)), pieces.piece("a", "w", at=(1,), rows=(4, 7))],
            "twice: the rows of a that the table claims overlap, or leave a gap: [(0, 3), (4, 7)]",
        ),
        ([pieces.piece("a", "w"), pieces.piece("a", "v")], "twice: a is claimed by 2 pieces of the table"),
    ],
)
def test_a_fault_in_a_table_is_caught(table, fault):
    tensors = {name: pieces.Tensor((2, 3), "F32", lambda rows: np.zeros((2, 3))) for name in "ab"}
    parameters = {name: jax.ShapeDtypeStruct((2, 3), np.float32) for name in "wv"}
    assert fault in pieces.plan(table, tensors, parameters)[1]


def test_a_quantised_tensor_is_refused():
    tensors = {"a": pieces.Tensor((2, 3), "I8", lambda rows: np.zeros((2, 3)))}
    _, faults = pieces.plan([pieces.piece("a", "w")], tensors, {"w": jax.ShapeDtypeStruct((2, 3), np.float32)})
    assert faults == ["dtype: a is I8, expected one of BF16, F16, F32, F64"]


# --- Whole checkpoints ---


@pytest.mark.parametrize("source", ["orbax", "kyutai", "transformers"])
@pytest.mark.parametrize("to", ["orbax", "kyutai", "transformers"])
def test_any_layout_becomes_any_other_bit_for_bit(folders, tmp_path, source, to):
    report = convert(folders[source], tmp_path / "out", to=to)
    before, after = checkpoints.load(folders[source]), checkpoints.load(tmp_path / "out")
    assert_same_weights(after, before)
    assert after.config == before.config
    assert after.tokenizer.size == 64
    assert {m.parameter for m in report.moved} == {n.partition(".")[2] for n in arrays_of(before)}
    assert (report.source_layout, report.destination_layout, report.dropped, report.notes) == (source, to, (), ())


@pytest.mark.parametrize("to", ["orbax", "kyutai", "transformers"])
def test_a_codec_alone_becomes_any_layout(folders, tmp_path, to):
    convert(folders["codec"], tmp_path / "out", to=to)
    before, after = checkpoints.load(folders["codec"]), checkpoints.load(tmp_path / "out")
    assert_same_weights(after, before)
    assert (after.config, after.lm_params, after.tokenizer) == (before.config, None, None)


@pytest.mark.parametrize("lm", [small.STT, small.TTS], ids=["every stt setting", "tts"])
def test_every_feature_of_the_config_survives_kyutais_layout(tmp_path, lm):
    folder = make_checkpoint(tmp_path, "kyutai", lm=lm)
    before, after = checkpoints.load(tmp_path / "made"), checkpoints.load(folder)
    assert_same_weights(after, before)
    assert after.config == before.config


def test_a_depformer_in_todays_spelling_is_the_same_model(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", lm=small.TTS)
    path = folder / kyutai.LM_NAME
    tensors = {}
    for name, tensor in load_file(path).items():
        for packed, single in (("in_proj_weight", "in_projs"), ("out_proj.weight", "out_projs")):
            if name.endswith(f"self_attn.{packed}"):
                sets = 3 if name.startswith("depformer.") else 1
                stem = name.removesuffix(packed)
                tensors |= {f"{stem}{single}.{s}.weight": part for s, part in enumerate(np.split(tensor, sets))}
                break
        else:
            tensors[name] = tensor
    save_file(tensors, path)
    assert_same_weights(checkpoints.load(folder), checkpoints.load(tmp_path / "made"))


def test_pause_heads_are_dropped_for_transformers_and_the_report_says_so(folders, tmp_path):
    report = convert(folders["heads"], tmp_path / "out", to="transformers")
    (left,) = report.dropped
    assert (left.name, left.why) == ("extra_heads_PDO", "transformers' model has no pause heads")
    after = checkpoints.load(tmp_path / "out")
    assert_same_weights(after, checkpoints.load(folders["heads"]), without="lm.extra_heads_PDO")


def test_pause_heads_that_the_config_does_not_mention_are_found(folders, tmp_path):
    folder = _copy(folders["heads"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {k: v for k, v in values.items() if not k.startswith("extra_heads")})
    report = convert(folder, tmp_path / "out", to="kyutai")
    assert report.notes == ("config.json does not speak of the 4 pause heads in model.safetensors",)
    assert checkpoints.load(tmp_path / "out").config == checkpoints.load(folders["heads"]).config


def test_weight_norm_is_folded(folders, tmp_path):
    codec = checkpoints.load(folders["codec"])
    convert(folders["codec"], tmp_path / "plain", to="kyutai")
    folder = _copy(tmp_path / "plain", tmp_path / "in")
    path = folder / kyutai.MIMI_NAME
    tensors = {}
    for i, (name, tensor) in enumerate(load_file(path).items()):
        if name.startswith(("encoder.", "decoder.")) and name.endswith((".conv.weight", ".convtr.weight")):
            stem = name.removesuffix("weight")
            endings = ("weight_g", "weight_v") if i % 4 else _PARAMETRIZED
            norm = np.sqrt((tensor**2).sum((1, 2), keepdims=True))
            tensors |= {stem + endings[0]: norm, stem + endings[1]: 3.0 * tensor}
        else:
            tensors[name] = tensor
    save_file(tensors, path)
    found, wanted = arrays_of(checkpoints.load(path)), arrays_of(codec)
    assert sum(name.endswith(("_g", "original0")) for name in tensors) > 5
    for name, array in found.items():  # two roundings to float32: the norm here, the fold there
        np.testing.assert_allclose(array, wanted[name], rtol=1e-6)


_PARAMETRIZED = ("parametrizations.weight.original0", "parametrizations.weight.original1")


@pytest.mark.parametrize(("dtype", "stored"), [(None, "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_dtype_is_the_language_models_and_the_codec_stays_float32(folders, tmp_path, dtype, stored):
    convert(folders["kyutai"], tmp_path / "out", to="kyutai", dtype=dtype)
    for name, expected in ((kyutai.LM_NAME, stored), (kyutai.MIMI_NAME, "F32")):
        with safe_open(tmp_path / "out" / name, "np") as file:
            assert {file.get_slice(key).get_dtype() for key in list(file.keys())} == {expected}
    again = convert(tmp_path / "out", tmp_path / "kept", to="orbax")
    assert {m.dtype for m in again.moved if m.network == "lm"} == {stored}


def test_conditioning_stays_float32(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", lm=small.TTS, dtype="bfloat16")
    with safe_open(folder / kyutai.LM_NAME, "np") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in list(file.keys())}
    assert {d for name, d in dtypes.items() if name.startswith("condition_provider.")} == {"F32"}
    assert {d for name, d in dtypes.items() if not name.startswith("condition_provider.")} == {"BF16"}


def test_large_weights_are_written_in_several_files(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(files.write_sharded, "__defaults__", (10_000,))
    convert(folders["kyutai"], tmp_path / "out", to="transformers")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_same_weights(checkpoints.load(tmp_path / "out"), checkpoints.load(folders["kyutai"]))
    _move_a_tensor(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"twice: .* is in two files"):
        checkpoints.load(tmp_path / "out")


def _move_a_tensor(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    stolen = next(iter(load_file(second).items()))
    save_file(load_file(first) | dict([stolen]), first)


def test_many_groups_of_parameters_are_one_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "GROUP_BYTES", 20_000)
    convert(folders["kyutai"], tmp_path / "out")
    assert len(list((tmp_path / "out" / "params").iterdir())) > 2
    assert_same_weights(checkpoints.load(tmp_path / "out"), checkpoints.load(folders["kyutai"]))


def test_the_report_lists_every_tensor_and_what_was_left_out(folders, tmp_path):
    report = convert(folders["transformers"], tmp_path / "out", to="kyutai")
    text = report.text()
    in_file = set(load_file(folders["transformers"] / "model.safetensors"))
    assert {m.tensor for m in report.moved} | {u.name for u in report.unused if "[" not in u.name} == in_file
    assert all(name in text for name in in_file)
    assert "not used: lm_head.weight[64:65] (the initial token is never predicted)" in text
    assert json.loads(json.dumps(report.to_dict()))["source_layout"] == "transformers"


def test_a_row_that_should_be_zero_and_is_not_is_noted(folders, tmp_path):
    folder = _copy(folders["transformers"], tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][-1, 0] = 1.0
    save_file(tensors, folder / "model.safetensors")
    (note,) = convert(folder, tmp_path / "out").notes
    assert (
        note == "lm_head.weight rows (64, 65) is not 0.0 as expected, and is lost: the initial token is never predicted"
    )


# --- Configs ---


def test_a_codec_config_survives_transformers():
    for config in (MimiConfig(), small.MIMI):
        assert mimi_layout.read_config(mimi_layout.write_config(config), "x") == config


@pytest.mark.parametrize("key", ["delays", "text_card_out", "bias_proj"])
def test_what_transformers_cannot_express_is_refused(folders, tmp_path, key):
    lm = dataclasses.replace(PLAIN_STT, **{key: getattr(small.STT, key)})
    folder = make_checkpoint(tmp_path, "kyutai", lm=lm)
    with pytest.raises(ConfigError, match=rf"transformers' model has no setting for {key}"):
        convert(folder, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", [16, 24, 64, 2048])
@pytest.mark.parametrize("ffn_dim", [2, 10, 22, 128, 11264])
def test_any_inner_width_has_a_hidden_scale(width, ffn_dim):
    scale = stt_layout._hidden_scale(width, ffn_dim, "x")
    lm = dataclasses.replace(PLAIN_STT, dim=width, hidden_scale=scale)
    assert 2 * lm.transformer.gating_dim == ffn_dim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, r"attention_bias is True; the library computes with False only"),
        ({"quantum": 1}, r"unknown keys \['quantum'\]; remove them if"),
        ({"rms_norm_eps": 1e-3}, r"rms_norm_eps is 0.001; expected one of"),
        ({"head_dim": 5}, r"head_dim is 5; the library computes with 4 only"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is true"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, r"rope scaling is \{'rope_type': 'yarn'\}"),
        ({"rope_parameters": None}, r"rope_theta is None"),
        ({"ffn_dim": None}, r"the keys \['ffn_dim'\] are missing"),
        ({"codec_config": {"trim_right_ratio": 0.5}}, r"codec_config: trim_right_ratio is 0.5"),
        ({"codec_config": {"encoder_config": None}}, r"codec_config: unknown keys \['encoder_config'\]"),
    ],
)
def test_a_transformers_config_that_changes_the_model_is_refused(folders, tmp_path, change, message):
    folder = _copy(folders["transformers"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    change = {key: values[key] | value if key == "codec_config" else value for key, value in change.items()}
    values = {
        key: value for key, value in (values | change).items() if change.get(key, value) is not None or key != "ffn_dim"
    }
    files.write_json(folder / "config.json", values)
    with pytest.raises(ConfigError, match=message):
        checkpoints.load(folder)


def test_the_older_spellings_of_a_transformers_config_are_read(folders, tmp_path):
    folder = _copy(folders["transformers"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    theta = values.pop("rope_parameters")["rope_theta"]
    values |= {"rope_theta": theta, "torch_dtype": "float32", "rope_scaling": None}
    values["codec_config"] |= {"rope_theta": values["codec_config"].pop("rope_parameters")["rope_theta"]}
    files.write_json(folder / "config.json", values)
    (folder / "preprocessor_config.json").rename(folder / "old.json")
    extractor = {"feature_extractor": files.read_json(folder / "old.json")}
    files.write_json(folder / "processor_config.json", extractor)
    assert checkpoints.load(folder).config == checkpoints.load(folders["transformers"]).config


# --- Destinations ---


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


def test_too_little_room_is_noticed_before_anything_is_written(folders, tmp_path, monkeypatch):
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


def test_a_destination_that_exists_is_left_alone(folders, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out exists; remove it, or give another destination"):
        convert(folders["kyutai"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_layout_or_dtype_is_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"the layout 'gguf' is unknown; choose one of orbax, kyutai, transf"):
        convert(folders["kyutai"], tmp_path / "out", to="gguf")
    with pytest.raises(CheckpointError, match=r"dtype is 'int8'; choose one of bfloat16, float16, float32"):
        convert(folders["kyutai"], tmp_path / "out", dtype="int8")


def test_a_tokenizer_of_the_wrong_size_is_noticed(folders, tmp_path):
    folder = _copy(folders["kyutai"], tmp_path / "in")
    from tests.tokenizer_maker import make_tokenizer

    make_tokenizer(folder / "words.model", 50)
    with pytest.raises(CheckpointError, match=r"words.model has 50 pieces, the model's text_card is 64"):
        convert(folder, tmp_path / "out")


def test_the_config_of_a_small_model_is_what_was_asked(folders):
    assert checkpoints.load(folders["kyutai"]).config == model_config(PLAIN_STT)


def _copy(source: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, target))
