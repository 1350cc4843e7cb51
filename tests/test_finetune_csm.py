"""Fine-tuning conversational speech in miniature: a model speaks the conversations that it was trained on.

Shape letters: M streams (text first), Q codebooks, T frames.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import dsm_jax
from dsm_jax import audio, checkpoints
from dsm_jax.checkpoints import Model
from dsm_jax.csm import CsmOptions, Request, Segment
from dsm_jax.errors import ConfigError
from dsm_jax.models.parameters import flatten
from dsm_jax.synthesis import synthesize_each
from dsm_jax.training.conversation_rows import CsmRows
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.losses.csm import CsmObjective
from dsm_jax.training.step import OptimizerConfig
from tests.helpers import csm_model
from tests.helpers.checkpoint_maker import arrays_of, assert_same_weights
from tests.helpers.csm_model import CSM
from tests.helpers.tts_model import FRAME

pytestmark = pytest.mark.slow  # the models compile for seconds

RATE = 1600
MESH = Mesh(jax.devices()[:1], ("data",))
# Wide enough to learn the codes of 16 recordings in a hundred steps.
CONFIG = dataclasses.replace(
    CSM,
    backbone=dataclasses.replace(CSM.backbone, d_model=64, dim_feedforward=128, gated_width=128),
    depth=dataclasses.replace(CSM.depth, d_model=32, dim_feedforward=64, gated_width=64),
)
TEXTS = ("good day", "who is it", "me again", "well now", "come in", "not yet", "so be it", "see you")
NEW_VOICE = 2
# In every second conversation the texts are those of the conversation before it, so that only the sound of the first
# turn says which answer to give.
TALKS = tuple((TEXTS[number // 2 * 2], TEXTS[number // 2 * 2 + 1]) for number in range(8))


def write_talks(folder: Path, talks, speakers: tuple[int, int], seed: int) -> Path:
    """Write conversations of two turns, each with 3 to 5 frames of noise that is no whole number of frames."""
    random, lines = np.random.default_rng(seed), []
    for number, texts in enumerate(talks):
        turns = []
        for place, (text, speaker) in enumerate(zip(texts, speakers, strict=True)):
            path = folder / f"{number}_{place}.wav"
            audio.write(path, 0.3 * random.normal(size=int(FRAME * random.uniform(2, 5))), RATE)
            turns.append({"text": text, "speaker": speaker, "audio": path.name})
        lines.append(json.dumps({"turns": turns}))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder / "talks.jsonl"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_talks(tmp_path_factory.mktemp("data"), TALKS, (0, 1), 0)


@pytest.fixture(scope="module")
def new_voice(tmp_path_factory) -> Path:
    return write_talks(tmp_path_factory.mktemp("voice"), [("who is it", "a friend")], (0, NEW_VOICE), 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save(csm_model.random_model(folder, CONFIG), folder / "made")
    return folder / "made"


def settings(checkpoint: Path, data: Path, output: Path, *, steps: int, **others) -> FinetuneConfig:
    config = FinetuneConfig(
        data=str(data),
        output=str(output),
        model=str(checkpoint),
        run=RunConfig(steps=steps, log_every=1, save_every=max(1, steps // 2)),
        batch_size=8,
        encode_batch=4,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup=10),
        csm=CsmObjective(depth_share=0.5),
    )
    return dataclasses.replace(config, **others)


@pytest.fixture(scope="module")
def trained(checkpoint, data, tmp_path_factory) -> Path:
    """Train the whole model, on both devices, and return the run's folder."""
    output = tmp_path_factory.mktemp("trained") / "run"
    finetune(settings(checkpoint, data, output, steps=100))
    return output


def adapters(trained: Path, new_voice: Path, output: Path) -> FinetuneConfig:
    """Make the config that teaches the trained model a new voice."""
    return settings(
        trained / "model",
        new_voice,
        output,
        steps=60,
        batch_size=2,
        lora=LoraConfig(rank=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=5),
        validation=str(new_voice),
    )


@pytest.fixture(scope="module")
def adapted(trained, new_voice, tmp_path_factory) -> tuple[Path, Model]:
    output = tmp_path_factory.mktemp("adapted") / "run"
    return output, finetune(adapters(trained, new_voice, output))


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_speaks(model: Model, data: Path) -> None:
    """Assert that a model, given text and context, says the last turn of every conversation, frame for frame."""
    maker = CsmRows(model, MESH, positions=None, batch_size=4)
    talks = maker.read(data, skip_bad=False)
    requests = [
        Request(last.text, last.speaker, [Segment(turn.text, turn.speaker, str(turn.audio)) for turn in before])
        for *before, last in (talk.turns for talk in talks)
    ]
    speeches = dict(synthesize_each(model, requests, options=CsmOptions(temperature=0.0, max_frames=20)))
    for number, row in enumerate(maker.rows(talks)):
        last_QT = row["tokens_BMT"][1:, row["starts_BN"].max() :]
        codes_QT = last_QT[:, last_QT[0] >= 0]
        assert codes_QT.shape[1] >= 4
        assert not codes_QT[:, -1].any()
        speech = speeches[number]
        assert isinstance(speech, dsm_jax.Speech), speech
        assert speech.complete, "ended by itself, where the recording ends"
        np.testing.assert_array_equal(speech.frames, codes_QT[:, :-1])


def test_a_model_trained_on_eight_conversations_speaks_them(trained, data):
    assert TALKS[0] == TALKS[1]
    records = metrics(trained)
    assert records[-1]["loss"] < 0.05 < records[0]["loss"]
    assert records[-1]["loss"] == pytest.approx(records[-1]["backbone"] + records[-1]["depth"], rel=1e-5)
    assert_speaks(dsm_jax.load(trained / "model"), data)


def test_the_trained_model_is_in_the_layout_of_transformers(trained):
    written = json.loads((trained / "model/config.json").read_text())
    assert written["model_type"] == "csm"
    assert written["architectures"] == ["CsmForConditionalGeneration"]


def test_an_untrained_model_does_not_speak_them(checkpoint, data):
    with pytest.raises(AssertionError):
        assert_speaks(dsm_jax.load(checkpoint), data)


def test_adapters_teach_a_new_voice_in_the_layers_of_both_decoders(trained, adapted, new_voice):
    output, model = adapted
    records = metrics(output)
    assert records[-1]["validation_loss"] < 0.05 < records[0]["loss"]
    written = dsm_jax.load(output / "model")
    assert_same_weights(written, model)
    assert_speaks(written, new_voice)
    before, after = arrays_of(dsm_jax.load(trained / "model")), arrays_of(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        f"lm.{part}.layers.{layer}.{weight}"
        for part in ("backbone", "depth")
        for layer in range(2)
        for weight in (
            "self_attn.in_proj.weight_PKHD",
            "self_attn.out_proj.weight_DKGH",
            "feedforward.linear_in.weight_PFD",
            "feedforward.linear_out.weight_DF",
        )
    }


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(trained, adapted, new_voice, tmp_path):
    whole, model = adapted
    output = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints/60")
    assert_same_weights(finetune(adapters(trained, new_voice, output), resume=True), model)
    ours, theirs = ([{**row, "seconds_per_step": 0} for row in metrics(folder)] for folder in (output, whole))
    assert ours == theirs


def test_settings_of_other_families_are_refused(checkpoint, data, tmp_path):
    with pytest.raises(
        ConfigError, match=r"seconds is 9\.0, and .* is a conversational speech model, which has no such"
    ):
        finetune(settings(checkpoint, data, tmp_path / "run", steps=1, seconds=9.0))


def test_two_devices_learn_what_one_does(checkpoint, data, tmp_path):
    def run(devices: int) -> tuple[Model, list[float]]:
        config = settings(
            checkpoint, data, tmp_path / str(devices), steps=3, optimizer=OptimizerConfig(learning_rate=5e-3, warmup=0)
        )
        model = finetune(config, mesh=Mesh(jax.devices()[:devices], ("data",)))
        return model, [record["loss"] for record in metrics(tmp_path / str(devices))]

    (one, losses), (two, split_losses) = run(1), run(2)
    assert losses[2] < losses[0]
    # float32: each device sums over its own rows first.
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    for name, weight in flatten(two.lm_params).items():
        # Adam divides by the gradient's size: where that is near 0, rounding is a visible part of a step.
        np.testing.assert_allclose(weight, flatten(one.lm_params)[name], atol=2e-3, err_msg=name)


def test_the_whole_model_trains_in_bfloat16_with_accumulation(checkpoint, data, tmp_path):
    config = settings(
        checkpoint,
        data,
        tmp_path / "run",
        steps=6,
        positions=48,
        accumulate=2,
        compute_dtype="bfloat16",
        csm=CsmObjective(mask_context=True),
    )
    model = finetune(config)
    before, after = arrays_of(dsm_jax.load(checkpoint)), arrays_of(model)
    # The scores of the codes that are never seen fall too, and every position of text and of audio is an input.
    unchanged = {name for name in before if np.array_equal(before[name], after[name])}
    assert unchanged == {name for name in before if name.startswith("mimi.")}
    assert {p.dtype.name for p in jax.tree.leaves(model.lm_params)} == {"float32"}
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
