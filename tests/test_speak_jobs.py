"""Inputs and outputs of `dsm-jax speak`, before any model is loaded."""

import io
import json
import sys
from pathlib import Path

import pytest

from dsm_jax.errors import SpeechError
from dsm_jax.tts import Request, command
from tests.helpers import tts_model

TEXT = "good morning everyone"


def test_a_text_is_one_job_for_the_voices_given():
    assert command.read_jobs("Say this.", ["anna", "ben"]) == [command.Job(Request("Say this.", ("anna", "ben")))]
    for text in ("e.g. this.txt", "word", "é" * 200, "a/" * 120, "long " * 100, "語" * 5000):
        assert command.read_jobs(text, []) == [command.Job(Request(text))]


@pytest.mark.parametrize("name", ["letter.txt", "letter", "my letter.md"])
def test_a_file_of_text_is_one_job(tmp_path, name):
    (tmp_path / name).write_text("Good\nmörning.\n", encoding="utf-8")
    assert command.read_jobs(str(tmp_path / name), ["anna"]) == [command.Job(Request("Good\nmörning.\n", ("anna",)))]


def test_standard_input_is_one_job(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Good\nmörning.\n".encode()), encoding="utf-8"))
    assert command.read_jobs("-", ["anna"]) == [command.Job(Request("Good\nmörning.\n", ("anna",)))]


def test_standard_input_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("mörning".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(SpeechError, match=r"^standard input cannot be read \(it is not UTF-8 text\); give a text"):
        command.read_jobs("-", [])


def test_requests_are_jobs_with_names_and_may_have_voices(tmp_path):
    rows = [{"id": "one", "turns": ["a", "b"], "voices": ["ben", "anna"]}, "", {"turns": ["c\u2028d"], "id": "2.b"}]
    path = tts_model.write_requests(
        tmp_path, *[row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    )
    assert command.read_jobs(str(path), ["carl"]) == [
        command.Job(Request(("a", "b"), ("ben", "anna")), "one"),
        command.Job(Request(("c\u2028d",), ("carl",)), "2.b"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"requests\.jsonl:2 is not JSON \(.*\); write one object a line: id, turns and voices"),
        ([1], r"requests\.jsonl:2 has list; a request has id and turns, and may have voices"),
        ({"id": "x"}, r"requests\.jsonl:2 has \['id'\]; a request has id and turns"),
        ({"turns": ["x"]}, r"requests\.jsonl:2 has \['turns'\]; a request has id and turns"),
        ({"id": "x", "turns": ["a"], "voice": []}, r"2 has \['id', 'turns', 'voice'\]; a request has id and turns"),
        ({"id": 3, "turns": ["a"]}, "2 has id = 3; id is a text, turns and voices are lists of texts"),
        ({"id": "x", "turns": 3}, "2 has turns = 3; id is a text"),
        ({"id": "x", "turns": "a"}, "2 has turns = 'a'; id is a text"),
        ({"id": "x", "turns": [3]}, r"2 has turns = \[3\]; id is a text"),
        ({"id": "x", "turns": ["a"], "voices": [None]}, r"2 has voices = \[None\]; id is a text"),
        ({"id": "x", "turns": ["a"], "voices": None}, "2 has voices = None; id is a text"),
        ({"id": "", "turns": ["a"]}, "2 has the id ''; it names files, so give one without slashes"),
        ({"id": "..", "turns": ["a"]}, r"2 has the id '\.\.'; it names files"),
        ({"id": "a\0b", "turns": ["a"]}, r"2 has the id 'a\\x00b'; it names files"),
        ({"id": "../x", "turns": ["a"]}, "2 has the id '../x'; it names files, so give one without slashes"),
        ({"id": "first", "turns": ["a"]}, "requests.jsonl has the id 'first' more than once; it names files, so give"),
    ],
)
def test_a_line_that_is_no_request_is_refused(tmp_path, row, message):
    path = tts_model.write_requests(tmp_path, {"id": "first", "turns": ["a"]}, row if row == "{" else json.dumps(row))
    with pytest.raises(SpeechError, match=message):
        command.read_jobs(str(path), [])


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
            command.read_jobs(str(tmp_path / name), [])
    with pytest.raises(
        SpeechError, match=r"requests\.jsonl has no requests; write one JSON object a line: id, turns and"
    ):
        command.read_jobs(str(tts_model.write_requests(tmp_path, "", " ")), [])


@pytest.mark.parametrize(
    ("named", "output", "frames", "message"),
    [
        (
            False,
            "talk.mp3",
            False,
            r"talk.mp3 cannot be written: it does not end in .wav, .flac, .ogg; name another file",
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
        command.check_output([command.Job(Request(TEXT), "id" if named else None)], output, save_frames=frames)


def test_outputs_that_can_be_written_are_accepted_and_folders_made(tmp_path):
    for output in ("-", str(tmp_path / "talk.wav"), str(tmp_path / "talk.FLAC"), str(tmp_path / "talk.ogg")):
        command.check_output([command.Job(Request(TEXT))], output, save_frames=False)
    command.check_output([command.Job(Request(TEXT), "id")], str(tmp_path / "new/folder"), save_frames=True)
    assert (tmp_path / "new/folder").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
