"""`dsm-jax speak` with a conversational speech model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import dsm_jax
from dsm_jax import audio, checkpoints, cli, codec
from dsm_jax.csm import CsmOptions, Request, Segment
from dsm_jax.csm.batch import synthesize_each
from tests.helpers import tts_model
from tests.helpers.csm_model import random_model
from tests.helpers.tts_model import FRAME

pytestmark = pytest.mark.slow  # the models compile for seconds

GREEDY = CsmOptions(temperature=0.0, max_frames=16)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return a folder with a model, a recording and a context of it."""
    desk = tmp_path_factory.mktemp("desk")
    checkpoints.save(random_model(desk), desk / "csm")
    pcm = np.random.default_rng(0).normal(scale=0.1, size=7 * FRAME).astype(np.float32)
    audio.write(desk / "hi.wav", pcm, 1600)
    (desk / "talk.jsonl").write_text(json.dumps({"text": "hi", "speaker": 1, "audio": "hi.wav"}) + "\n")
    return desk


@pytest.fixture
def speak(desk, monkeypatch, tmp_path):
    """Run the command in a folder of its own, with the model and no chance; return its exit code."""
    monkeypatch.chdir(tmp_path)
    given = ["--model", desk / "csm", "--temperature", "0", "--max-frames", "16", "--no-cache"]
    return lambda *arguments: cli.main(["speak", *map(str, [*given, *arguments])])


def test_a_text_has_the_speaker_and_the_context_of_the_arguments(speak, desk, tmp_path):
    assert speak("no", "a.wav", "--speaker", "2", "--context", desk / "talk.jsonl", "--save-frames") in (0, 1)
    model, hi = dsm_jax.load(desk / "csm"), Segment("hi", 1, desk / "hi.wav")
    requests = [Request("no", 2, [hi]), Request("no", 0, [hi]), Request("no", 2)]
    results = [result for _, result in sorted(synthesize_each(model, requests, options=GREEDY), key=lambda one: one[0])]
    wanted, *others = (r.speech if isinstance(r, dsm_jax.IncompleteSpeechError) else r for r in results)
    frames_QT = load_file(tmp_path / "a.safetensors")["frames"]
    np.testing.assert_array_equal(frames_QT, wanted.frames)
    assert all(frames_QT.tobytes() != other.frames.tobytes() for other in others)


def test_requests_with_contexts_are_written_with_their_frames(speak, desk, capsys, tmp_path):
    rows = [
        {"id": "alone", "text": "z", "speaker": 1},
        {"id": "heard", "text": "no", "speaker": 1, "context": [{"text": "hi", "speaker": 1, "audio": "hi.wav"}]},
        {"id": "given", "text": "no", "speaker": 1},
        {"id": "bad", "text": "no", "context": [{"text": "hi", "speaker": 1, "audio": "missing.wav"}]},
        {"id": "hot", "text": "z", "temperature": 1.5, "depth_top_k": 3, "seed": 4},
    ]
    requests = tts_model.write_requests(desk, *rows)
    assert speak(requests, "out", "--context", desk / "talk.jsonl", "--save-frames") == 1
    errors = capsys.readouterr().err
    assert "out/bad.wav: the context's turn 'hi': " in errors
    model = dsm_jax.load(desk / "csm")
    hi = [Segment("hi", 1, desk / "hi.wav")]
    expected = {"alone": Request("z", 1, hi), "heard": Request("no", 1, hi), "given": Request("no", 1, hi)}
    for index, result in synthesize_each(model, list(expected.values()), options=GREEDY):
        name = list(expected)[index]
        speech = result.speech if isinstance(result, dsm_jax.IncompleteSpeechError) else result
        frames = load_file(tmp_path / "out" / f"{name}.safetensors")["frames"]
        assert (frames.dtype, frames.shape[0]) == (np.int32, 4)
        np.testing.assert_array_equal(frames, speech.frames)
        np.testing.assert_allclose(
            audio.read(tmp_path / "out" / f"{name}.wav", model.sample_rate), speech.pcm, atol=1 / 32_768
        )
        about = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert (about["text"], about["words"]) == (expected[name].text, [])
    assert (tmp_path / "out" / "hot.wav").exists()
    assert not (tmp_path / "out" / "bad.wav").exists()


def test_a_turn_that_many_rows_have_is_encoded_once(speak, desk, monkeypatch):
    turn, encoded, encode = {"text": "hi", "speaker": 1, "audio": "hi.wav"}, [], codec.encode
    rows = [{"id": str(n), "text": "no", "context": [turn] * n} for n in range(1, 4)]
    rows.append({"id": "other", "text": "no", "context": [{**turn, "text": "ho"}]})

    def spy(model, pcm_T, **options):
        encoded.append(len(pcm_T))
        return encode(model, pcm_T, **options)

    monkeypatch.setattr(codec, "encode", spy)
    speak(tts_model.write_requests(desk, *rows), "out")
    assert encoded == [7 * FRAME] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("z", "a.wav", "--voice", "theo"), "is a conversational speech model, which has no --voice; leave that out"),
        (("z", "a.wav", "--codebooks", "2"), "is a conversational speech model, which has no --codebooks; leave that"),
        (("z", "a.wav", "--context", "none.jsonl"), "none.jsonl cannot be read (No such file or directory)"),
        (("z", "a.wav", "--speaker", "-1"), "--speaker is -1; expected a number: 0, 1 and so on"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(speak, capsys, arguments, message):
    assert speak(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "talk.jsonl:1 has a turn with list; expected an object of text, speaker and audio"),
        ({"text": "a"}, "talk.jsonl:1 has a turn with ['text']; expected an object of text, speaker and audio"),
        ({"text": "a", "speaker": "b", "audio": "c"}, "talk.jsonl:1 has the speaker 'b'; expected a number: 0, 1 and"),
        ({"text": 1, "speaker": 0, "audio": "c"}, "expected a text, and the path of its recording"),
    ],
)
def test_contexts_of_another_form_are_refused(speak, capsys, tmp_path, row, message):
    (tmp_path / "talk.jsonl").write_text(json.dumps(row))
    assert speak("z", "a.wav", "--context", "talk.jsonl") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "speaker": 0}, "requests.jsonl:1 has ['id', 'speaker']; a request has an id, and text"),
        (
            {"id": "a", "text": "b", "voice": "c"},
            "has 'voice', which is unknown; a request may have id, text, speaker,",
        ),
        ({"id": "a", "text": "b", "context": "c"}, "has text 'b' and context 'c'; expected a text and a list"),
        ({"id": "a", "text": "b", "speaker": True}, "has the speaker True; expected a number: 0, 1 and so on"),
    ],
)
def test_requests_of_another_form_are_refused(speak, capsys, tmp_path, row, message):
    requests = tts_model.write_requests(tmp_path, row)
    assert speak(requests, "out") == 2
    assert message in capsys.readouterr().err


def test_flags_of_conversations_are_refused_for_text_to_speech(speak, capsys):
    assert speak("z", "a.wav", "--model", "digits-tts", "--speaker", "0") == 2
    assert "digits-tts is a text-to-speech model, which has no --speaker; leave that out" in capsys.readouterr().err


def test_a_third_voice_is_refused(speak, capsys):
    voices = [word for name in ("lucas", "theo", "george") for word in ("--voice", name)]
    assert speak("one", "a.wav", "--model", "digits-tts", *voices) == 2
    assert "--voice was given 3 times; the models know two speakers" in capsys.readouterr().err
