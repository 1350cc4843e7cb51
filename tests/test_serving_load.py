"""The load generator, and the commands that use a server."""

import asyncio
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import dsm_jax
from dsm_jax import audio
from dsm_jax.cli import main
from dsm_jax.errors import ConfigError, ServerError, ServerFullError
from dsm_jax.serving import load, scripts, services
from dsm_jax.serving.client import moshi, openai
from dsm_jax.serving.load import Load, Report, Tail
from tests.helpers.serving import running, served

pytestmark = pytest.mark.slow
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
RECORDINGS = [str(AUDIO / f"{name}.flac") for name in ("digits_jackson", "digits_lucas")]
SLOTS = 4


@pytest.fixture(scope="module")
def server():
    with running(served("stt", "digits", slots=SLOTS), served("tts", "digits-tts"), page=False) as found:
        yield found


@pytest.fixture(scope="module")
def wanted():
    return dsm_jax.transcribe(dsm_jax.load("digits"), RECORDINGS)


def told(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def report(latency: Tail, *, errors: dict[str, int] | None = None, dropped: int = 0, lag: float = 1.0) -> Report:
    nothing = Tail.of([])
    return Report(1, 1.0, 10, dropped, errors or {}, latency, nothing, nothing, nothing, Tail(lag, lag, lag, lag))


def test_every_frame_of_every_stream_is_measured(server):
    found = asyncio.run(load.run(Load(url=server.url, streams=2, seconds=3.0, recording=RECORDINGS[0])))
    assert found.frames == 2 * 38
    assert (found.dropped, found.errors) == (0, {})
    for tail in (found.latency, found.first, found.marker, found.lag):
        assert 0 < tail.p50 <= tail.p95 <= tail.p99 <= tail.max
    assert "76 frames, 0 dropped" in found.text()


def test_speech_is_measured_by_its_sound(server):
    found = asyncio.run(load.run(Load(url=server.url, streams=2, seconds=2.0, tts=True)))
    assert found.errors == {}
    assert found.frames > 10
    assert found.first.max > 0
    assert found.real_time_factor.max > 0
    alone = asyncio.run(load.run(Load(url=server.url, streams=1, seconds=2.0, tts=True)))
    factor = alone.to_dict()["real_time_factor"]["max"]
    assert 0 < factor <= alone.seconds / (alone.frames * load.FRAME_S), "a ratio, and not thousandths of it"
    assert f"real-time factor of a stream: {factor:.3f}, of the slowest {factor:.3f}\n" in alone.text()


def test_speech_goes_on_until_the_time_is_over_and_its_rows_say_what_they_are(server):
    found = asyncio.run(load.run(Load(url=server.url, streams=2, seconds=6.0, tts=True)))  # 2 streams in 2 slots
    assert found.errors == {}
    assert found.seconds >= 6.0
    assert "frame to frame" in found.text()
    assert "text to first sound" in found.text()
    assert "frame to step" not in found.text()


def test_streams_beyond_the_slots_are_errors_and_the_search_ends_at_the_slots(server):
    found = asyncio.run(load.run(Load(url=server.url, streams=SLOTS + 1, seconds=0.5)))
    assert found.errors == {"no free channels": 1}
    assert not found.holds(1e6)
    highest, reports = asyncio.run(load.find_highest(Load(url=server.url, streams=6, seconds=0.5), 1e6))
    assert highest == SLOTS
    assert [each.streams for each in reports] == [6, 3, 4, 5]


def test_a_target_holds_only_without_errors_and_dropped_frames():
    tail = Tail(10.0, 50.0, 90.0, 100.0)
    assert report(tail).holds(50.0)
    assert not report(tail).holds(49.9)
    assert not report(tail).holds(50.0, "p99")
    assert not report(tail, errors={"lost": 1}).holds(50.0)
    assert not report(tail, dropped=1).holds(50.0)
    assert not report(Tail.of([])).holds(50.0)


def test_a_generator_that_is_late_says_so():
    assert "the generator itself was late" in report(Tail.of([]), lag=11.0).text()
    assert "the generator itself was late" not in report(Tail.of([]), lag=9.0).text()


def test_loads_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"0 streams of 20\.0 s were asked for"):
        Load(url="x", streams=0)
    with pytest.raises(ServerError, match="cannot be reached"):
        asyncio.run(load.run(Load(url="127.0.0.1:1")))


def test_bench_serve_prints_a_table_or_a_line(server, capsys):
    few = ("bench", "serve", "--url", server.url, "--streams", "1", "--seconds", "0.5", "--target-ms", "1e6")
    code, out, _ = told(capsys, *few)
    assert code == 0
    assert "frame to step" in out
    assert "target: p95 within 1e+06 ms: 1 streams hold" in out
    code, out, _ = told(capsys, *few, "--json", "--find")
    line = json.loads(out)
    assert (code, line["holds"], line["reports"][0]["frames"]) == (0, 1, 6)
    assert told(capsys, *few[:-1], "0.001")[0] == 1


@pytest.mark.parametrize("kind", ["text", "json", "jsonl", "srt", "vtt", "tsv"])
def test_transcribe_over_a_server_prints_what_the_local_command_prints(server, capsys, kind):
    names = RECORDINGS[:1] if kind in ("srt", "vtt", "tsv") else RECORDINGS
    local = told(capsys, "transcribe", "--model", "digits", "--format", kind, "--no-cache", "--quiet", *names)
    remote = told(capsys, "transcribe", "--server", server.url, "--format", kind, "--quiet", *names)
    if kind == "jsonl":  # the lines of recordings that are transcribed at once are mixed
        local, remote = ((code, sorted(out.splitlines()), err) for code, out, err in (local, remote))
    assert remote == local
    assert remote[0] == 0


def test_transcribe_waits_for_a_server_that_is_full_and_loses_no_recording(capsys, wanted):
    names = RECORDINGS * 4
    with running(served("stt", "digits", slots=1), page=False) as found:
        full = found.server.metrics.registry.get_sample_value
        code, out, err = told(capsys, "transcribe", "--server", found.url, "--batch-size", "100", *names)
        assert full("dsm_refused_total", {"reason": "full"}) > 0
    assert (code, err) == (0, "")
    assert [out.count(transcript.text) for transcript in wanted] == [4, 4]


def test_a_full_server_is_tried_again_after_as_long_as_it_says_and_not_beyond_the_patience(monkeypatch):
    slept, answers = [], [ServerFullError("full", 3.0), ServerFullError("full"), ServerFullError("full")]

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def call() -> None:
        raise answers.pop(0)

    # In this module alone: a server of another test may run in this process, and sleeps too.
    clock = SimpleNamespace(sleep=sleep, get_running_loop=asyncio.get_running_loop)
    monkeypatch.setattr(moshi, "asyncio", clock)
    with pytest.raises(ServerFullError):
        asyncio.run(moshi._patiently(call, 0.0))
    assert slept == []
    with pytest.raises(IndexError):  # after the last of the answers
        asyncio.run(moshi._patiently(call, 3600.0))
    assert 0.25 <= slept[0] < slept[1] * 2 <= 1.5
    answers.append(ServerFullError("full", 3.0))
    with pytest.raises(IndexError):
        asyncio.run(moshi._patiently(call, 3600.0))
    assert slept[2] == 3.0


def test_transcribe_writes_a_file_each_and_goes_on_after_one_that_fails(server, capsys, tmp_path, wanted):
    (tmp_path / "broken.wav").write_bytes(b"none")
    names = [str(tmp_path / "broken.wav"), *RECORDINGS]
    options = ("--output-dir", str(tmp_path / "out"), "--format", "srt", "--model", "digits")
    code, out, err = told(capsys, "transcribe", "--server", server.url, *options, *names)
    assert (code, out) == (1, "")
    assert "broken.wav" in err
    texts = [(tmp_path / f"out/{Path(name).stem}.srt").read_text() for name in RECORDINGS]
    assert texts == [transcript.to_srt() for transcript in wanted]


@pytest.mark.parametrize(
    "options,words",
    [
        (["transcribe", "a.wav", "--dtype", "float32"], "--dtype is for a model on this machine"),
        (["transcribe", "a.wav", "--frames", "--format", "json"], "--frames is for a model on this machine"),
        (["transcribe", "a.wav", "--device", "cpu", "--seed", "3"], "--device, --seed is for a model on this machine"),
        (["speak", "one", "a.wav", "--top-k", "3"], "--top-k is for a model on this machine"),
        (["speak", "one", "a.wav", "--voice", "a", "--voice", "b"], "a server speaks with one voice"),
        (["speak", "one", "-"], "name a file that ends in .wav"),
        (["speak", "a.jsonl", "a.wav"], "a.jsonl holds requests"),
        (["speak", "none.txt", "a.wav"], "none.txt cannot be read"),
        (["transcribe", "a.wav", "--api-key-file", "none"], "the key in none cannot be read"),
    ],
)
def test_what_a_server_does_not_take_is_refused_by_name(capsys, options, words):
    code, _, err = told(capsys, *options, "--server", "127.0.0.1:1")
    assert code == 2
    assert words in " ".join(err.split())


def test_pauses_of_a_model_that_predicts_none_are_refused(server, capsys):
    code, out, err = told(capsys, "transcribe", "--server", server.url, "--vad", RECORDINGS[0])
    assert (code, out) == (1, "")
    assert "digits has no pause heads" in " ".join(err.split())


def test_speak_over_a_server_writes_the_speech_of_the_library(server, capsys, tmp_path):
    path = tmp_path / "a.wav"
    code, _, err = told(capsys, "speak", "--server", server.url, "nine", str(path), "--voice", "lucas", "--seed", "4")
    assert code == 0
    assert "a.wav: " in " ".join(err.split())
    options = dsm_jax.SynthesizeOptions(seed=4)
    reference = dsm_jax.synthesize(dsm_jax.load("digits-tts"), "nine", voice="lucas", options=options)
    pcm, rate = soundfile.read(path, dtype="float32")
    assert rate == 24_000
    assert abs(pcm - reference.pcm.clip(-0.99, 0.99)).max() < 1e-4


def test_a_speech_that_breaks_off_is_kept_as_far_as_it_came(monkeypatch, capsys, tmp_path):
    def brief(*arguments, options, **others):
        return scripts.ScriptService(*arguments, options=dataclasses.replace(options, max_frames=40), **others)

    text, path = "three one four " * 9, tmp_path / "a.wav"
    speaker, options = dsm_jax.load("digits-tts"), dsm_jax.SynthesizeOptions(max_frames=40)
    with pytest.raises(dsm_jax.IncompleteSpeechError) as here:
        dsm_jax.synthesize(speaker, text, voice="lucas", options=options)
    part_T = here.value.speech.pcm.clip(-0.99, 0.99)
    monkeypatch.setattr(services, "ScriptService", brief)
    with running(served("tts", "digits-tts"), page=False) as found:
        calls = {
            2e-6: lambda: moshi.synthesize(found.url, text, voice="lucas"),
            1e-4: lambda: openai.synthesize(found.url, text, model="digits-tts", voice="lucas"),
        }
        for error, call in calls.items():
            with pytest.raises(ServerError) as broken:
                call()
            assert isinstance(broken.value, dsm_jax.IncompleteSpeechError)
            assert not broken.value.speech.complete
            np.testing.assert_allclose(broken.value.speech.pcm, part_T, atol=error)
        code, _, err = told(capsys, "speak", "--server", found.url, text, str(path), "--voice", "lucas")
    assert code == 1
    assert "ended the session: the text was not said to its end in 40 frames" in " ".join(err.split())
    np.testing.assert_allclose(soundfile.read(path, dtype="float32")[0], part_T, atol=1e-4)


def test_a_key_comes_from_a_file_or_the_environment(capsys, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("right\n")
    with running(served("stt", "digits", slots=1), page=False, keys=("right",)) as found:
        command = ("transcribe", "--server", found.url, RECORDINGS[0])
        code, _, err = told(capsys, *command)
        assert code == 1
        assert "asks for a key" in err
        assert told(capsys, *command, "--api-key-file", str(tmp_path / "key"))[0] == 0
        monkeypatch.setenv("DSM_JAX_API_KEY", "right")
        assert told(capsys, *command)[0] == 0


def test_a_server_is_used_without_jax(server, tmp_path):
    speak = ["speak", "--server", server.url, "one", str(tmp_path / "a.wav")]
    bench = ["bench", "serve", "--url", server.url, "--streams", "1", "--seconds", "0.2", "--target-ms", "1e6"]
    for argv in (["transcribe", "--server", server.url, RECORDINGS[0]], speak, bench):
        code = f"import sys; from dsm_jax.cli import main; assert main({argv!r}) == 0; assert 'jax' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_microphone_is_transcribed_over_a_server(server, capsys, monkeypatch, wanted):
    pcm_T = audio.read(RECORDINGS[0])

    class Microphone:
        name = "test"

        def __init__(self, rate, device=None):
            assert rate == 24_000

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def chunks(self):
            for first in range(0, pcm_T.size, 1920):
                if first == 1920 * 10:
                    signal.raise_signal(signal.SIGINT)
                yield pcm_T[first : first + 1920]

        def end(self):
            self.is_ending = True

    monkeypatch.setattr("dsm_jax.microphone.Microphone", Microphone)  # its chunks go on: they were recorded before
    code, out, _ = told(capsys, "transcribe", "--server", server.url, "--mic")
    assert (code, out.split()) == (0, wanted[0].text.split())
