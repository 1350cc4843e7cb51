"""Inputs and outputs of `dsm-jax speak`, before any model is loaded."""

import io
import json
import sys
from pathlib import Path

import pytest

from dsm_jax.cli import speak as command
from dsm_jax.cli.requests import Job, Turns, Voices, read_context, read_jobs
from dsm_jax.csm import CsmOptions, Segment
from dsm_jax.errors import SpeechError
from dsm_jax.tts import Dialogue, Request, SynthesizeOptions, Turn
from tests.helpers import tts_model

TEXT = "good morning everyone"
OPTIONS = SynthesizeOptions()


def test_a_text_is_one_job_for_the_voices_given():
    assert read_jobs("Say this.", Voices(["anna", "ben"])) == [
        Job(Request("Say this.", ("anna", "ben"), options=OPTIONS))
    ]
    for text in ("e.g. this.txt", "word", "é" * 200, "a/" * 120, "long " * 100, "語" * 5000):
        assert read_jobs(text, Voices()) == [Job(Request(text, options=OPTIONS))]


@pytest.mark.parametrize("name", ["letter.txt", "letter", "my letter.md"])
def test_a_file_of_text_is_one_job(tmp_path, name):
    (tmp_path / name).write_text("Good\nmörning.\n", encoding="utf-8")
    assert read_jobs(str(tmp_path / name), Voices(["anna"])) == [
        Job(Request("Good\nmörning.\n", ("anna",), options=OPTIONS))
    ]


def test_standard_input_is_one_job(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Good\nmörning.\n".encode()), encoding="utf-8"))
    assert read_jobs("-", Voices(["anna"])) == [Job(Request("Good\nmörning.\n", ("anna",), options=OPTIONS))]


def test_standard_input_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("mörning".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(SpeechError, match=r"^standard input cannot be read \(it is not UTF-8 text\); give a text"):
        read_jobs("-", Voices())


def test_requests_are_jobs_with_names_and_may_have_voices(tmp_path):
    rows = [{"id": "one", "turns": ["a", "b"], "voices": ["ben", "anna"]}, "", {"turns": ["c\u2028d"], "id": "2.b"}]
    path = tts_model.write_requests(
        tmp_path, *[row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    )
    assert read_jobs(str(path), Voices(["carl"])) == [
        Job(Request(("a", "b"), ("ben", "anna"), options=OPTIONS), "one"),
        Job(Request(("c\u2028d",), ("carl",), options=OPTIONS), "2.b"),
    ]


def test_requests_may_have_options_and_turns_their_voices(tmp_path):
    rows = [
        {"id": "a", "text": "x", "voice": "ann", "seed": 3, "temperature": 0, "codebooks": 2},
        {"id": "b", "turns": [{"text": "x", "voice": "ann"}, {"text": "y", "voice": "ben"}, {"text": "z"}]},
    ]
    path = tts_model.write_requests(tmp_path, *rows)
    own = SynthesizeOptions(seed=3, temperature=0, codebooks=2, top_k=9)
    given = SynthesizeOptions(top_k=9)
    turns = Dialogue([Turn("x", "ann"), Turn("y", "ben"), Turn("z", "ann")])
    assert read_jobs(str(path), Voices(["ann"], given)) == [
        Job(Request(("x",), ("ann",), options=own), "a"),
        Job(Request.of(turns, None, given), "b"),
    ]


def test_voices_of_requests_may_be_files_relative_to_the_file(tmp_path, monkeypatch):
    for name in ("my.safetensors", "his.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = [
        {"id": "a", "text": "x", "voice": "my.safetensors"},
        {"id": "b", "turns": [{"text": "x", "voice": "his.safetensors"}, {"text": "y", "voice": "ann"}]},
        {"id": "c", "text": "x"},
    ]
    path = tts_model.write_requests(tmp_path, *rows)
    mine, his = str(tmp_path / "my.safetensors"), str(tmp_path / "his.safetensors")
    # A voice of the command line is not relative to the file.
    assert read_jobs(str(path), Voices(["my.safetensors"])) == [
        Job(Request(("x",), (mine,), options=OPTIONS), "a"),
        Job(Request.of(Dialogue([Turn("x", his), Turn("y", "ann")]), "my.safetensors", OPTIONS), "b"),
        Job(Request(("x",), ("my.safetensors",), options=OPTIONS), "c"),
    ]


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfGood morning.")
    (job,) = read_jobs(str(tmp_path / "a.txt"), Voices())
    assert job.request.text == "Good morning."
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "one", "text": "Good morning."}\n')
    (job,) = read_jobs(str(tmp_path / "a.jsonl"), Voices())
    assert job.name == "one"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"requests\.jsonl:2: this is no JSON \(.* at column 2\); expected one object a line$"),
        ("[" * 100_000, r"requests\.jsonl:2: this is no JSON \(it is nested too deeply.*\); expected one object"),
        ('{"id": ' + "9" * 5000, r"requests\.jsonl:2: this is no JSON \(a number has too many digits.*\); expec"),
        ([1], r"requests\.jsonl:2 has list; a request has an id, and text or turns"),
        ({"id": "x"}, r"requests\.jsonl:2 has \['id'\]; a request has an id, and text or turns"),
        ({"turns": ["x"]}, r"requests\.jsonl:2 has \['turns'\]; a request has an id"),
        ({"id": "x", "text": "a", "turns": ["a"]}, r"has \['id', 'text', 'turns'\]; a request has an id, and text or"),
        (
            {"id": "x", "turns": ["a"], "speaker": "b"},
            "2 has 'speaker', which is unknown; a request may have id, text,",
        ),
        ({"id": 3, "turns": ["a"]}, "2 has the id 3; it names files, so give a text without slashes"),
        ({"id": "x", "turns": 3}, "2 has the turns 3; expected a list of texts, or of objects"),
        ({"id": "x", "turns": "a"}, "2 has the turns 'a'; expected a list"),
        ({"id": "x", "text": 3}, r"2 has text 3; expected a text$"),
        (
            {"id": "x", "turns": [{"text": None}]},
            "2 has the turn {'text': None}; expected an object of text",
        ),
        (
            {"id": "x", "turns": [{"text": "a", "voice": 5}]},
            "2 has the turn {.*}; expected an object of text and",
        ),
        ({"id": "x", "turns": ["a"], "voices": [None]}, r"2 has the voices \[None\]; expected a text, or a list"),
        ({"id": "x", "text": "a", "voice": "b", "voices": ["c"]}, "2 has voice and voices; give one of them"),
        ({"id": "x", "text": "a", "voices": ["b", "c", "d"]}, "2 has 3 voices; the models know two speakers"),
        ({"id": "x", "turns": ["a"], "voices": "b"}, "2 has the voices 'b'; expected a text"),
        (
            {"id": "x", "turns": [{"text": "a", "to": "b"}]},
            r"2 has the turn \{.*'to': 'b'\}; expected an object of text",
        ),
        ({"id": "x", "text": "a", "seed": "b"}, "2 has seed = 'b'; expected a whole number$"),
        ({"id": "x", "text": "a", "top_k": 2.5}, r"2 has top_k = 2\.5; expected a whole number$"),
        ({"id": "x", "text": "a", "temperature": "hot"}, "2 has temperature = 'hot'; expected a number$"),
        ({"id": "x", "text": "a", "temperature": -1}, "2: temperature is -1; expected a number from 0"),
        ({"id": "\ud800", "text": "a"}, "2 has an id that cannot name files: the text has half of a character at 0"),
        ({"id": "", "turns": ["a"]}, "2 has the id ''; it names files, so give a text without slashes"),
        ({"id": "..", "turns": ["a"]}, r"2 has the id '\.\.'; it names files"),
        ({"id": "a\0b", "turns": ["a"]}, r"2 has the id 'a\\x00b'; it names files"),
        ({"id": "../x", "turns": ["a"]}, "2 has the id '../x'; it names files, so give a text without slashes"),
        ({"id": "first", "turns": ["a"]}, "requests.jsonl has the id 'first' more than once; it names files, so give"),
    ],
)
def test_a_line_that_is_no_request_is_refused(tmp_path, row, message):
    path = tts_model.write_requests(
        tmp_path, {"id": "first", "turns": ["a"]}, row if isinstance(row, str) else json.dumps(row)
    )
    with pytest.raises(SpeechError, match=message):
        read_jobs(str(path), Voices())


def test_a_json_file_is_a_conversation_with_recordings_beside_it(tmp_path):
    text = {"type": "text", "text": "hi"}
    audio = [{"type": "audio", "path": "hi.wav"}, {"type": "audio", "array": [0.5, 0.5], "sampling_rate": 8_000}]
    turns = [{"role": "1", "content": [text, sound]} for sound in audio]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([*turns, {"role": "2", "content": "no"}]), encoding="utf-8-sig")
    options = CsmOptions(seed=3)
    (job,) = read_jobs(str(path), Turns(options=options))
    assert (job.name, job.request.text, job.request.speaker, job.request.options) == (None, "no", 2, options)
    first, second = job.request.context
    assert (first.text, first.speaker, first.audio) == ("hi", 1, tmp_path / "hi.wav")
    assert (second.text, second.audio.sample_rate) == ("hi", 8_000)


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        ("[", Turns(), r"talk.json: this is no JSON \(.* at line 1, column 2\); expected a list of messages$"),
        ("{}", Turns(), "talk.json has dict; expected a list of messages$"),
        ('[{"role": "0"}]', Turns(), r"talk.json: message 1 has \['role'\]; expected a message like"),
        ("[]", Turns(1), "talk.json is a conversation with speakers and a context of its own; leave out yours$"),
        ("[]", Turns(0, [Segment("a")]), "talk.json is a conversation with speakers and a context of its own; leave"),
        ("[]", Voices(), "talk.json is JSON, which a text-to-speech model takes as requests: name it .jsonl, or .txt"),
    ],
)
def test_a_json_file_that_is_no_conversation_is_refused(tmp_path, content, form, message):
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(SpeechError, match=message):
        read_jobs(str(tmp_path / "talk.json"), form)


def test_null_is_the_default_of_an_option_that_has_none(tmp_path):
    path = tts_model.write_requests(tmp_path, {"id": "a", "text": "b", "depth_top_k": None})
    (job,) = read_jobs(str(path), Turns(options=CsmOptions(depth_top_k=3)))
    assert job.request.options == CsmOptions()
    path = tts_model.write_requests(tmp_path, {"id": "a", "text": "b", "top_k": None})
    with pytest.raises(SpeechError, match=r"1 has top_k = None; expected a whole number$"):
        read_jobs(str(path), Turns())


@pytest.mark.parametrize(
    ("name", "why"),
    [("none.jsonl", r"none\.jsonl cannot be read \(No such"), ("", r"a file without a name cannot be read \(Is a dir")],
)
def test_a_context_that_cannot_be_read_is_refused(name, why):
    with pytest.raises(SpeechError, match=f"^{why}.*; give a file with a JSON object a line: text, speaker and audio$"):
        read_context(name)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("mörning".encode("latin-1"))
    (tmp_path / "folder.txt").mkdir()
    for name, why in (
        ("latin.txt", "it is not UTF-8 text"),
        ("missing.txt", "No such file or directory"),
        ("missing.jsonl", "No such file or directory"),
        ("folder.txt", "Is a directory"),
    ):
        with pytest.raises(SpeechError, match=rf"{name} cannot be read \({why}\); give a text, or a file of one"):
            read_jobs(str(tmp_path / name), Voices())
    with pytest.raises(
        SpeechError, match=r"requests\.jsonl has no requests; write one JSON object a line: id, text and"
    ):
        read_jobs(str(tts_model.write_requests(tmp_path, "", " ")), Voices())


@pytest.mark.parametrize(
    ("named", "output", "frames", "message"),
    [
        (
            False,
            "talk.aac",
            False,
            r"talk.aac cannot be written: it does not end in .wav, .flac, .ogg, .opus, .mp3; name another file",
        ),
        (False, "talk", False, "talk cannot be written: it does not end in"),
        (False, "nowhere/talk.wav", False, "there is no folder nowhere; name another file, or - to play"),
        (False, "-", True, "--save-frames writes files beside the recording; name one in place of -"),
        (True, "talk.wav", False, "requests are written to a folder, and talk.wav is none; name one"),
        (True, "-", False, "requests are written to a folder, and - is none; name one"),
        (True, "taken", False, r"taken cannot be made \(File exists\); name another folder"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused(tmp_path, monkeypatch, named, output, frames, message):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    with pytest.raises(SpeechError, match=message):
        command.check_output(output, named=named, save_frames=frames)


def test_outputs_that_can_be_written_are_accepted_and_folders_made(tmp_path):
    for output in ("-", str(tmp_path / "talk.wav"), str(tmp_path / "talk.FLAC"), str(tmp_path / "talk.ogg")):
        command.check_output(output, named=False, save_frames=False)
    command.check_output(str(tmp_path / "new/folder"), named=True, save_frames=True)
    assert (tmp_path / "new/folder").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
