"""The losses of conversational speech equal those of transformers, and what training writes is loaded by transformers.

Recordings are of whole frames, because transformers pads each convolution at their end, and of 16-bit samples, because
the files are. Its rows are padded on the left, ours on the right.

Shape letters: B batch rows, M streams (text first), Q codebooks, T positions, S samples.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh

import dsm_jax
from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.training.conversation_rows import CsmRows
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.losses.csm import CsmObjective, csm_loss
from dsm_jax.training.step import OptimizerConfig
from tests.parity.references.csm import (
    AUDIO,
    AUDIO_END,
    csm_inputs,
    make_transformers_csm,
    transformers_csm_chat_losses,
    transformers_csm_losses,
)

EXACT = 1e-5  # relative; float32 through both decoders
IGNORED, BACKBONE_ONLY = -100, -101  # labels of transformers
EVERY_FRAME = CsmObjective(depth_share=1.0)
# Text, speaker and frames of each turn of a conversation; the last one has codes for the last turn alone.
TALKS = (
    (("Hello there.", 0, 5),),
    (("Good morning.", 1, 3), ("How are you, then?", 0, 7)),
    (("One.", 0, 2), ("Two.", 1, 1), ("Three, four.", 0, 4)),
)


@pytest.fixture(scope="module", params=[0, 1, 2])
def folder(request, tmp_path_factory) -> Path:
    return make_transformers_csm(tmp_path_factory.mktemp("csm"), seed=request.param)


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return dsm_jax.load(folder)


@pytest.fixture(scope="module")
def chats(model, tmp_path_factory) -> tuple[list[list[dict[str, Any]]], Path]:
    """Make conversations in the chat format with samples, and the same ones as training data."""
    data, random, frame = tmp_path_factory.mktemp("data"), np.random.default_rng(3), model.config.mimi.frame_size
    chats, lines = [], []
    for number, turns in enumerate(TALKS):
        chats.append([])
        lines.append([])
        for place, (text, speaker, frames) in enumerate(turns):
            pcm_S = random.integers(-9000, 9000, frames * frame).astype(np.float32) / 32768
            name = f"{number}_{place}.wav"
            audio.write(data / name, pcm_S, model.sample_rate)
            np.testing.assert_array_equal(audio.read(data / name, model.sample_rate), pcm_S)
            words = {"type": "text", "text": text}
            chats[-1].append({"role": str(speaker), "content": [words, {"type": "audio", "audio": pcm_S}]})
            lines[-1].append({"text": text, "speaker": speaker, "audio": name})
    (data / "talks.jsonl").write_text("\n".join(json.dumps({"turns": turns}) for turns in lines))
    return chats, data / "talks.jsonl"


@pytest.fixture(scope="module")
def inputs(folder, chats) -> dict[str, torch.Tensor]:
    return csm_inputs(folder, chats[0], output_labels=True)


@pytest.fixture(scope="module")
def batch(model, chats) -> dict[str, np.ndarray]:
    maker = CsmRows(model, Mesh(jax.devices()[:1], ("data",)), positions=None, batch_size=4)
    rows = maker.rows(maker.read(chats[1], skip_bad=False))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _parts(graph: nnx.GraphDef, params: Any, batch: dict[str, jax.Array], objective: CsmObjective):
    return csm_loss(nnx.merge(graph, params), batch, jax.random.key(0), objective)[1]


def losses(model: Model, batch: dict[str, np.ndarray], objective: CsmObjective = EVERY_FRAME) -> tuple[float, float]:
    """Compute our losses of the backbone and of the depth decoder."""
    assert model.lm_def is not None
    found = _parts(
        model.lm_def, model.lm_params, {name: jnp.asarray(array) for name, array in batch.items()}, objective
    )
    return float(found["backbone"]), float(found["depth"])


def frames_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return batch["tokens_BMT"][:, 1] >= 0


def labels_of(batch: dict[str, np.ndarray], counted_BT: np.ndarray) -> np.ndarray:
    """Make transformers' labels of every code, with frames that do not count."""
    codes_BTQ = batch["tokens_BMT"][:, 1:].swapaxes(1, 2)
    return np.where(counted_BT[..., None], codes_BTQ, IGNORED)


def test_with_every_frame_both_losses_are_those_of_transformers(folder, model, inputs, batch):
    labels = inputs["labels"]
    assert int((labels == AUDIO).sum()) == sum(frames for talk in TALKS for _, _, frames in talk)
    assert int((labels == AUDIO_END).sum()) == sum(map(len, TALKS))
    assert len(set(batch["tokens_BMT"][:, 1:][batch["tokens_BMT"][:, 1:] >= 0].tolist())) > 20, "the codes vary"
    assert losses(model, batch) == pytest.approx(transformers_csm_chat_losses(inputs, folder), rel=EXACT)


def test_with_every_other_frame_skipped_both_losses_are_those_of_transformers(folder, model, inputs, batch):
    labels = inputs["labels"].clone()
    given_BT = frames_of(batch)
    for row, given_T in zip(labels, given_BT, strict=True):
        speech = (row == AUDIO).nonzero()[:, 0]
        row[speech[::2]] = BACKBONE_ONLY
        ends = given_T & ~np.append(given_T[1:], False)
        skipped = np.flatnonzero(given_T & ~ends)[::2]
        assert len(skipped) == (len(speech) + 1) // 2
        given_T[skipped] = False
    wanted = transformers_csm_chat_losses(inputs | {"labels": labels}, folder)
    whole = losses(model, batch)
    found = losses(model, batch | {"depth_BT": given_BT}, CsmObjective())
    assert found == pytest.approx(wanted, rel=EXACT)
    assert found[0] == whole[0]
    assert abs(found[1] / whole[1] - 1) > 100 * EXACT, "the frames that are skipped matter"


def test_transformers_learns_context_turns_whatever_their_labels_and_ours_can_leave_them_out(
    folder, model, inputs, batch
):
    # Labels that ignore all turns but the last: transformers writes the codes of all audio over them, but not those of
    # the frames that end the context's recordings.
    labels = inputs["labels"].clone()
    for row in labels:
        ends = (row == AUDIO_END).nonzero()[:, 0]
        if len(ends) > 1:
            before = row[: ends[-2]]
            before[before == AUDIO] = IGNORED
    assert int((labels == AUDIO).sum()) == sum(talk[-1][2] for talk in TALKS)
    assert transformers_csm_chat_losses(inputs | {"labels": labels}, folder) == pytest.approx(
        losses(model, batch), rel=EXACT
    )
    # Labels of every code can say it.
    last_BT = frames_of(batch) & (np.arange(batch["tokens_BMT"].shape[2]) >= batch["starts_BN"].max(1)[:, None])
    assert last_BT.sum(1).tolist() == [talk[-1][2] + 1 for talk in TALKS]
    wanted = transformers_csm_losses(folder, batch["tokens_BMT"], labels_of(batch, last_BT))
    found = losses(model, batch, CsmObjective(depth_share=1.0, mask_context=True))
    assert found == pytest.approx(wanted, rel=EXACT)
    assert abs(found[0] / losses(model, batch)[0] - 1) > 100 * EXACT


def test_with_a_number_of_items_transformers_weighs_the_depth_decoder_by_its_codebooks(folder, batch):
    labels_BTQ = labels_of(batch, frames_of(batch))
    means = transformers_csm_losses(folder, batch["tokens_BMT"], labels_BTQ)
    items, frames, codebooks = 100, int(frames_of(batch).sum()), labels_BTQ.shape[2]
    sums = transformers_csm_losses(folder, batch["tokens_BMT"], labels_BTQ, items)
    weights = frames / items, frames * (codebooks - 1) / items
    assert sums == pytest.approx([weight * mean for weight, mean in zip(weights, means, strict=True)], rel=EXACT)


@pytest.mark.parametrize("folder", [0], indirect=True)
def test_what_fine_tuning_writes_is_loaded_by_transformers_with_our_losses(
    folder, model, chats, inputs, batch, tmp_path
):
    config = FinetuneConfig(
        data=str(chats[1]),
        output=str(tmp_path / "run"),
        model=str(folder),
        run=RunConfig(steps=3),
        batch_size=3,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0),
        lora=LoraConfig(rank=4),
    )
    learnt = losses(finetune(config, mesh=Mesh(jax.devices()[:1], ("data",))), batch)
    assert learnt[0] < losses(model, batch)[0]
    assert transformers_csm_chat_losses(inputs, tmp_path / "run/model") == pytest.approx(learnt, rel=EXACT)
