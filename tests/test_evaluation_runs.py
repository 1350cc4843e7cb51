"""Evaluation of a model: the clock, live latency, and the command on real recordings with `digits`."""

import functools
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax import audio, cli
from dsm_jax.checkpoints import Model
from dsm_jax.errors import AudioError
from dsm_jax.evaluation import transcription
from dsm_jax.evaluation.datasets import Sample
from dsm_jax.evaluation.transcription import TranscribeOptions
from dsm_jax.stt.events import Word, WordEnded, WordStarted
from dsm_jax.stt.transcript import Transcript

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples/audio"
DIGITS = ["--model", "digits", "--no-cache", "--quiet", "--normalizer", "basic"]


@functools.cache
def model() -> Model:
    return dsm_jax.load("digits")


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that only moves when a test moves it."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(transcription.time, "perf_counter", lambda: clock.now)
    return clock


def test_only_the_transcription_is_timed(monkeypatch, clock):
    calls = []

    def transcribe_each(model, sources, options, *, batch_size):
        calls.append([sources[i] for i in range(len(sources))])
        for index in range(len(sources)):
            clock.now += 1.0
            yield index, AudioError("bad") if index == 1 else Transcript("x", (), (), 2.0)
        clock.now += 0.5  # the end of the last chunk

    monkeypatch.setattr(transcription, "transcribe_each", transcribe_each)
    device = types.SimpleNamespace(sample_rate=100)
    samples = [Sample(str(i), "x", i.to_bytes) for i in range(3)]
    found = []
    for index, timed in transcription.transcribe(device, samples, TranscribeOptions(), batch_size=2):
        found.append((index, getattr(timed, "processing", None)))
        clock.now += 100.0  # what is done with a result
    # Two share each of the first two seconds, as there are two slots; what the failed one had, the last one takes.
    assert found == [(0, 0.5), (1, None), (2, 2.5)]
    warm_up, opened = calls
    assert [len(silence_T) for silence_T in warm_up] == [100, 100], "as many slots as there will be"
    assert opened == [b"\x00", b"\x01", b"\x02"], "opened when their turn comes"


def test_recordings_that_run_together_share_the_time_so_that_a_part_of_them_has_a_speed(monkeypatch, clock):
    def transcribe_each(model, sources, options, *, batch_size):
        opened = [sources[0], sources[1]]
        if len(sources) < 3:  # the warm-up
            return
        clock.now += 0.5
        yield 0, Transcript("x", (), (), 8.0)
        yield 1, Transcript("x", (), (), 8.0)  # ends in the same step
        opened.append(sources[2])
        clock.now += 0.5
        yield 2, Transcript("x", (), (), 8.0)

    monkeypatch.setattr(transcription, "transcribe_each", transcribe_each)
    device = types.SimpleNamespace(sample_rate=100)
    samples = [Sample(str(i), "x", i.to_bytes) for i in range(3)]
    results = transcription.transcribe(device, samples, TranscribeOptions(), batch_size=2)
    assert [timed.processing for _, timed in results] == [0.25, 0.25, 0.5]


def test_latency_is_the_audio_fed_beyond_the_word(monkeypatch, clock):
    class Scripted:
        """Tells of a word in the third frame and of its end in the fourth; of another after the audio."""

        def __init__(self, model, options):
            self.fed, self.text = [], "a b"

        def feed(self, samples):
            clock.now += 0.25
            self.fed.append(len(samples))
            word = Word("a", 0.05, 0.15, 1.0)
            return {3: [WordStarted("a", 0.05)], 4: [WordEnded(word), WordStarted("b", 0.2)]}.get(len(self.fed), [])

        def finish(self):
            clock.now += 1.0
            return [WordEnded(Word("b", 0.2, 0.3, 1.0))]

    monkeypatch.setattr(transcription, "StreamingTranscriber", Scripted)
    mimi = types.SimpleNamespace(frame_size=80)
    device = types.SimpleNamespace(sample_rate=1000, config=types.SimpleNamespace(mimi=mimi))
    samples = [Sample("x", "a b", np.full(350, 0.1, np.float32)), Sample("bad", "a", "nosuch.wav")]
    (_, timed), (_, error) = transcription.transcribe_live(device, samples, TranscribeOptions())
    # Frames of 80 ms: the third ends at 0.24 s of audio, and the fifth, of 30 ms, with the audio at 0.35 s.
    assert timed.start_latencies == (0.19, 0.12)
    assert timed.end_latencies == (0.17,)
    assert (timed.flushed, timed.text, timed.duration) == (1, "a b", 0.35)
    assert timed.processing == 5 * 0.25 + 1.0
    assert isinstance(error, AudioError)


def test_live_and_whole_give_the_same_errors_and_live_has_latencies():
    digits = [Sample(p.name, "", p) for p in sorted(EXAMPLES.glob("digits_*.flac"))]
    spoken = [json.loads(sample.audio.with_suffix(".json").read_text())["words"] for sample in digits]
    texts = [" ".join(word["text"] for word in words) for words in spoken]
    samples = [Sample(one.id, text, one.audio) for one, text in zip(digits, texts, strict=True)]
    whole = dsm_jax.evaluate(model(), samples, normalizer="basic")
    live = dsm_jax.evaluate(model(), samples, normalizer="basic", streaming=True)
    assert [row.hypothesis for row in live.files] == [row.hypothesis for row in whole.files]
    assert whole.corpus_wer == live.corpus_wer <= 0.08  # of 15 words, one is 6.7 %
    assert whole.audio_seconds == pytest.approx(sum(audio.duration(one.audio) for one in digits), abs=0.001)
    assert whole.latency is None
    late = live.latency
    words = sum(len(row.hypothesis.split()) for row in live.files)
    assert late.words + late.flushed == words
    assert late.words > words / 2
    delay = model().config.stt.audio_delay_seconds
    assert delay <= late.start_median <= delay + 0.3, "the model's delay, and a frame or three"
    assert late.start_median <= late.start_95 < 2.0
    assert late.end_median <= late.end_95 < 2.0


def test_the_command_evaluates_a_folder_and_goes_on_where_it_stopped(capsys, tmp_path):
    folder, output, plot = tmp_path / "data", tmp_path / "results.json", tmp_path / "wer.png"
    folder.mkdir()
    for path in EXAMPLES.glob("digits_*"):
        shutil.copy(path, folder)
    (folder / "broken.wav").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("one two")
    (folder / "wrong.flac").write_bytes((EXAMPLES / "digits_lucas.flac").read_bytes())
    (folder / "wrong.txt").write_text("nine nine nine nine")
    command = ["evaluate", str(folder), *DIGITS, "--output", str(output), "--plot", str(plot), "--worst", "1"]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert err.startswith("dsm-jax: broken.wav: ")
    assert len(err.splitlines()) == 1
    lines = out.splitlines()
    assert lines[0].split() == ["recording", "length", "WER", "errors"]
    assert [line.split()[0] for line in lines[1:4]] == ["digits_jackson.flac", "digits_lucas.flac", "wrong.flac"]
    assert "wrong.flac\n  reference   nine nine nine nine\n  hypothesis  two seven one" in out
    assert "\n1 recording could not be evaluated\n" in out
    values = json.loads(output.read_text(encoding="utf-8"))
    assert [row["id"] for row in values["files"]] == ["digits_jackson.flac", "digits_lucas.flac", "wrong.flac"]
    assert values["files"][2]["wer"] >= 1.0, "a reference of other words is noticed"
    assert values["failed"][0]["id"] == "broken.wav"
    assert values["real_time_factor"] == pytest.approx(values["processing_seconds"] / values["audio_seconds"])
    assert values["speed"] == pytest.approx(1 / values["real_time_factor"])
    assert plot.stat().st_size > 3000

    # Fixed and continued: recordings that were transcribed are not transcribed again.
    (folder / "broken.wav").unlink()
    (folder / "broken.txt").unlink()
    for name in ("digits_jackson.flac", "digits_lucas.flac"):
        (folder / name).write_bytes(b"nothing any more")
    assert cli.main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == lines[:4]
    rows = (tmp_path / "results.rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 3
