"""The command line on a terminal: a bar, and results that it does not spoil."""

import contextlib
import io
import json
import os
import pty
import subprocess
import sys

import pytest
import rich.console

import dsm_jax
from dsm_jax import audio, cli
from dsm_jax.cli import terminal
from dsm_jax.progress import Progress
from tests.helpers import stt_model

pytestmark = pytest.mark.slow

MODEL = ["--model", str(stt_model.CHECKPOINT), "--no-cache"]
CLIP = str(stt_model.RECORDING)


@pytest.fixture(scope="module")
def result():
    return dsm_jax.transcribe(stt_model.model(), CLIP)


def read_terminal(reading: int) -> bytes:
    """All that is written to the other end of a terminal until that is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody is at its other end
        while piece := os.read(reading, 10_000):
            shown += piece
    return shown


def test_the_text_goes_to_standard_output_while_a_bar_is_shown(result):
    reading, stderr = pty.openpty()
    command = [sys.executable, "-m", "dsm_jax", "transcribe", CLIP, *MODEL]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    os.close(stderr)
    shown = read_terminal(reading)  # as it comes: a bar that nobody reads would wait for ever once its buffer is full
    assert running.communicate()[0].decode() == result.text + "\n"
    assert running.returncode == 0
    assert stt_model.RECORDING.name.encode()[:20] in shown, "the bar was shown"


def test_results_on_a_terminal_are_not_wrapped(result):
    reading, both = pty.openpty()
    command = [sys.executable, "-m", "dsm_jax", "transcribe", CLIP, *MODEL, "--format", "json"]
    running = subprocess.Popen(command, stdout=both, stderr=both, env={**os.environ, "COLUMNS": "40"})
    os.close(both)
    shown = read_terminal(reading)
    assert running.wait() == 0
    text = shown.decode().replace("\r\n", "\n")
    assert json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])["text"] == result.text


def test_a_bar_shows_a_name_as_it_is(monkeypatch):
    shown = io.StringIO()
    console = rich.console.Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "console", lambda: console)
    with terminal.Bars(quiet=False) as bars:
        bars.name(0, "[red]a:smile:[/].wav")
        bars.update(Progress(1.0, 2.0))
    assert "[red]a:smile:[/].wav" in shown.getvalue()


def opened_for_its_length(capsys, monkeypatch) -> list[str]:
    opened: list[str] = []
    monkeypatch.setattr(audio, "duration", lambda source: opened.append(source))
    assert cli.main(["transcribe", CLIP, *MODEL]) == 0
    capsys.readouterr()
    return opened


def test_a_recording_is_opened_for_its_length_only_where_a_bar_shows_it(capsys, monkeypatch):
    assert opened_for_its_length(capsys, monkeypatch) == []
    monkeypatch.setattr(rich.console.Console, "is_terminal", True)
    assert opened_for_its_length(capsys, monkeypatch) == [CLIP]
