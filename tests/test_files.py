"""Files are replaced as a whole or not at all; JSON Lines are read line by line."""

import json
import os

import pytest

from dsm_jax import files
from dsm_jax.errors import AudioError


def test_a_failure_leaves_what_was_there_and_nothing_new(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail_halfway() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_its_target(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_and_not_replaced():
    files.write_text(os.devnull, "text")
    assert not os.path.isfile(os.devnull)


def test_text_of_other_encodings_is_written_and_a_byte_order_mark_read_over(tmp_path):
    files.write_text(tmp_path / "a.txt", "name \udcff")
    assert files.read_text(tmp_path / "a.txt") == "name ?"
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftext")
    assert files.read_text(tmp_path / "b.txt") == "text"


@pytest.mark.parametrize("name", ["字" * 80 + ".wav", "n" * 251 + ".wav", "é" * 125 + ".txt"])
def test_names_as_long_as_the_system_allows_are_written(tmp_path, name):
    with files.replacing(tmp_path / name) as file:
        file.write(b"whole")
    assert (tmp_path / name).read_bytes() == b"whole"


def test_lines_end_where_json_cannot_go_on():
    content = '{"a": "one\u2028two\u0085"}\r\n\n  \n[1]\n2'.encode()
    assert [(number, files.parse_json(line, "x", line=True)) for number, line in files.json_lines(content)] == [
        (1, {"a": "one\u2028two\u0085"}),
        (4, [1]),
        (5, 2),
    ]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b"[1,\n 2", False, r"^this is no JSON \(.* at line 2, column 3\); expected a list$"),
        (b"[1", True, r"^this is no JSON \(.* at column 3\); expected a list$"),
        (b"[" * 100_000, True, r"^this is no JSON \(it is nested too deeply at .*\); expected a list$"),
        (
            b"[" + b"1" * 5_000 + b"]",
            True,
            r"^this is no JSON \(a number has too many digits at",
        ),
        (b'"\xe9"', True, r"^this is not text in UTF-8 \(.*\); save it as UTF-8$"),
    ],
)
def test_what_is_no_json_is_told_with_its_place(text, line, message):
    with pytest.raises(ValueError, match=message):
        files.parse_json(text, "a list", line=line)


def test_json_beyond_what_python_reads_is_an_error_of_json():
    assert files.decode_json(b'{"a": [1]}') == {"a": [1]}
    for text, words in (("[" * 100_000, "nested too deeply"), ("9" * 5000, "too many digits"), ("{", "Expecting")):
        for given in (text, text.encode()):
            with pytest.raises(json.JSONDecodeError, match=words):
                files.decode_json(given)


def test_an_output_whose_folder_is_not_there_is_refused_with_the_error_of_its_kind(tmp_path):
    files.check_folder_of(tmp_path / "talk.txt", AudioError)
    with pytest.raises(
        AudioError, match=r"^nowhere/talk\.wav cannot be written: there is no folder nowhere; make it first$"
    ):
        files.check_folder_of("nowhere/talk.wav", AudioError)
