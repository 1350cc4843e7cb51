"""Conversations as training data: both forms are read alike, every fault is an error with its place, rows are prompts.

Shape letters: M streams (text first), Q codebooks, T positions or frames, N turns.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsm_jax import audio, codec
from dsm_jax.csm import Request, Segment
from dsm_jax.csm.prompt import text_ids, turn_MT
from dsm_jax.csm.synthesizer import ConversationSynthesizer
from dsm_jax.errors import ConfigError, ModelKindError, TrainingError
from dsm_jax.tasks import library_tasks, read_config
from dsm_jax.training.conversation_rows import CsmRows
from dsm_jax.training.conversations import TrainingConversation, TrainingTurn, read_conversations
from dsm_jax.training.encoding import ClipEncoder
from dsm_jax.training.finetune import finetune
from dsm_jax.training.losses.csm import CsmObjective
from tests.helpers import csm_model, tts_model
from tests.helpers.csm_model import CSM

RATE, FRAME = 1600, tts_model.FRAME
MESH = Mesh(jax.devices()[:1], ("data",))
SAMPLES = {"first": 4 * FRAME, "second": 5 * FRAME - 17, "third": 2 * FRAME + 1}
FIRST = {"text": "Who is it?", "speaker": 0, "audio": "talks/first.wav"}
SECOND = {"text": "me again.", "speaker": 1, "audio": "talks/second.wav"}
THIRD = {"text": "come in", "speaker": 0, "audio": "talks/third.wav"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return csm_model.random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Make a folder with three recordings, not all of whole frames."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "talks").mkdir()
    for seed, (name, samples) in enumerate(SAMPLES.items()):
        pcm_T = 0.3 * np.random.default_rng(seed).normal(size=samples)
        audio.write(folder / f"talks/{name}.wav", pcm_T, RATE)
    return folder


def write(folder: Path, *rows: object) -> Path:
    """Write a file of conversations, with rows that are not strings as JSON."""
    path = folder / "talk.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def message(turn: dict[str, object]) -> dict[str, object]:
    """Write a turn in the published chat format."""
    content = [{"type": "text", "text": turn["text"]}, {"type": "audio", "path": turn["audio"]}]
    return {"role": str(turn["speaker"]), "content": content}


def rows_of(model, positions: int | None = None) -> CsmRows:
    return CsmRows(model, MESH, positions=positions, batch_size=2)


def test_a_line_is_a_conversation_in_either_form(data):
    path = write(
        data,
        {"turns": [FIRST, SECOND], "topic": "doors"},
        "",
        {"turns": [message(FIRST), SECOND]},
        [message(FIRST), message(SECOND)],
    )
    turns = tuple(
        TrainingTurn(turn["text"], turn["speaker"], data / turn["audio"], SAMPLES[Path(turn["audio"]).stem])
        for turn in (FIRST, SECOND)
    )
    assert read_conversations(path, RATE, check=lambda one: None) == [TrainingConversation(turns)] * 3


def test_the_examples_of_the_documentation_are_read(model, data, tmp_path):
    page = (Path(__file__).parents[1] / "docs/training.md").read_text()
    lines = "".join(re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL))
    for name, source in zip("abc", SAMPLES, strict=True):
        shutil.copyfile(data / f"talks/{source}.wav", tmp_path / f"{name}.wav")
    talks = rows_of(model).read(write(tmp_path, lines), skip_bad=False)
    assert [[turn.text for turn in talk.turns] for talk in talks] == [["Who is it?", "Me again."], *[["Come in."]] * 2]
    (settings,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "settings.json").write_text(settings)
    config, run = read_config(tmp_path / "settings.json", library_tasks())
    assert run is finetune
    assert (config.positions, config.csm) == (1024, CsmObjective()), "the weights and the share are the defaults"


def test_a_row_is_the_prompt_of_inference_with_the_last_recording(model, data):
    path = write(data, {"turns": [FIRST, SECOND, THIRD]}, {"turns": [THIRD]})
    maker = rows_of(model)
    row, short = maker.rows(maker.read(path, skip_bad=False))

    context = [Segment(turn["text"], turn["speaker"], str(data / turn["audio"])) for turn in (FIRST, SECOND)]
    prompt_MT = ConversationSynthesizer(model, 1).prompt(Request(THIRD["text"], THIRD["speaker"], context))
    codes_QT = codec.encode(model, data / THIRD["audio"], codebooks=CSM.n_q)
    assert codes_QT.shape == (CSM.n_q, 3), "padded to whole frames"
    ids = text_ids(CSM, model.tokenizer, THIRD["text"], THIRD["speaker"])
    last_MT = turn_MT(CSM, ids, codes_QT)
    wanted_MT = np.concatenate([prompt_MT, last_MT[:, len(ids) :]], axis=1)
    np.testing.assert_array_equal(row["tokens_BMT"], wanted_MT)
    assert (row["tokens_BMT"][1:, -1] == 0).all(), "the frame of zeros that ends the recording"

    assert short["tokens_BMT"].shape == row["tokens_BMT"].shape, "all rows have room for the longest conversation"
    length = last_MT.shape[1]
    np.testing.assert_array_equal(short["tokens_BMT"][:, :length], last_MT)
    assert (short["tokens_BMT"][:, length:] == -1).all()
    starts = [0, 15 + 4 + 1, 15 + 4 + 1 + 14 + 5 + 1]
    assert row["tokens_BMT"][0, row["starts_BN"]].tolist() == [CSM.begin_id] * 3
    assert row["starts_BN"].tolist() == starts
    assert short["starts_BN"].tolist() == [0, -1, -1]


def test_recordings_are_padded_to_less_than_twice_their_lengths_and_keep_their_order(model, data, monkeypatch):
    maker, padded, encode = rows_of(model), {}, ClipEncoder.encode

    def spy(encoder, clips, length):
        clips = list(clips)
        padded[length] = [len(pcm_T) for pcm_T in clips]
        return encode(encoder, clips, length)

    monkeypatch.setattr(ClipEncoder, "encode", spy)
    turns = [FIRST, SECOND, THIRD, FIRST]
    rows = maker.rows(maker.read(write(data, *({"turns": [turn]} for turn in turns)), skip_bad=False))
    assert sum(map(len, padded.values())) == len(turns)
    assert len(padded) == 2
    for length, samples in padded.items():
        assert all(length / 2 < -(-n // maker.frame_size) * maker.frame_size <= length for n in samples)
    for turn, row in zip(turns, rows, strict=True):
        wanted_QT = codec.encode(model, data / turn["audio"], codebooks=CSM.n_q)
        codes_QT = row["tokens_BMT"][1:, row["tokens_BMT"][1] >= 0]
        np.testing.assert_array_equal(codes_QT[:, :-1], wanted_QT)


def test_rows_have_the_positions_of_the_settings_and_longer_conversations_are_refused(model, data):
    path = write(data, {"turns": [FIRST]})
    maker = rows_of(model, 40)
    (row,) = maker.rows(maker.read(path, skip_bad=False))
    assert row["tokens_BMT"].shape == (1 + CSM.n_q, 40)
    taken = int((row["tokens_BMT"] >= 0).any(0).sum())
    assert taken == 15 + 4 + 1
    assert rows_of(model, taken).read(path, skip_bad=False)
    message = (
        f"takes {taken} positions, one for each token of text, each frame of audio and the end of each recording; "
    )
    with pytest.raises(TrainingError, match=f"{message}a row has {taken - 1}: set more positions, leave out turns, or"):
        rows_of(model, taken - 1).read(path, skip_bad=False)
    small = dataclasses.replace(CSM, backbone=dataclasses.replace(CSM.backbone, context=taken - 1))
    config = dataclasses.replace(model.config, csm=small)
    with pytest.raises(TrainingError, match=f"{message}a row has {taken - 1}: leave out turns, or cut it into several"):
        rows_of(dataclasses.replace(model, config=config)).read(path, skip_bad=False)


def test_markers_in_a_text_are_letters(model, data):
    text = "hi<|end_of_text|><|AUDIO|><|audio_eos|> you<|begin_of_text|>"
    path = write(data, {"turns": [{**FIRST, "text": text}]})
    maker = rows_of(model)
    ((row),) = maker.rows(maker.read(path, skip_bad=False))
    text_T = row["tokens_BMT"][0]
    spelt = text_T[text_T >= 0]
    assert (spelt[0], spelt[-1]) == (CSM.begin_id, CSM.end_id)
    assert len(spelt) == 2 + len("[0]") + len(text)
    assert not set(spelt[1:-1]) & {CSM.begin_id, CSM.end_id, CSM.audio_id, CSM.audio_end_id}
    assert (row["tokens_BMT"][1:] >= 0).all(0).sum() == 4 + 1


FAULTS = {
    "no turns": ({"talk": []}, r"the turns are None; expected a list of one or more: \{\"turns\": \["),
    "an empty list": ({"turns": []}, r"the turns are \[\]; expected a list of one or more"),
    "no object": ("3", "the turns are 3; expected a list"),
    "no JSON": ('{"turns": [', r"this is no JSON \(.* at column 12\)"),
    "a turn that is none": ({"turns": [FIRST, "hello"]}, "turn 2 is 'hello'; expected text, speaker and audio"),
    "no text": ({"turns": [{**FIRST, "text": None}]}, "turn 1 has the text None and the speaker 0; expected words and"),
    "blank text": (
        {"turns": [FIRST, {**FIRST, "text": " "}]},
        "turn 2: the text of a turn is ' '; expected some words",
    ),
    "half a character": (
        {"turns": [{**FIRST, "text": "a \ud800"}]},
        "turn 1: the turn cannot be said: the text has half",
    ),
    "a name": ({"turns": [{**FIRST, "speaker": "Ann"}]}, "the speaker 'Ann'; expected words and a number from 0"),
    "true": ({"turns": [{**FIRST, "speaker": True}]}, "the speaker True; expected words and a number from 0"),
    "negative": (
        {"turns": [{**FIRST, "speaker": -1}]},
        r"turn 1: the speaker of 'Who is it\?' is -1; expected a number",
    ),
    "no audio": ({"turns": [{**FIRST, "audio": 7}]}, "the audio of turn 1 is 7; expected the path of a recording"),
    "samples": (
        {"turns": [{**FIRST, "audio": [0.5] * 900}]},
        r"the audio of turn 1 is \[0.5(, 0.5)*, \.{3}\];",
    ),
    "missing audio": ({"turns": [{**FIRST, "audio": "lost.wav"}]}, r"lost\.wav does not exist"),
    "no sound": ({"turns": [{**FIRST, "audio": "talk.jsonl"}]}, r"talk\.jsonl is not audio that can be decoded"),
    "a role that is a word": (
        [message({**FIRST, "speaker": "user"})],
        "message 1 has the role 'user'; expected the number",
    ),
    "a role of too many digits": (
        [message(FIRST) | {"role": "7" * 5_000}],
        "expected the number of a speaker, such as '0'",
    ),
    "a part whose type is a list": (
        [{"role": "0", "content": [{"type": ["text"], "text": "hello"}]}],
        r"message 1 has a part of type \['text'\]; expected 'text' or 'audio'",
    ),
    "a message without sound": ([{"role": "0", "content": "hello"}], "the audio of turn 1 is None; expected the path"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_conversation_is_named_by_its_line_and_skip_bad_leaves_only_it_out(model, data, caplog, name):
    bad, fault = FAULTS[name]
    path = write(data, {"turns": [FIRST]}, bad, {"turns": [SECOND]})
    maker = rows_of(model)
    heading = f"1 of the 3 conversations of {re.escape(str(path))} cannot be trained on; fix them, or set skip_bad"
    with pytest.raises(TrainingError, match=heading) as caught:
        maker.read(path, skip_bad=False)
    assert re.search(f"talk.jsonl line 2: .*{fault}", str(caught.value))
    kept = maker.read(path, skip_bad=True)
    assert [one.turns[0].text for one in kept] == [FIRST["text"], SECOND["text"]]
    assert re.search(f"left out: talk.jsonl line 2: .*{fault}", caplog.text)


def test_all_faults_are_listed_together(model, data):
    path = write(data, *(bad for bad, _ in list(FAULTS.values())[:7]))
    with pytest.raises(
        TrainingError, match=r"7 of the 7 conversations of .* cannot be trained on; fix them:\n"
    ) as caught:
        rows_of(model).read(path, skip_bad=True)
    assert str(caught.value).count("\n") == 6
    assert str(caught.value).endswith("and 2 more")


def test_data_without_conversations_is_refused(model, data, tmp_path):
    (tmp_path / "talk.jsonl").write_text("\n")
    with pytest.raises(TrainingError, match=r'lists no conversations; expected rows \{"turns": '):
        rows_of(model).read(tmp_path / "talk.jsonl", skip_bad=False)
    for source in (tmp_path, tmp_path / "lost.jsonl"):
        with pytest.raises(TrainingError, match=r"cannot be read \(.*\); give a JSON Lines file with rows \{\"turns\""):
            rows_of(model).read(source, skip_bad=False)


def test_a_row_longer_than_the_model_and_a_model_of_another_family_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="a row has 513 positions, and random 512; give that many at most"):
        rows_of(model, 513)
    with pytest.raises(ModelKindError, match="load a conversational speech model such as sesame/csm-1b"):
        rows_of(tts_model.random_model(tmp_path))
