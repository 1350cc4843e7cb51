"""Loading: every layout is recognised and placed as asked, wherever it is."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import errors

import dsm_jax
from dsm_jax import checkpoints, codec, hub, process
from dsm_jax.configs import MimiConfig
from dsm_jax.convert import convert, kyutai
from dsm_jax.errors import CheckpointError, ConfigError, ForkError
from dsm_jax.models.parameters import flatten
from dsm_jax.nn.quant import PackedBfloat16
from dsm_jax.sharding import Sharding
from tests.helpers import small, stt_model
from tests.helpers.checkpoint_maker import arrays_of, assert_same_weights, copy_of, make_checkpoint, random_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {to: make_checkpoint(tmp_path_factory.mktemp(to), to) for to in ("orbax", "kyutai", "transformers")}


LAYOUTS = ["orbax", "kyutai", "transformers"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_model_is_named_after_its_folder(folders, layout):
    assert checkpoints.load(folders[layout]).name == layout


def test_a_model_runs_as_loaded(folders):
    model = checkpoints.load(folders["orbax"])

    @jax.jit
    def run(lm: nnx.State, mimi: nnx.State) -> jax.Array:
        codes_BQT = nnx.merge(model.mimi_def, mimi).encode(jnp.ones((1, 64, 1)))
        tokens_BKT = jnp.concatenate([jnp.zeros((1, 1, 4), jnp.int32), codes_BQT[:, :3] % 12], axis=1)
        return nnx.merge(model.lm_def, lm)(tokens_BKT).text_logits_BTV

    logits_BTV = run(model.lm_params, model.mimi_params)
    assert logits_BTV.shape == (1, 4, 64)
    assert jnp.isfinite(logits_BTV).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_language_model_has_the_dtype_asked_for_and_the_codec_float32(folders, layout):
    for asked in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")):
        model = checkpoints.load(folders[layout], dtype=asked)
        assert {a.dtype for a in jax.tree.leaves(model.lm_params)} == {jnp.dtype("bfloat16")}
        assert {a.dtype for a in jax.tree.leaves(model.mimi_params)} == {jnp.dtype("float32")}


def test_the_default_dtype_on_a_cpu_is_float32(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(checkpoints.load(folder).lm_params)} == {jnp.dtype("float32")}


def test_the_conditioning_stays_float32(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", lm=small.TTS)
    arrays = flatten(checkpoints.load(folder, dtype="bfloat16").lm_params)
    kept = {name for name, array in arrays.items() if array.dtype == jnp.float32}
    assert kept == {name for name in arrays if name.startswith("conditioning.")} != set()


def over(axis: str) -> Sharding:
    return Sharding(jax.make_mesh((2,), (axis,)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mesh_splits_projections_and_vocabularies_and_changes_no_value(folders, layout):
    model = checkpoints.load(folders[layout], sharding=over("model"))
    specs = {name: tuple(array.sharding.spec) for name, array in flatten(model.lm_params).items()}
    layer = "transformer.layers.0"
    assert specs[f"{layer}.self_attn.in_proj.weight_PKHD"] == (None, "model", None, None)
    assert specs[f"{layer}.self_attn.out_proj.weight_DKGH"] == (None, "model", None, None)
    assert specs[f"{layer}.feedforward.linear_in.weight_PFD"] == (None, "model", None)
    assert specs[f"{layer}.feedforward.linear_out.weight_DF"] == (None, "model")
    assert specs["text_linear.weight_VD"] == ("model", None)
    assert specs["text_emb.table_LW"] == (None, None)
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(model.mimi_params))
    assert len(flatten(model.lm_params)["text_linear.weight_VD"].sharding.device_set) == 2
    assert_same_weights(model, checkpoints.load(folders[layout]))


def test_an_axis_that_does_not_divide_stays_whole(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", lm=dataclasses.replace(small.STT, text_card=65, text_card_out=None))
    arrays = flatten(checkpoints.load(folder, sharding=over("model")).lm_params)
    assert arrays["text_linear.weight_VD"].sharding.is_fully_replicated


def test_a_mesh_without_the_axis_keeps_everything_whole_and_rules_choose_another(folders):
    whole = checkpoints.load(folders["kyutai"], sharding=over("data"))
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(whole.lm_params))
    rules = Sharding(over("data").mesh, (("L", "data"), ("H", "data")))
    arrays = flatten(checkpoints.load(folders["kyutai"], sharding=rules).lm_params)
    packed = arrays["transformer.layers.1.self_attn.in_proj.weight_PKHD"]
    assert tuple(packed.sharding.spec) == (None, None, "data", None)
    assert arrays["text_linear.weight_VD"].sharding.is_fully_replicated


def test_a_saved_model_is_the_same_when_loaded(tmp_path):
    model = random_model(tmp_path, small.STT)
    checkpoints.save(model, tmp_path / "saved")
    assert_same_weights(checkpoints.load(tmp_path / "saved"), model)
    with pytest.raises(CheckpointError, match=r"saved exists; remove it, or give another destination"):
        checkpoints.save(model, tmp_path / "saved")


def test_a_codecs_file_is_a_codec(folders):
    whole = checkpoints.load(folders["kyutai"])
    codec = checkpoints.load(folders["kyutai"] / kyutai.MIMI_NAME)
    assert (codec.config.lm, codec.lm_params, codec.lm_def, codec.tokenizer) == (None, None, None, None)
    wanted = {name: array for name, array in arrays_of(whole).items() if name.startswith("mimi.")}
    found = arrays_of(codec)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_codecs_file_alone_is_taken_for_the_published_codec(folders, tmp_path):
    shutil.copyfile(folders["kyutai"] / kyutai.MIMI_NAME, tmp_path / "mimi.safetensors")
    with pytest.raises(CheckpointError, match=r"shape: encoder.model.0.conv.conv.weight is 2x1x7, expected 64x1x7"):
        checkpoints.load(tmp_path / "mimi.safetensors")
    assert MimiConfig().seanet.n_filters == 64


@pytest.mark.parametrize("name", ["gone", "./gone", "gone/there/model", "/gone", "kyutai/mimi.safetensors"])
def test_what_is_neither_here_nor_a_hub_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    match = r"is no file or folder, and no name on the hub, which has one slash, as kyutai/stt-1b-en_fr has"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.load(name)


def _hub_that(monkeypatch, outcome):
    asked = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns, **options):
        asked.append((name, allow_patterns, ignore_patterns, options))
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_name_is_fetched_weights_configs_and_tokenizers_only(folders, monkeypatch):
    asked = _hub_that(monkeypatch, folders["kyutai"])
    model = checkpoints.load("kyutai/stt-1b-en_fr")
    (first, (name, patterns, left_out, _)) = asked
    assert first[:3] == ("kyutai/stt-1b-en_fr", ["config.json"], [])
    assert (name, model.name) == ("kyutai/stt-1b-en_fr", "kyutai/stt-1b-en_fr")
    assert set(patterns) == {"*.json", "*.safetensors", "*.model", "params/*"}
    assert left_out == []


# As published: in the repository of sesame/csm-1b the standard name is that of the other layout.
CSM_1B = (
    *("config.json", "model.safetensors", "transformers-00001-of-00002.safetensors", "ckpt.pt", "tokenizer.json"),
    *("transformers-00002-of-00002.safetensors", "transformers.safetensors.index.json", "chat_template.jinja"),
    *("generation_config.json", "preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("prompts/conversational_a.wav", "README.md"),
)


@pytest.mark.parametrize(
    ("config", "fetched"),
    [
        ({"transformers_weights": "transformers.safetensors.index.json"}, False),
        ({}, True),
        (["no object"], True),
        (None, True),
    ],
)
def test_of_a_repository_in_two_layouts_one_is_fetched(tmp_path, monkeypatch, config, fetched):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    asked = _hub_that(monkeypatch, tmp_path)
    hub.find("sesame/csm-1b")
    _, (_, patterns, left_out, _) = asked
    names = set(huggingface_hub.utils.filter_repo_objects(CSM_1B, allow_patterns=patterns, ignore_patterns=left_out))
    assert ("model.safetensors" in names) == fetched
    assert names - {"model.safetensors"} == {
        name for name in CSM_1B if name.endswith((".json", ".safetensors")) and name != "model.safetensors"
    }


def test_options_of_the_hub_are_passed_on(folders, monkeypatch):
    asked = _hub_that(monkeypatch, folders["kyutai"])
    checkpoints.load("kyutai/a", revision="v1", cache_dir="there", token="secret", local_files_only=True)
    assert (
        asked[0][3]
        == asked[1][3]
        == {"revision": "v1", "cache_dir": "there", "token": "secret", "local_files_only": True}
    )


def test_a_model_goes_to_the_device_that_is_asked_for(folders):
    second = jax.devices()[1]
    model = checkpoints.load(folders["kyutai"], device=second)
    assert model.devices == (second,)
    assert checkpoints.load(folders["kyutai"], device="cpu").devices == (jax.devices()[0],)
    assert str(second) in repr(model)
    with pytest.raises(ConfigError, match=r"there is no device 'abacus' here; expected one of cpu"):
        checkpoints.load(folders["kyutai"], device="abacus")
    with pytest.raises(ConfigError, match=r"device is 0; expected one of jax.devices\(\), or 'cpu', 'gpu' or 'tpu'"):
        checkpoints.load(folders["kyutai"], device=0)
    there = checkpoints.load(stt_model.CHECKPOINT, device=second)
    clip = stt_model.recording()[:30_000]
    assert dsm_jax.transcribe(there, clip).text == dsm_jax.transcribe(stt_model.model(), clip).text


def test_loading_reports_its_bytes_and_the_repr_describes_the_model(folders):
    seen = []
    model = checkpoints.load(folders["kyutai"], progress=seen.append)
    assert seen[-1].done == seen[-1].total == 4 * model.num_parameters
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert model.dtype == "float32"
    assert f"{model.num_parameters / 1e6:.1f} M parameters, float32, on " in repr(model)
    assert model.lm is model.lm
    assert model.codec.encoder is not None


def test_a_fingerprint_is_of_the_weights_alone(folders):
    model = checkpoints.load(folders["kyutai"])
    again = checkpoints.load(folders["kyutai"], device=jax.devices()[1])
    assert again.fingerprint == model.fingerprint
    path, weight = next(pair for pair in flatten(model.lm_params).items() if pair[1].ndim == 3)
    changed = jax.tree.map(lambda leaf: leaf + 1e-3 if leaf is weight else leaf, model.lm_params)
    assert flatten(changed)[path].shape == weight.shape
    assert dataclasses.replace(model, lm_params=changed, name="digits").fingerprint != model.fingerprint
    codecs = [dataclasses.replace(m, lm_def=None, lm_params=None) for m in (model, again)]
    assert codecs[0].fingerprint == codecs[1].fingerprint != model.fingerprint


def test_a_forked_process_is_refused_with_what_to_do(folders):
    checkpoints.load(folders["kyutai"])
    script = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
import dsm_jax
model = dsm_jax.load({str(folders["kyutai"])!r})
if os.fork() == 0:
    try:
        dsm_jax.transcribe(model, [])
    except dsm_jax.DsmError as error:
        print(error)
    try:
        dsm_jax.load({str(folders["kyutai"])!r})
    except dsm_jax.DsmError as error:
        print(error)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.count("was forked from one that had loaded a model") == 2
    assert 'get_context("spawn")' in done.stdout


def test_the_default_is_the_published_model(folders, monkeypatch):
    asked = _hub_that(monkeypatch, folders["kyutai"])
    checkpoints.load()
    assert asked[0][0] == checkpoints.DEFAULT == "kyutai/stt-1b-en_fr"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, r"no folder kyutai/gone here, and no repository of that name on the hub"),
        (errors.GatedRepoError, r"kyutai/gone is on the hub but gated; ask for access there"),
        (errors.RevisionNotFoundError, r"there is no revision v9 of kyutai/gone on the hub; check its branches, tags"),
        (
            errors.LocalEntryNotFoundError,
            r"^revision v9 of kyutai/gone is not in the local cache .*: there is no network, or HF_HUB_OFFLINE or "
            r"local_files_only is set; give a local folder, or",
        ),
        (
            OSError,
            r"kyutai/gone could not be fetched \(disk quota\); try again, or give a local folder, or use",
        ),
    ],
)
def test_an_error_of_the_hub_is_one_sentence(monkeypatch, error, message):
    raised = error.__new__(error)
    Exception.__init__(raised, "disk quota")
    _hub_that(monkeypatch, raised)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.load("kyutai/gone", revision="v9")
    assert "\n" not in str(caught.value)


def test_without_network_and_cache_the_error_names_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"there is no network, or HF_HUB_OFFLINE or local_files_only is set"):
        checkpoints.load("kyutai/stt-1b-en_fr")


def test_a_model_inside_the_package_is_found_by_name(folders, tmp_path, monkeypatch):
    copy_of(folders["kyutai"], tmp_path / "tiny")
    monkeypatch.setattr(hub, "_ASSETS", tmp_path)
    assert checkpoints.load("tiny").name == "tiny"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("digit", "digits"), ("digit-tts", "digits-tts"), ("stt-1b", "kyutai/stt-1b-en_fr"), ("csm", "sesame/csm-1b")],
)
def test_a_misspelt_name_is_told_with_the_one_that_may_be_meant(name, meant):
    with pytest.raises(CheckpointError, match=rf"{name} is no file .*; check the path; did you mean {meant}\?$"):
        hub.find(name)


def test_a_name_that_the_hub_does_not_have_is_told_with_the_one_that_may_be_meant(monkeypatch):
    _hub_that(monkeypatch, errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError))
    with pytest.raises(CheckpointError, match=r"check the spelling; did you mean kyutai/stt-1b-en_fr\?$"):
        hub.find("kyutai/stt-1b")
    with pytest.raises(CheckpointError, match=r"check the spelling$"):
        hub.find("kyutai/stt-1b-en_fr")
    with pytest.raises(CheckpointError, match=r"check the spelling$"):
        hub.find("openai/whisper-large-v3")


def test_the_names_that_are_proposed_are_those_of_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Models")[2].partition("\nWhat they need")[0]
    assert set(hub._PUBLISHED) == set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))


def test_a_revision_is_asked_of_the_hub_alone(folders):
    for source in ("digits", folders["kyutai"]):
        with pytest.raises(CheckpointError, match=r"is on this machine, where it has no revisions, and 'v1' was asked"):
            checkpoints.load(source, revision="v1")


def test_a_conversion_finds_hub_names_too(folders, tmp_path, monkeypatch):
    asked = _hub_that(monkeypatch, folders["kyutai"])
    convert("kyutai/stt-1b-en_fr", tmp_path / "out", revision="v1")
    assert [options["revision"] for *_, options in asked] == ["v1", "v1"]
    assert_same_weights(checkpoints.load(tmp_path / "out"), checkpoints.load(folders["kyutai"]))


def test_tables_stored_in_16_bits_stay_so_for_transcription_and_give_the_same_words(tmp_path):
    folder = make_checkpoint(tmp_path, "kyutai", dtype="bfloat16")
    whole, light = checkpoints.load(folder), checkpoints.load(folder, stt_only=True)
    tables = {name for name, leaf in flatten(light.lm_params).items() if isinstance(leaf, PackedBfloat16)}
    assert tables == {"audio_emb.table_QLW", "text_emb.table_LW"}
    for name in tables:
        widened = np.asarray(flatten(light.lm_params)[name].bits).view(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(widened, flatten(whole.lm_params)[name])
    tokens_BKT = jnp.array(np.random.default_rng(0).integers(-1, 12, (2, 4, 6)), jnp.int32)
    logits = [model.lm(tokens_BKT).text_logits_BTV for model in (whole, light)]
    np.testing.assert_array_equal(*logits)
    in_16_bits = checkpoints.load(folder, stt_only=True, dtype="bfloat16")
    assert {array.dtype for array in flatten(in_16_bits.lm_params).values()} == {jnp.dtype(jnp.bfloat16)}


def test_the_decoder_can_be_left_out_and_is_missed_clearly(folders, tmp_path):
    for layout in ("kyutai", "orbax"):
        whole, light = (checkpoints.load(folders[layout], stt_only=only) for only in (False, True))
        names = {name for name in flatten(whole.mimi_params) if not name.startswith("decoder.")}
        assert names == flatten(light.mimi_params).keys() != flatten(whole.mimi_params).keys()
        for name, array in flatten(light.mimi_params).items():
            np.testing.assert_array_equal(array, flatten(whole.mimi_params)[name])
        assert repr(light).count(light.dtype) == 1
        assert light.dtype == whole.dtype == "float32"
        message = f"{light.name} has no decoder of sound: it was loaded with stt_only=True"
        with pytest.raises(ConfigError, match=re.escape(message)):
            checkpoints.save(light, tmp_path / "saved")
        with pytest.raises(ConfigError, match=re.escape(message)):
            codec.decode(light, np.zeros((1, 1), np.int32))


def test_a_model_is_named_as_it_was_asked_for(folders, tmp_path, monkeypatch):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"  # as in the hub's cache
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folders["kyutai"].iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert checkpoints.load(snapshot).name == "0123abcd"
    assert checkpoints.load(snapshot / kyutai.MIMI_NAME).name == kyutai.MIMI_NAME
    (tmp_path / "current").symlink_to(snapshot)
    assert checkpoints.load(f"{tmp_path}/current/").name == "current"
    monkeypatch.chdir(folders["kyutai"])
    assert checkpoints.load(".").name == "kyutai"
    assert convert(".", tmp_path / "here").source == "kyutai"
    _hub_that(monkeypatch, snapshot)
    assert convert("kyutai/stt-1b-en_fr", tmp_path / "fetched").source == "kyutai/stt-1b-en_fr"


def test_a_home_folder_is_found_on_both_sides(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copy_of(folders["orbax"], tmp_path / "in")
    convert("~/in", "~/converted")
    checkpoints.save(checkpoints.load("~/converted"), "~/saved")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "converted", "saved"}


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "n" * 5_000, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(CheckpointError, match=r"is no file or folder, and no name on the hub"):
        checkpoints.load(name)


def test_a_name_is_a_text_or_a_path():
    with pytest.raises(ConfigError, match=r"^the model is None; expected a folder, a file, or the name of a model$"):
        checkpoints.load(None)


def test_a_model_of_a_relative_path_is_saved_from_another_folder(folders, tmp_path, monkeypatch):
    folder = copy_of(folders["kyutai"], tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    model = checkpoints.load("in")
    monkeypatch.chdir("/")
    checkpoints.save(model, tmp_path / "saved")
    assert checkpoints.load(tmp_path / "saved").tokenizer.size == model.tokenizer.size
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"words.model, the tokenizer of in, is gone since it was loaded"):
        checkpoints.save(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_saving_and_converting_in_a_forked_process_are_refused(folders, tmp_path, monkeypatch):
    model = checkpoints.load(folders["kyutai"])
    monkeypatch.setattr(process, "_first", -1)  # of a parent that used JAX
    with pytest.raises(ForkError, match="was forked from one that had loaded a model"):
        checkpoints.save(model, tmp_path / "saved")
    for source, to in (("kyutai", "orbax"), ("orbax", "kyutai")):
        with pytest.raises(ForkError, match="was forked from one that had loaded a model"):
            convert(folders[source], tmp_path / "converted", to=to)
    convert(folders["kyutai"], tmp_path / "converted", to="transformers")
