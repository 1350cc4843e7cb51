"""The microphone, by a fake device: its words are those of the file, and Ctrl-C ends with the transcript."""

import itertools
import json
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soxr

from dsm_jax import audio, cli, microphone
from dsm_jax.errors import AudioError
from dsm_jax.stt.host import SttProgram

pytestmark = pytest.mark.slow

CLIP = Path(__file__).resolve().parents[1] / "examples/audio/digits_jackson.flac"


class Device(types.ModuleType):
    """A stand-in for `sounddevice` with one input that plays a recording, and then stays open or ends."""

    class PortAudioError(Exception):
        """An error of PortAudio, which is no ValueError there either."""

    def __init__(self, pcm_T: np.ndarray, rate: int, stays_open: bool):
        super().__init__("sounddevice")
        self.pcm_T, self.rate, self.stays_open, self.played = pcm_T, rate, stays_open, []

    def query_devices(self, device=None, kind=None):
        about = {"name": "fake", "max_input_channels": 1, "default_samplerate": float(self.rate)}
        if kind is None:
            return [about]
        if device not in (None, "fake"):
            raise ValueError(f"No input device matching {device!r}")
        return about

    def play(self, samples, rate, blocking):
        self.played.append((samples, rate))

    def InputStream(self, *, samplerate, blocksize, device, channels, dtype, callback):
        assert (samplerate, channels, dtype) == (self.rate, 1, "float32")
        return Stream(self, blocksize, callback)


class Stream:
    def __init__(self, device: Device, blocksize: int, callback):
        self.device, self.blocksize, self.callback, self.active = device, blocksize, callback, True

    def start(self) -> None:
        for start in range(0, self.device.pcm_T.size, self.blocksize):
            block_T = self.device.pcm_T[start : start + self.blocksize]
            self.callback(block_T[:, None], block_T.size, None, None)
        self.active = self.device.stays_open

    def stop(self) -> None:
        self.active = False

    def close(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch):
    def install(pcm_T: np.ndarray, rate: int, stays_open: bool = False) -> Device:
        made = Device(pcm_T, rate, stays_open)
        monkeypatch.setitem(sys.modules, "sounddevice", made)
        return made

    return install


@pytest.mark.parametrize("rate", [24_000, 48_000])
def test_the_words_of_a_microphone_are_those_of_the_file(device, capsys, rate):
    pcm_T = audio.read(CLIP)
    device(pcm_T if rate == 24_000 else soxr.resample(pcm_T, 24_000, rate).astype(np.float32), rate)
    assert cli.main(["transcribe", "--mic", "--model", "digits", "--no-cache", "--quiet"]) == 0
    assert capsys.readouterr().out.split() == ["three", "one", "four", "one", "five", "nine", "two", "six", "five"]


def interrupt_at_steps(monkeypatch, *numbers: int) -> None:
    """Press Ctrl-C inside these steps, where the state of the step before is gone and the new one not yet kept."""
    step, count = SttProgram.step, itertools.count()

    def interrupted(*args, **settings):
        made = step(*args, **settings)
        if next(count) in numbers:
            signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(SttProgram, "step", interrupted)


@pytest.mark.parametrize("rate", [24_000, 48_000])
def test_ctrl_c_ends_with_the_transcript_of_all_that_was_recorded(device, capsys, monkeypatch, rate):
    pcm_T = audio.read(CLIP)
    device(soxr.resample(pcm_T, 24_000, rate).astype(np.float32), rate, stays_open=True)
    interrupt_at_steps(monkeypatch, 40)
    assert cli.main(["transcribe", "--mic", "--model", "digits", "--no-cache", "--format", "json"]) == 0
    transcript = json.loads(capsys.readouterr().out)
    assert transcript["duration"] == pytest.approx(pcm_T.size / 24_000, abs=1e-3)
    assert transcript["text"] == "three one four one five nine two six five"


def test_a_second_ctrl_c_ends_at_once(device, capsys, monkeypatch):
    device(audio.read(CLIP), 24_000, stays_open=True)
    interrupt_at_steps(monkeypatch, 40, 41)
    monkeypatch.setattr(cli, "_forget_output", lambda: None)  # it would close what pytest holds
    assert cli.main(["transcribe", "--mic", "--model", "digits", "--no-cache"]) == 130
    assert "five" not in capsys.readouterr().out


def test_an_input_that_does_not_exist_names_those_that_do(device):
    device(np.zeros(9, np.float32), 24_000)
    with pytest.raises(AudioError, match=r"there is no input 'usb'; expected one of: fake"):
        microphone.Microphone(24_000, device="usb")


def test_a_machine_without_a_microphone_is_told_before_a_model_is_loaded(device, monkeypatch, capsys):
    fake = device(np.zeros(9, np.float32), 24_000)

    def none(device=None, kind=None):
        if kind is None:
            return []
        raise fake.PortAudioError("Error querying device -1")

    monkeypatch.setattr(fake, "query_devices", none)
    monkeypatch.setattr("dsm_jax.checkpoints.open_checkpoint", None)
    assert cli.main(["transcribe", "--mic", "--model", "digits", "--no-cache"]) == 2
    message = "there is no microphone (Error querying device -1); this machine has none; connect one"
    assert capsys.readouterr().err == f"dsm-jax: {message}\n"


@pytest.mark.parametrize("fails", ["InputStream", "start"])
def test_a_microphone_that_another_program_holds_is_an_error_that_says_so(device, monkeypatch, fails):
    fake = device(np.zeros(9, np.float32), 24_000)

    def busy(*_, **settings):
        raise fake.PortAudioError("Device unavailable")

    monkeypatch.setattr(fake if fails == "InputStream" else Stream, fails, busy)
    message = r"fake cannot be recorded from \(Device unavailable\); close the programs that use it, or choose another"
    with pytest.raises(AudioError, match=message), microphone.Microphone(24_000):
        pass


def test_without_the_package_the_error_names_the_extra_and_comes_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    monkeypatch.setattr("dsm_jax.checkpoints.open_checkpoint", None)
    assert cli.main(["transcribe", "--mic", "--model", "digits", "--no-cache"]) == 2
    assert "pip install 'dsm-jax[mic]'" in capsys.readouterr().err
    with pytest.raises(AudioError, match=r"pip install 'dsm-jax\[mic\]'"):
        microphone.Microphone(24_000)
    assert not microphone.play(np.zeros(9, np.float32), 24_000)


def test_sound_is_played_by_the_device(device):
    fake = device(np.zeros(9, np.float32), 24_000)
    assert microphone.play(np.ones(5, np.float32), 24_000)
    assert fake.played[0][1] == 24_000
