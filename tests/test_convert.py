"""Conversion between layouts: exact in both directions, with every tensor accounted for."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import dsm_jax
from dsm_jax import checkpoints
from dsm_jax.convert import convert, files, kyutai, native
from dsm_jax.errors import CheckpointError
from dsm_jax.tts import read_voice, voices_of
from tests.helpers import small
from tests.helpers.checkpoint_maker import PLAIN_STT, arrays_of, assert_same_weights, copy_of, make_checkpoint

pytestmark = pytest.mark.slow

WITH_HEADS = dataclasses.replace(PLAIN_STT, extra_heads_num_heads=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write the same random model in every layout, and a codec alone."""
    made = {to: make_checkpoint(tmp_path_factory.mktemp(to), to) for to in ("orbax", "kyutai", "transformers")}
    made["heads"] = make_checkpoint(tmp_path_factory.mktemp("heads"), "kyutai", lm=WITH_HEADS)
    made["codec"] = make_checkpoint(tmp_path_factory.mktemp("codec"), "transformers", lm=None)
    return made


@pytest.mark.parametrize("source", ["orbax", "kyutai", "transformers"])
@pytest.mark.parametrize("to", ["orbax", "kyutai", "transformers"])
def test_every_layout_converts_to_every_other_bit_for_bit(folders, tmp_path, source, to):
    report = convert(folders[source], tmp_path / "out", to=to)
    before, after = checkpoints.load(folders[source]), checkpoints.load(tmp_path / "out")
    assert_same_weights(after, before)
    assert after.config == before.config
    assert after.tokenizer.size == 64
    assert {m.parameter for m in report.moved} == {n.partition(".")[2] for n in arrays_of(before)}
    assert (report.source_layout, report.destination_layout, report.dropped, report.notes) == (source, to, (), ())


def test_the_public_name_is_the_function_once_the_package_is_imported(folders, tmp_path):
    assert dsm_jax.convert.files is files  # the package, which has taken the name
    report = dsm_jax.convert(folders["orbax"], tmp_path / "out", to="kyutai")
    assert report.destination_layout == "kyutai"
    assert (tmp_path / "out/config.json").is_file()


def test_a_model_keeps_its_own_voices(tmp_path):
    convert("digits-tts", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "kyutai", to="kyutai")
    checkpoints.save(checkpoints.load(tmp_path / "kyutai"), tmp_path / "saved")
    before, after = checkpoints.load("digits-tts"), checkpoints.load(tmp_path / "saved")
    assert list(voices_of(after)) == list(voices_of(before)) != []
    np.testing.assert_array_equal(read_voice("theo", after), read_voice("theo", before))


@pytest.mark.parametrize("to", ["orbax", "kyutai", "transformers"])
def test_a_codec_alone_converts_to_every_layout(folders, tmp_path, to):
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


def test_a_depformer_in_the_current_spelling_is_the_same_model(tmp_path):
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


def test_a_model_that_hears_under_the_names_of_mlx_is_the_same(folders, tmp_path):
    folder = copy_of(folders["heads"], tmp_path / "in")
    tensors = {}
    for name, tensor in load_file(folder / kyutai.LM_NAME).items():
        stem, _, ending = name.rpartition(".")
        new = {"alpha": f"{stem}.weight", "in_proj_weight": f"{stem}.in_proj.weight"}.get(ending, name)
        new = f"audio_embs{new.removeprefix('emb')}" if new.startswith("emb.") else new
        tensors[new] = tensor.reshape(-1) if ending == "alpha" else tensor
    assert tensors.keys() > {"out_norm.weight", "audio_embs.2.weight", "transformer.layers.1.norm2.weight"}
    save_file(tensors, folder / kyutai.LM_NAME)
    assert_same_weights(checkpoints.load(folder), checkpoints.load(folders["heads"]))


def test_tokens_that_were_added_to_a_vocabulary_are_written(tmp_path):
    folder = make_checkpoint(tmp_path, "transformers", lm=dataclasses.replace(PLAIN_STT, text_card=66))
    values = files.read_json(folder / "tokenizer.json")
    added = [values["model"]["vocab"].pop()[0] for _ in range(2)][::-1]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i, special in ((64, True), (65, False)):
        values["added_tokens"].append({"id": i, "content": added[i - 64], "special": special} | plain)
    files.write_json(folder / "tokenizer.json", values)
    convert(folder, tmp_path / "out", to="kyutai")
    before, after = (checkpoints.load(path).tokenizer for path in (folder, tmp_path / "out"))
    assert [after.piece(i) for i in range(after.size)] == [before.piece(i) for i in range(66)]
    assert [after.has_text(i) for i in range(60, 66)] == [before.has_text(i) for i in range(60, 66)]
    assert (after.has_text(64), after.has_text(65)) == (False, True)


def test_pause_heads_are_dropped_for_transformers_and_the_report_names_them(folders, tmp_path):
    report = convert(folders["heads"], tmp_path / "out", to="transformers")
    (left,) = report.dropped
    assert (left.name, left.why) == ("extra_heads.weight_AOD", "transformers' model has no pause heads")
    after = checkpoints.load(tmp_path / "out")
    assert_same_weights(after, checkpoints.load(folders["heads"]), without="lm.extra_heads.weight_AOD")


def test_pause_heads_that_the_config_does_not_mention_are_found(folders, tmp_path):
    folder = copy_of(folders["heads"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {k: v for k, v in values.items() if not k.startswith("extra_heads")})
    report = convert(folder, tmp_path / "out", to="kyutai")
    assert report.notes == ("config.json does not mention the 4 pause heads in model.safetensors",)
    assert checkpoints.load(tmp_path / "out").config == checkpoints.load(folders["heads"]).config


def test_weight_norm_is_folded(folders, tmp_path):
    codec = checkpoints.load(folders["codec"])
    convert(folders["codec"], tmp_path / "plain", to="kyutai")
    folder = copy_of(tmp_path / "plain", tmp_path / "in")
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
    for name, array in found.items():  # float32 rounds twice: in this norm, and in the fold
        np.testing.assert_allclose(array, wanted[name], rtol=1e-6)


_PARAMETRIZED = ("parametrizations.weight.original0", "parametrizations.weight.original1")


def test_codebooks_in_the_spellings_of_older_files_are_the_same(folders, tmp_path):
    convert(folders["codec"], tmp_path / "plain", to="kyutai")
    path = copy_of(tmp_path / "plain", tmp_path / "in") / kyutai.MIMI_NAME
    older = {"embedding_sum": ("embed_sum", "embed_avg"), "cluster_usage": ("cluster_size",) * 2}
    tensors = {}
    for i, (name, tensor) in enumerate(load_file(path).items()):
        stem, _, ending = name.rpartition(".")
        if ending != "_initialized":  # a flag, which may be missing
            tensors[f"{stem}.{older[ending][i % 2]}" if ending in older else name] = tensor
    save_file(tensors, path)
    assert_same_weights(checkpoints.load(path), checkpoints.load(folders["codec"]))


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
    monkeypatch.setattr(files, "SHARD_BYTES", 10_000)
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


def test_a_constant_row_with_another_value_is_noted(folders, tmp_path):
    folder = copy_of(folders["transformers"], tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][-1, 0] = 1.0
    save_file(tensors, folder / "model.safetensors")
    (note,) = convert(folder, tmp_path / "out").notes
    assert (
        note == "lm_head.weight rows (64, 65) is not 0.0 as expected, and is lost: the initial token is never predicted"
    )


def test_a_models_own_voices_stay_with_it(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", lm=dataclasses.replace(small.TTS, text_card=64))
    spoken = np.ones((1, 10, 3), np.float32)
    (folder / "voices").mkdir()
    save_file({"speaker_wavs": spoken}, folder / "voices" / "ann.safetensors")
    (folder / "voices" / "notes.txt").write_text("not a voice")
    convert(folder, tmp_path / "native")
    checkpoints.save(checkpoints.load(tmp_path / "native"), tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "again", to="kyutai")
    for written in ("native", "saved", "again"):
        assert [path.name for path in (tmp_path / written / "voices").iterdir()] == ["ann.safetensors"]
        np.testing.assert_array_equal(load_file(tmp_path / written / "voices/ann.safetensors")["speaker_wavs"], spoken)


def test_a_temperature_that_transformers_layout_does_not_hold_is_named(folders, tmp_path):
    folder = copy_of(folders["kyutai"], tmp_path / "in")
    values = files.read_json(folder / "config.json")
    for temperature, expected in ((0.0, []), (0.4, ["temp_text 0.4: a model in transformers' layout is greedy"])):
        files.write_json(folder / "config.json", values | {"lm_gen_config": {"temp_text": temperature}})
        report = convert(folder, tmp_path / str(temperature), to="transformers")
        assert [left.why.partition(" unless")[0] for left in report.dropped] == expected


@pytest.mark.parametrize("layout", ["kyutai", "orbax"])
def test_values_that_float16_cannot_hold_are_refused(folders, tmp_path, layout):
    folder = copy_of(folders["kyutai"], tmp_path / "in")
    tensors = load_file(folder / kyutai.LM_NAME)
    tensors["text_linear.weight"][0, 0] = 7e4
    save_file(tensors, folder / kyutai.LM_NAME)
    if layout == "orbax":
        convert(folder, tmp_path / "native")
        folder = tmp_path / "native"
    match = r"lm.text_linear.weight_VD has values that float16 cannot hold; choose bfloat16 or float32"
    with pytest.raises(CheckpointError, match=match):
        convert(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    if layout == "kyutai":
        with pytest.raises(CheckpointError, match=match):
            checkpoints.load(folder, dtype="float16")


@pytest.mark.parametrize("name", ["of [2026]", "{a} ü*?", "n" * 250])
def test_a_folder_may_have_any_name(folders, tmp_path, name):
    folder = copy_of(folders["orbax"], tmp_path / name / name)
    convert(folder, tmp_path / name / "out")
    convert(tmp_path / name / "out", tmp_path / f"{name[:-1]}-")
    assert_same_weights(checkpoints.load(tmp_path / f"{name[:-1]}-"), checkpoints.load(folders["orbax"]))


def test_a_source_with_a_name_in_another_encoding_is_converted(folders, tmp_path):
    folder = copy_of(folders["kyutai"], tmp_path / "caf\udce9")  # as Python reads bytes that are not UTF-8
    convert(folder, tmp_path / "out")
    assert files.read_json(tmp_path / "out" / native.CONFIG_NAME)["converted_from"] == "caf? (kyutai)"


def test_conversions_in_threads_do_not_wait_for_each_other(folders, tmp_path):
    def run(number: int) -> None:
        convert(folders["kyutai"], tmp_path / str(number))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, range(3), timeout=60))
    for number in range(3):
        assert_same_weights(checkpoints.load(tmp_path / str(number)), checkpoints.load(folders["kyutai"]))
