"""Fine-tuning in miniature: training, resuming, merging, writing, and errors that keep the saved checkpoints."""

import dataclasses
import json
import logging
import runpy
import shutil
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh

import dsm_jax
from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.configs.json import from_dict
from dsm_jax.errors import ConfigError, TrainingError
from dsm_jax.evaluation import transcription
from dsm_jax.evaluation.transcription import TimedTranscript
from dsm_jax.models.parameters import flatten
from dsm_jax.progress import Progress
from dsm_jax.training.data import read_recordings
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.losses.stt import SttObjective, stt_loss
from dsm_jax.training.losses.tts import TtsObjective
from dsm_jax.training.rows import SttRows
from dsm_jax.training.step import OptimizerConfig
from tests.helpers.checkpoint_maker import PLAIN_STT, arrays_of, assert_same_weights, make_checkpoint

pytestmark = pytest.mark.slow

RATE = 400  # sample rate of the miniature codec, Hz
LM = dataclasses.replace(PLAIN_STT, card=16, num_layers=1, context=160)
EXAMPLE = Path(__file__).parents[1] / "examples/finetune.py"


@pytest.fixture(autouse=True, scope="module")
def slow_sound():
    """Allow sample rates as low as the miniature codec's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "MIN_RATE_HZ", 100)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "kyutai", lm=LM)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write a folder of three recordings with transcripts."""
    folder = tmp_path_factory.mktemp("data")
    for name, words in (("first", ("on", "a")), ("second", ("we", "on", "he")), ("third", ("a", "on"))):
        pcm = 0.3 * np.random.default_rng(len(name)).normal(size=RATE)
        audio.write(folder / f"{name}.wav", pcm, RATE)
        rows = [{"text": text, "start": 0.1 + 0.3 * i, "end": 0.3 + 0.3 * i} for i, text in enumerate(words)]
        (folder / f"{name}.json").write_text(json.dumps({"words": rows}))
    return folder


@pytest.fixture(scope="module")
def settings(checkpoint, data):
    """Make the config of a run with adapters, with changes."""
    return FinetuneConfig(
        data=str(data),
        output="",
        model=str(checkpoint),
        run=RunConfig(steps=4, log_every=1, save_every=2),
        validation=str(data),
        seconds=1.0,
        batch_size=2,
        encode_batch=2,
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup=1),
        stt=SttObjective(text_dropout=0.2),
        lora=LoraConfig(rank=4),
    )


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapted(settings, tmp_path_factory) -> tuple[Path, Model]:
    """Finish a run with adapters on both devices; return its folder and model."""
    output = tmp_path_factory.mktemp("adapted") / "run"
    return output, finetune(dataclasses.replace(settings, output=str(output)))


def changed(model: Model, checkpoint: Path) -> set[str]:
    before, after = arrays_of(dsm_jax.load(checkpoint)), arrays_of(model)
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_the_loss_falls_and_the_validation_loss_is_logged_at_each_checkpoint(adapted):
    rows = metrics(adapted[0])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]
    assert rows[3]["validation_loss"] < rows[1]["validation_loss"]


def test_the_validation_loss_is_the_mean_of_the_rows_without_dropout(adapted, checkpoint, data):
    output, model = adapted
    recordings = read_recordings(data, RATE)
    codes_NMT = SttRows(model, Mesh(jax.devices(), ("data",)), seconds=1.0, batch_size=2).encode(recordings)
    assert len(codes_NMT) == 3

    @jax.jit
    def loss(params, codes_MT):
        return stt_loss(nnx.merge(model.lm_def, params), codes_MT[None], jax.random.key(0), SttObjective())[0]

    losses = [float(loss(model.lm_params, codes_MT)) for codes_MT in codes_NMT]
    assert metrics(output)[3]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)  # orders of summation


def test_training_changes_only_targets_and_the_written_model_is_merged(adapted, checkpoint):
    output, model = adapted
    layer = "lm.transformer.layers.0"
    assert changed(model, checkpoint) == {
        f"{layer}.self_attn.in_proj.weight_PKHD",
        f"{layer}.self_attn.out_proj.weight_DKGH",
        f"{layer}.feedforward.linear_in.weight_PFD",
        f"{layer}.feedforward.linear_out.weight_DF",
    }
    written = dsm_jax.load(output / "model")
    assert_same_weights(written, model)
    assert written.config == dsm_jax.load(checkpoint).config
    assert (output / "model/model.safetensors").is_file(), "Kyutai's layout"
    assert sorted(p.name for p in output.iterdir()) == [
        *("checkpoints", "curve.png", "metrics.jsonl", "model", "settings.json"),
    ]


def test_a_finished_run_is_written_anew_with_a_share_of_what_it_has_learnt(adapted, settings, checkpoint, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(adapted[0], output)
    (output / "model").rename(output / "whole")
    half = finetune(dataclasses.replace(settings, output=str(output), strength=0.5), resume=True)
    before, whole, found = (arrays_of(one) for one in (dsm_jax.load(checkpoint), adapted[1], half))
    assert metrics(output) == metrics(adapted[0])
    assert changed(half, checkpoint) == changed(adapted[1], checkpoint)
    for name in before:
        between = (np.float64(before[name]) + np.float64(whole[name])) / 2
        np.testing.assert_allclose(found[name], between, rtol=1e-5, atol=1e-6)  # float32 against float64
    assert_same_weights(dsm_jax.load(output / "model"), half)


def test_the_parameters_are_on_every_device(adapted):
    for p in jax.tree.leaves(adapted[1].lm_params):
        assert len(p.devices()) == 2
        assert p.sharding.is_fully_replicated


def test_a_checkpoint_of_adapters_has_no_frozen_parameters(adapted):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata((adapted[0] / "checkpoints/4").absolute()).item_metadata.tree
    assert len(tree["params"]) == 4
    assert not tree["frozen"]
    assert not tree["aux"]
    assert {shape for pair in tree["params"].values() for shape in (pair[0].shape[-1], pair[1].shape[0])} == {4}


@pytest.fixture
def stopped(adapted, settings, tmp_path):
    """Make a function that copies the adapters' run as it was after its first checkpoint, and returns its config."""

    def at(step: int) -> FinetuneConfig:
        output = Path(shutil.copytree(adapted[0], tmp_path / "run"))
        shutil.rmtree(output / "model")
        for later in (output / "checkpoints").iterdir():
            if int(later.name) > step:
                shutil.rmtree(later)
        return dataclasses.replace(settings, output=str(output))

    return at


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(adapted, stopped):
    config, reports = stopped(2), []
    assert_same_weights(finetune(config, resume=True, progress=reports.append), adapted[1])
    assert reports == [Progress(step, 4) for step in (2, 3, 4)]
    ours, theirs = ([{**row, "seconds_per_step": 0} for row in metrics(o)] for o in (Path(config.output), adapted[0]))
    assert ours == theirs


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(stopped, monkeypatch):
    def not_finite(lm, *_):
        return jnp.nan * lm.transformer.layers[0].self_attn.in_proj.weight_PKHD[...].sum(), {}

    config = stopped(2)
    monkeypatch.setattr("dsm_jax.training.losses.stt.stt_loss", not_finite)
    with pytest.raises(TrainingError, match=r"not finite at step 3 .* Lower the learning rate.* last one is of step 2"):
        finetune(dataclasses.replace(config, validation=None), resume=True)
    assert [p.name for p in (Path(config.output) / "checkpoints").iterdir()] == ["2"]
    assert [row["step"] for row in metrics(Path(config.output))] == [1, 2]


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(adapted, stopped, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = stopped(4)
    with monkeypatch.context() as patch:
        patch.setattr("dsm_jax.convert.native.new_folder", full)
        with pytest.raises(TrainingError, match=r"not be written \(.*No space.*last checkpoint\. Fix that"):
            finetune(config, resume=True)
    assert sorted(p.name for p in Path(config.output).iterdir()) == [
        *("checkpoints", "curve.png", "metrics.jsonl", "settings.json"),
    ]
    (Path(config.output) / ".model.killed/native").mkdir(parents=True)
    assert_same_weights(finetune(config, resume=True), adapted[1])
    assert_same_weights(dsm_jax.load(Path(config.output) / "model"), adapted[1])
    assert not (Path(config.output) / ".model.killed").exists()


def test_weight_decay_leaves_the_pause_heads_alone(settings, tmp_path):
    heads = make_checkpoint(tmp_path, "kyutai", lm=dataclasses.replace(LM, extra_heads_num_heads=4))
    config = dataclasses.replace(
        settings,
        model=str(heads),
        output=str(tmp_path / "run"),
        lora=None,
        validation=None,
        run=RunConfig(steps=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=1, weight_decay=0.5),
    )
    model = finetune(config)
    names = {name for name in arrays_of(model) if name.startswith("lm.")}
    assert names - changed(model, heads) == {"lm.extra_heads.weight_AOD"}
    assert_same_weights(dsm_jax.load(tmp_path / "run/model"), model)


def test_the_whole_model_trains_in_bfloat16_with_accumulation_on_a_given_mesh(
    settings, checkpoint, tmp_path, monkeypatch
):
    seen = set()

    def watched(lm, *others):
        seen.update(p.dtype.name for p in jax.tree.leaves(nnx.state(lm)))
        return stt_loss(lm, *others)

    monkeypatch.setattr("dsm_jax.training.losses.stt.stt_loss", watched)
    config = dataclasses.replace(
        settings,
        output=str(tmp_path / "run"),
        lora=None,
        validation=None,
        run=RunConfig(steps=2, log_every=1),
        batch_size=4,
        accumulate=2,
        compute_dtype="bfloat16",
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup=1),
    )
    model = finetune(config, mesh=Mesh(jax.devices()[:2], ("data",)))
    assert seen == {"bfloat16"}
    name = "transformer.layers.0.feedforward.linear_in.weight_PFD"
    before, after = (np.asarray(flatten(one.lm_params)[name]) for one in (dsm_jax.load(checkpoint), model))
    moved, step = np.abs(after - before), np.abs(before) * 2**-9
    assert (moved[step > 1e-4] < step[step > 1e-4]).all(), "less than half of what is between two bfloat16 numbers"
    assert (moved[step > 1e-4] > 0).mean() > 0.9
    assert changed(model, checkpoint) == {name for name in arrays_of(model) if name.startswith("lm.")}
    assert_same_weights(dsm_jax.load(tmp_path / "run/model"), model)
    assert {p.dtype.name for p in jax.tree.leaves(model.lm_params)} == {"float32"}
    first, second = metrics(tmp_path / "run")
    assert np.isfinite([first["loss"], second["loss"]]).all()


def test_faulty_data_is_refused_before_training_and_skip_bad_leaves_it_out(settings, data, tmp_path):
    lines = [
        json.dumps({"audio": str(data / "first.wav"), "words": [{"text": "on"}]}),
        json.dumps({"audio": str(data / "first.wav"), "words": [{"text": "語", "start": 0.1, "end": 0.2}]}),
        json.dumps({"audio": "lost.wav", "words": []}),
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = dataclasses.replace(settings, output=str(tmp_path / "run"), validation=str(tmp_path / "data.jsonl"))
    with pytest.raises(TrainingError, match="3 of the 3 recordings") as caught:
        finetune(config)
    for place in (
        "line 1: word 1, 'on', goes from None",
        "line 2: the word '語' cannot be spelt",
        "line 3: .*lost.wav",
    ):
        caught.match(f"data.jsonl {place}")
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_run_is_never_overwritten_by_mistake(settings, tmp_path):
    config = dataclasses.replace(settings, output=str(tmp_path), model="nosuch/model")
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    with pytest.raises(TrainingError, match="holds a run that is at step 3; continue with --resume, or choose another"):
        finetune(config)
    (tmp_path / "model").mkdir()
    with pytest.raises(TrainingError, match="model exists, so this run is done; choose another output, or move it"):
        finetune(config, resume=True)


def test_resuming_a_run_to_fewer_steps_than_it_has_is_refused(stopped):
    config = stopped(4)
    fewer = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=3))
    with pytest.raises(TrainingError, match="holds a checkpoint of step 4, and the run is to end at step 3; give 4 st"):
        finetune(fewer, resume=True)
    assert not (Path(config.output) / "model").exists()


def test_a_run_is_not_resumed_with_other_adapters_or_another_model_that_would_fit(stopped):
    config = stopped(2)
    before = (Path(config.output) / "settings.json").read_bytes()
    for changes, message in (
        ({"lora": LoraConfig(rank=4, alpha=8.0)}, r"lora is \{.*'alpha': 8.0.*\}, and the run to resume has \{.*32.0"),
        ({"lora": None}, r"does not fit this run \(.*; resume with the config that it was made with"),
        ({"model": f"{config.model}/."}, r"model is '.*/\.', and the run to resume has '.*' \(.*settings\.json\); res"),
    ):
        with pytest.raises(TrainingError, match=message):
            finetune(dataclasses.replace(config, **changes), resume=True)
    assert (Path(config.output) / "settings.json").read_bytes() == before
    (Path(config.output) / "settings.json").write_text("{")
    with pytest.raises(TrainingError, match=r"settings\.json cannot be read \(this is no JSON .*\); remove it if"):
        finetune(config, resume=True)


def test_a_revision_is_asked_of_the_hub_and_a_run_is_not_resumed_with_another_one(stopped, monkeypatch):
    config, asked = stopped(2), []

    def fetch(name, *, revision, **_):
        asked.append((name, revision))
        return config.model

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    path = Path(config.output) / "settings.json"
    path.write_text(path.read_text().replace(json.dumps(config.model), '"kyutai/a"'))
    with pytest.raises(TrainingError, match=r"revision is 'v2', and the run to resume has None \(.*settings\.json\)"):
        finetune(dataclasses.replace(config, model="kyutai/a", revision="v2"), resume=True)
    assert set(asked) == {("kyutai/a", "v2")}


def test_a_run_is_resumed_with_another_learning_rate_and_says_so(stopped, caplog):
    config = stopped(2)
    slower = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-3))
    with caplog.at_level(logging.INFO, "dsm_jax.training"):
        finetune(slower, resume=True)
    assert "resumed with other settings of optimizer" in caplog.messages
    written = json.loads((Path(config.output) / "settings.json").read_text())
    assert from_dict(FinetuneConfig, written, "settings.json") == slower


def test_resuming_without_a_checkpoint_is_refused(settings, tmp_path):
    with pytest.raises(TrainingError, match="holds no checkpoint to resume from; start without --resume"):
        finetune(dataclasses.replace(settings, output=str(tmp_path / "run")), resume=True)


def test_a_mesh_that_splits_the_parameters_keeps_them_split_and_changes_no_loss(settings, tmp_path):
    def run(name: str, *shape: int):
        config = dataclasses.replace(
            settings, output=str(tmp_path / name), lora=None, validation=None, run=RunConfig(steps=2, log_every=1)
        )
        mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "model"))
        return finetune(config, mesh=mesh), [row["loss"] for row in metrics(tmp_path / name)]

    whole, losses = run("whole", 1, 1)
    split, split_losses = run("split", 1, 2)
    # float32: sums are in another order once each device has half of the inner width.
    np.testing.assert_allclose(split_losses, losses, rtol=1e-4)
    name = "transformer.layers.0.feedforward.linear_in.weight_PFD"
    weight = flatten(split.lm_params)[name]
    assert tuple(weight.sharding.spec)[:2] == (None, "model")
    assert {shard.data.shape[1] for shard in weight.addressable_shards} == {weight.shape[1] // 2}
    np.testing.assert_allclose(weight, flatten(whole.lm_params)[name], atol=1e-3)


def test_a_mesh_with_other_axes_is_refused(settings, tmp_path):
    config = dataclasses.replace(settings, output=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"the mesh has the axes \['rows'\]; name them \"data\""):
        finetune(config, mesh=Mesh(jax.devices()[:2], ("rows",)))


def test_a_mesh_that_does_not_divide_the_batch_is_refused(settings, tmp_path):
    config = dataclasses.replace(settings, output=str(tmp_path / "run"), batch_size=3)
    with pytest.raises(ConfigError, match="3 rows at a time cannot be shared equally by the 2 devices of the mesh"):
        finetune(config, mesh=Mesh(jax.devices()[:2], ("data",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"voice": "theo"},
            "voice is 'theo', and .* is a speech-to-text model, which has no such setting; leave it out",
        ),
        (
            {"guidance": 2.0},
            r"guidance is 2\.0, and .* is a speech-to-text model, which has no such setting; leave it out",
        ),
        (
            {"positions": 48},
            "positions is 48, and .* is a speech-to-text model, which has no such setting; leave it out",
        ),
        (
            {"tts": TtsObjective(text=2.0)},
            "tts is TtsObjective.*, and .* is a speech-to-text model, which has no such setting",
        ),
        (
            {"lora": LoraConfig(rank=100_000)},
            "rank of the adapters is 100000, and the matrices .* of up to [0-9]+; give",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        finetune(dataclasses.replace(settings, output=str(tmp_path / "run"), **changes))


def test_settings_are_a_finetune_config():
    with pytest.raises(ConfigError, match=r"^config is \{'data': 'here'\}; expected FinetuneConfig$"):
        finetune({"data": "here"})


def test_an_unknown_compute_dtype_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"^dtype is 'int8'; choose one of"):
        finetune(dataclasses.replace(settings, output=str(tmp_path / "run"), compute_dtype="int8"))


def test_paths_may_be_in_the_home_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks").mkdir()
    config = dataclasses.replace(settings, data="~/talks", output="~/run")
    with pytest.raises(TrainingError, match=rf"{tmp_path}/talks lists no recordings"):
        finetune(config)
    assert (tmp_path / "run/checkpoints").is_dir()
    (tmp_path / "held").mkdir()
    with pytest.raises(TrainingError, match=rf"{tmp_path}/held lists no recordings"):
        finetune(dataclasses.replace(config, data=settings.data, validation="~/held"))
    assert not Path("~").exists()


def test_the_example_learns_from_a_folder_and_counts_errors(checkpoint, data, stopped, monkeypatch, capsys):
    output = Path(stopped(4).output)
    arguments = {"--test": data, "--model": checkpoint, "--output": output, "--steps": 4, "--rank": 4}
    flat = [str(part) for pair in arguments.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(data), *flat, "--resume"])

    def transcribe(model, samples, options, *, batch_size):
        yield from ((index, TimedTranscript("On.", 1.0, 0.1)) for index in range(len(samples)))

    monkeypatch.setattr(transcription, "transcribe", transcribe)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    before, after = (part.splitlines() for part in capsys.readouterr().out.split("after: "))
    assert before[0].startswith("before: ")
    # "on a", "we on he" and "a on", each transcribed as "On."
    assert before[1].startswith("corpus WER")
    assert " 57.14 % " in before[1]
    assert before[1].endswith("of 7 words: 0 substituted, 0 inserted, 4 deleted")
    assert after[1] == before[1]
    assert (output / "model/config.json").is_file()
