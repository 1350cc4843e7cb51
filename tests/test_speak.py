"""`dsm-jax speak`, as a user meets it."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

import dsm_jax
from dsm_jax import audio, cli
from dsm_jax.cli import speak as command
from dsm_jax.tts import Request, SynthesizeOptions
from tests.helpers import stt_model, tts_model
from tests.helpers.tts_model import CODEBOOKS, FRAME

pytestmark = pytest.mark.slow

TEXT = "good morning everyone"
TURNS = ("thank you", "for coming")
OPTIONS = SynthesizeOptions(temperature=0.0)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return a folder with a model and two voices."""
    desk = tmp_path_factory.mktemp("desk")
    tts_model.make_checkpoint(desk)
    for name, seed in (("anna", 0), ("ben", 1)):
        tts_model.write_voice(desk / f"{name}.safetensors", tts_model.voice(seed))
    return desk


@pytest.fixture(scope="module")
def model(desk):
    return dsm_jax.load(desk / "speaker")


@pytest.fixture(scope="module")
def speech(desk, model):
    return dsm_jax.synthesize(model, TEXT, voice=desk / "anna.safetensors", options=OPTIONS)


@pytest.fixture
def speak(desk, monkeypatch, tmp_path):
    """Run the command in a folder of its own, with the model, one voice, and no chance; return its exit code."""
    monkeypatch.chdir(tmp_path)
    given = ["--model", desk / "speaker", "--voice", desk / "anna.safetensors", "--temperature", "0", "--no-cache"]
    return lambda *arguments: cli.main(["speak", *map(str, [*given, *arguments])])


def test_help_is_instant():
    code = """
import sys
from dsm_jax import cli
try:
    cli.main(["speak", "--help"])
except SystemExit as stop:
    assert stop.code == 0
print(sorted({"jax", "numpy", "torch", "flax", "rich", "soundfile"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: dsm-jax speak")
    assert done.stdout.endswith("[]\n"), "help must not import what it does not need"


@pytest.mark.parametrize("name", ["talk.wav", "talk.flac", "talk.ogg"])
def test_a_recording_is_written(speak, capsys, tmp_path, speech, name):
    assert speak(TEXT, name) == 0
    assert capsys.readouterr() == ("", f"{name}: {speech.duration:.2f} s\n")
    read, rate = soundfile.read(name, dtype="float32")
    assert (rate, read.shape) == (speech.sample_rate, speech.pcm.shape)
    if name in ("talk.wav", "talk.flac"):  # the others keep the sound, not the samples
        np.testing.assert_allclose(read, speech.pcm, rtol=0, atol=1 / 32_768)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sound_is_piped_as_wav(speak, capsysbinary, monkeypatch, speech):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert speak("-", "-") == 0
    output, error = capsysbinary.readouterr()
    assert (output[:4], error) == (b"RIFF", b"")
    np.testing.assert_allclose(audio.read(io.BytesIO(output), speech.sample_rate), speech.pcm, rtol=0, atol=1 / 32_768)


def player(folder: Path, name: str, code: int = 0) -> None:
    """Write a player that keeps what it is told and hears, and ends with an exit code."""
    script = f"""#!{sys.executable}
import json, sys
from pathlib import Path
Path({str(folder / "heard.wav")!r}).write_bytes(sys.stdin.buffer.read())
Path({str(folder / "told.json")!r}).write_text(json.dumps(sys.argv[1:]))
sys.exit({code})
"""
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "told"), [("ffplay", ["-v", "error", "-nodisp", "-autoexit", "-i", "-"]), ("aplay", ["-q", "-"])]
)
def test_sound_for_a_terminal_goes_to_a_player(speak, capsysbinary, monkeypatch, tmp_path, speech, name, told):
    player(tmp_path, name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert speak(TEXT, "-") == 0
    assert capsysbinary.readouterr() == (b"", b"")
    assert json.loads((tmp_path / "told.json").read_text()) == told
    assert audio.read(tmp_path / "heard.wav", speech.sample_rate).size == speech.pcm.size


def test_a_player_that_fails_is_told_of(speak, capsysbinary, monkeypatch, tmp_path):
    player(tmp_path, "play", code=3)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert speak(TEXT, "-") == 1
    assert (
        b"dsm-jax: play ended with 3, so the sound may not have been played; name a file"
        in capsysbinary.readouterr().err
    )


def test_a_terminal_without_a_player_is_told_so(speak, capsysbinary, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert speak(TEXT, "-") == 1
    output, error = capsysbinary.readouterr()
    assert output == b""
    assert b"there is no player here (ffplay, aplay, play); install dsm-jax[mic], name a file, or send" in error


def test_frames_and_words_are_written_beside_the_recording(speak, tmp_path, speech):
    assert speak(TEXT, "talk.flac", "--save-frames") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.flac", "talk.json", "talk.safetensors"]
    saved = load_file("talk.safetensors")
    assert list(saved) == ["frames"]
    assert (saved["frames"].dtype, saved["frames"].shape[0]) == (np.int32, 1 + CODEBOOKS)
    np.testing.assert_array_equal(saved["frames"], speech.frames)
    assert json.loads(Path("talk.json").read_text(encoding="utf-8")) == speech.to_dict() | {"model": "speaker"}


def test_requests_are_written_to_a_folder_and_a_bad_one_costs_only_itself(speak, capsys, desk, tmp_path, model, speech):
    voices = [str(desk / f"{name}.safetensors") for name in ("ben", "anna")]
    rows = [
        {"id": "a.b", "turns": TURNS, "voices": voices},
        {"id": "bad", "turns": ["a ÿ"]},
        {"id": "c", "turns": [TEXT]},
    ]
    assert speak(tts_model.write_requests(tmp_path, *rows), "out", "--batch-size", "1", "--quiet") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("dsm-jax: out/bad.wav: turn 1 has the word 'ÿ'")
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.b.json", "a.b.wav", "c.json", "c.wav"]
    assert json.loads(Path("out/c.json").read_text(encoding="utf-8")) == speech.to_dict()
    conversation = dsm_jax.synthesize(model, Request(TURNS, tuple(voices)), options=OPTIONS)
    assert json.loads(Path("out/a.b.json").read_text(encoding="utf-8")) == conversation.to_dict()
    heard = audio.read("out/a.b.wav", speech.sample_rate)
    np.testing.assert_allclose(heard, conversation.pcm, rtol=0, atol=1 / 32_768)
    assert speak(tts_model.write_requests(tmp_path, rows[2]), "out/more", "--save-frames") == 0
    assert sorted(path.name for path in Path("out/more").iterdir()) == ["c.json", "c.safetensors", "c.wav"]


def test_a_file_that_cannot_be_written_costs_only_itself(speak, capsys, tmp_path):
    (tmp_path / "out/x.json").mkdir(parents=True)
    rows = [{"id": name, "turns": [TEXT]} for name in ("x", "y")]
    assert speak(tts_model.write_requests(tmp_path, *rows), "out", "--batch-size", "1") == 1
    assert "dsm-jax: out/x.wav: out/x cannot be written (Is a directory); name another place" in capsys.readouterr().err
    assert Path("out/y.json").is_file()
    assert Path("out/y.wav").stat().st_size > FRAME


def test_every_option_reaches_the_model(speak, monkeypatch, desk):
    calls = []

    def spy(model, requests, *, batch_size, progress):
        calls.append((model.name, list(requests), batch_size))
        return iter([])

    monkeypatch.setattr(command, "synthesize_each", spy)
    assert speak(TEXT, "talk.wav", "--voice", "ben") == 0
    values = (
        "--guidance-scale 3 --top-k 7 --codebooks 2 --padding-between 2 --padding-bonus 0.5 --max-frames 77 --seed 5"
    )
    assert speak(TEXT, "talk.wav", *values.split(), "--batch-size", "3") == 0
    anna = str(desk / "anna.safetensors")
    chosen = SynthesizeOptions(
        guidance_scale=3.0,
        temperature=0.0,
        top_k=7,
        codebooks=2,
        padding_between=2,
        padding_bonus=0.5,
        max_frames=77,
        seed=5,
    )
    assert calls == [
        ("speaker", [Request(TEXT, (anna, "ben"), options=OPTIONS)], 8),
        ("speaker", [Request(TEXT, (anna,), options=chosen)], 3),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEXT, "talk.aac"], "talk.aac cannot be written: it does not end in"),
        (["missing.txt", "talk.wav"], r"missing.txt cannot be read \(No such file"),
        ([TEXT, "talk.wav", "--guidance-scale", "0"], r"guidance_scale is 0\.0; expected 1 or more"),
        ([TEXT, "talk.wav", "--temperature", "nan"], "temperature is nan; expected a number from 0"),
        ([TEXT, "talk.wav", "--seed", "9" * 20], "expected a number of 64 bits"),
        ([TEXT, "talk.wav", "--codebooks", "3"], "3 codebooks are to be generated; speaker makes 1 to 2"),
        (
            [TEXT, "talk.wav", "--model", stt_model.CHECKPOINT],
            "checkpoint is a speech-to-text model; to speak, load a text-to-speech model",
        ),
        ([TEXT, "talk.wav", "--model", "nowhere"], "nowhere is no file or folder"),
    ],
)
def test_what_cannot_be_done_for_any_request_is_exit_code_2(speak, capsys, tmp_path, arguments, message):
    assert speak(*arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(f"dsm-jax: .*{message}.*\n", error), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], [TEXT, "talk.wav", "--max-frames", "0"], [TEXT, "talk.wav", "--guidance-scale", "x"]]
)
def test_arguments_that_cannot_be_read_are_exit_code_2(speak, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        speak(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"dsm-jax: .*(text, output|'0' is no whole number|'x').*; dsm-jax speak --help lists .*\n", error
    ), error
