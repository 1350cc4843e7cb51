"""The command line, as a user meets it."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

import dsm_jax
from dsm_jax import audio, cli, files
from tests.helpers import stt_model

MODEL = ["--model", str(stt_model.CHECKPOINT), "--no-cache"]
CLIP = str(stt_model.RECORDING)


@pytest.fixture(scope="module")
def result():
    return dsm_jax.transcribe(stt_model.model(), CLIP, frames=True)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.mark.parametrize("command", [[], ["transcribe"], ["codec", "encode"], ["convert"], ["train"], ["bench"]])
def test_help_is_instant(command):
    code = f"""
import sys
from dsm_jax import cli
try:
    cli.main({[*command, "--help"]!r})
except SystemExit as stop:
    assert stop.code == 0
print(sorted({{"jax", "numpy", "torch", "flax", "rich"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: dsm-jax")
    assert done.stdout.endswith("[]\n"), "help must not import what it does not need"


@pytest.mark.slow
def test_text(capsys, result):
    assert run(capsys, "transcribe", CLIP, *MODEL) == (0, result.text + "\n", "")


@pytest.mark.slow
def test_json_has_what_was_promised(capsys, result):
    code, out, _ = run(capsys, "transcribe", CLIP, *MODEL, "--format", "json", "--frames")
    read = json.loads(out)
    assert code == 0
    assert list(read) == ["audio", "model", "duration", "text", "words", "segments", "pauses", "frames"]
    assert read["audio"] == CLIP
    assert read["frames"]["text_tokens"] == list(result.frames.text_tokens)
    assert len(read["frames"]["pause_probabilities"]) == len(result.frames.text_tokens)
    assert set(read["words"][0]) == {"text", "start", "end", "probability"}


@pytest.mark.slow
def test_files_into_a_folder_with_one_bad_among_them(capsys, tmp_path, result):
    shutil.copy(CLIP, tmp_path / "good.flac")
    (tmp_path / "bad.flac").write_bytes(b"nothing")
    code, out, err = run(
        capsys, "transcribe", tmp_path / "*.flac", *MODEL, "--output-dir", tmp_path / "out", "--format", "srt"
    )
    assert code == 1
    assert out == ""
    assert err.startswith("dsm-jax: ")
    assert "bad.flac" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.srt"]
    assert result.words[0].text in (tmp_path / "out/good.srt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_several_files_are_printed_in_order_by_name(capsys, tmp_path, result):
    short = tmp_path / "short.wav"
    audio.write(short, stt_model.recording()[:30_000], 24_000)
    code, out, _ = run(capsys, "transcribe", CLIP, short, *MODEL)
    assert code == 0
    assert [line.split(": ")[0] for line in out.splitlines()] == [CLIP, str(short)]
    assert out.splitlines()[0] == f"{CLIP}: {result.text}"
    code, out, _ = run(capsys, "transcribe", short, CLIP, *MODEL, "--format", "json")
    assert [json.loads(line)["audio"] for line in out.splitlines()] == [str(short), CLIP]


@pytest.mark.slow
def test_standard_input(result):
    command = [sys.executable, "-m", "dsm_jax", "transcribe", "-", *MODEL]
    done = subprocess.run(command, input=stt_model.RECORDING.read_bytes(), capture_output=True, check=True)
    assert done.stdout.decode() == result.text + "\n"


@pytest.mark.slow
def test_vad_marks_pauses(capsys, result):
    assert result.pauses
    code, out, _ = run(capsys, "transcribe", CLIP, *MODEL, "--vad")
    assert code == 0
    assert out.count("[pause]") == len(result.pauses)
    assert [word for word in out.split() if word != "[pause]"] == [w.text for w in result.words]


@pytest.mark.slow
def test_prompts(capsys, tmp_path, result):
    prompt = tmp_path / "prompt.wav"
    audio.write(prompt, stt_model.recording()[:48_000], 24_000)
    given = ["--prompt-text", "the fox", "--prompt-audio", prompt]
    code, out, _ = run(capsys, "transcribe", CLIP, *MODEL, *given)
    assert code == 0
    assert out.startswith("the fox") or out.startswith("thefox")
    code, cut, _ = run(capsys, "transcribe", CLIP, *MODEL, *given, "--exclude-prompt")
    assert code == 0
    assert cut
    assert out.replace(" ", "").endswith(cut.replace(" ", ""))
    assert len(cut) < len(out) - len("the fox")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames"], "--frames is part of the JSON, and --format is text"),
        (["--exclude-prompt"], "--exclude-prompt has nothing to exclude"),
        ([CLIP, "--format", "srt"], "2 recordings as srt need a file each; add --output-dir"),
        (["nothing*.wav"], r"nothing\*.wav matches no file"),
        (["-", "-"], "standard input"),
        ([CLIP, "--output-dir", "out"], "several recordings would be written to librispeech"),
        (
            [f"{stt_model.RECORDING.stem}.json", "--output-dir", "out"],
            r"librispeech.*\.json is no recording; leave",
        ),
        (["--vad", "--format", "srt"], "--vad marks pauses in text, and --format is srt"),
        (["--output-dir", CLIP], "cannot be made"),
        (["--prompt-text", "語"], "cannot spell"),
        (["--temperature", "-1"], "temperature is -1.0; expected a number from 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--seed", "9" * 20], "expected a number of 64 bits"),
        (["--mic"], "--mic takes the microphone, and recordings were given too"),
        (["--input-device", "usb"], "--input-device names a microphone; add --mic"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "transcribe", CLIP, *arguments, *MODEL)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err


@pytest.mark.slow
@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there(device):
    command = [sys.executable, "-m", "dsm_jax", "transcribe", CLIP, *MODEL, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--device {device} is not available here" in done.stderr.splitlines()[-1]
    assert "try --device cpu" in done.stderr


MISTAKES = {
    "no command": ("", "arguments are required: COMMAND; dsm-jax --help lists"),
    "a misspelt command": ("transcrib x.wav", "invalid choice: 'transcrib'"),
    "an option before the command": ("--model digits transcribe x.wav", "--model comes before the command"),
    "an option between commands": ("codec --model digits encode x.wav y", "--model comes before the command"),
    "an option of another command": (
        "transcribe x.wav --voice theo",
        "no option --voice; it is an option of dsm-jax speak",
    ),
    "a misspelt option": ("transcribe x.wav --modle digits", r"has no option --modle; did you mean --model\?"),
    "a text without quotes": ("speak seven four out.wav", "out.wav is one argument too many for dsm-jax speak; put"),
    "a model without its option": (
        "serve digits",
        "digits is one argument too many for dsm-jax serve; it takes options alone",
    ),
    "one folder for two": ("convert digits", "arguments are required: destination; dsm-jax convert --help"),
    "no number": ("transcribe x.wav --batch-size few", "argument --batch-size: 'few' is no whole number above 0"),
    "no number of a speaker": ("speak no x.wav --speaker ann", "argument --speaker: 'ann' is no whole number; dsm"),
    "no temperature": ("transcribe x.wav --temperature warm", "argument --temperature: 'warm' is no number; dsm-jax"),
    "no address": ("bench serve", "arguments are required: --url; dsm-jax bench serve --help lists"),
    "a missing recording": ("transcribe lost.wav", "lost.wav does not exist; check the path"),
    "a name with an emoji's code": ("transcribe lost:smile:.wav", "lost:smile:.wav does not exist"),
    "missing recordings": ("transcribe a.wav talks", "none of the 2 recordings can be opened: a.wav does not exist"),
    "a folder of recordings": ("transcribe talks", "talks is a folder; name the files in it"),
    "a missing prompt": ("transcribe here.wav --prompt-audio lost.wav", "lost.wav does not exist"),
    "nothing to encode": ("codec encode lost.wav codes.safetensors", "lost.wav does not exist"),
    "codes over a recording": ("codec encode here.wav other.wav", "other.wav is named like a recording"),
    "nothing to decode": ("codec decode lost.safetensors out.wav", "lost.safetensors is not a file; give a safetens"),
    "a recording to decode": ("codec decode here.wav out.wav", "here.wav is not a safetensors file"),
    "decoding in the wrong order": (
        "codec decode out.wav codes.safetensors",
        "codes.safetensors is no recording's name",
    ),
    "a misspelt model": (
        "transcribe here.wav --model digit --no-cache",
        r"digit is no file .*; did you mean digits\?",
    ),
    "a conversion in the wrong order": ("convert out digits --no-cache", "out is no file or folder"),
    "missing settings": ("train lost.json --no-cache", "lost.json cannot be read"),
    "a folder of settings": ("train talks --no-cache", "talks cannot be read .*; give a JSON file"),
    "missing training data": ("train train.json --no-cache", "lost.jsonl does not exist; give a JSON Lines file"),
    "missing data": ("evaluate lost", "lost is no folder, no file, and no data set; give one of them"),
    "missing results": ("evaluate --compare a.json b.json", "a.json cannot be read .*; give what --output wrote"),
    "a missing text": ("speak lost.txt out.wav --no-cache", "lost.txt cannot be read"),
    "no sound's name": ("speak seven out.txt --no-cache", "out.txt cannot be written: it does not end in .wav"),
    "what cannot be timed": ("bench digits --no-cache", "digits cannot be timed; choose of lm, mimi, stt, tts, csm"),
    "a size of none": (
        "bench tts csm --size stt-2.6b csm-1b --no-cache",
        "stt-2.6b is not a size of tts or csm; add stt",
    ),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_a_line_before_a_model_is_loaded(capsys, tmp_path, monkeypatch, line, message):
    (tmp_path / "talks").mkdir()
    (tmp_path / "here.wav").write_bytes(b"RIFF" + bytes(40))
    settings = {"task": "finetune", "data": "lost.jsonl", "output": "run", "run": {"steps": 1}}
    (tmp_path / "train.json").write_text(json.dumps(settings))
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsm_jax.checkpoints.open_checkpoint", None)
    try:
        code = cli.main(line.split())
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert re.fullmatch(f"dsm-jax: .*{message}.*\n", err), err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "command", ["transcribe a.wav b.wav --server", "speak one a.wav --server", "bench serve --url"]
)
def test_an_empty_address_of_a_server_is_refused_once_and_stands_for_no_model_here(capsys, monkeypatch, command):
    monkeypatch.setattr("dsm_jax.checkpoints.open_checkpoint", None)
    said = "dsm-jax: the address of the server is empty; give one such as http://127.0.0.1:8080\n"
    assert run(capsys, *command.split(), "") == (2, "", said)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("transcribe here.wav", "nothing can be printed; open it, or name a folder with --output-dir"),
        ("speak one -", "the sound has no place; open it, or name a file"),
    ],
)
def test_a_closed_standard_output_is_told_of_before_a_model_is_loaded(capsys, tmp_path, monkeypatch, line, message):
    (tmp_path / "here.wav").write_bytes(b"RIFF" + bytes(40))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsm_jax.checkpoints.open_checkpoint", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main([*line.split(), "--no-cache"]) == 2
    assert capsys.readouterr().err == f"dsm-jax: standard output is closed, so {message}\n"


def test_a_model_that_cannot_be_read(capsys, tmp_path):
    code, out, err = run(capsys, "transcribe", CLIP, "--model", tmp_path / "nowhere", "--no-cache")
    assert (code, out) == (2, "")
    assert "nowhere" in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_codec_there_and_back(capsys, tmp_path):
    codes, sound = tmp_path / "codes.safetensors", tmp_path / "again.wav"
    assert run(capsys, "codec", "encode", CLIP, codes, *MODEL)[0] == 0
    whole = load_file(codes)["codes"]
    expected = stt_model.expected()["codes_QT"]
    np.testing.assert_array_equal(whole[:, :-1], expected[:, : whole.shape[1] - 1])
    assert run(capsys, "codec", "encode", CLIP, codes, *MODEL, "--codebooks", "3")[0] == 0
    np.testing.assert_array_equal(load_file(codes)["codes"], whole[:3])
    assert run(capsys, "codec", "decode", codes, sound, *MODEL)[0] == 0
    assert audio.read(sound).size == whole.shape[1] * 1_920


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"codes": np.zeros((9, 4), np.int32)}, r"codes are int32 \[9, 4\]"),
        ({"codes": np.full((2, 4), 128, np.int32)}, "codes go from 128 to 128"),
        ({"other": np.zeros((2, 4), np.int32)}, "expected a tensor called 'codes'"),
    ],
)
def test_codes_that_the_codec_cannot_have_made(capsys, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "codes.safetensors")
    code, _, err = run(capsys, "codec", "decode", tmp_path / "codes.safetensors", tmp_path / "x.wav", *MODEL)
    assert code == 2
    assert re.search(message, err), err


@pytest.mark.slow
def test_convert(capsys, tmp_path, result):
    code, out, _ = run(capsys, "convert", stt_model.CHECKPOINT, tmp_path / "native", "--no-cache")
    assert code == 0
    assert "emb.0.weight" not in out
    assert re.search(r"read \d+ tensors into \d+ parameters", out)
    _, out, _ = run(capsys, "convert", stt_model.CHECKPOINT, tmp_path / "again", "--verbose", "--no-cache")
    assert "emb.0.weight" in out
    code, out, _ = run(capsys, "transcribe", CLIP, "--model", tmp_path / "native", "--no-cache")
    assert out == result.text + "\n"
    code, _, err = run(capsys, "convert", stt_model.CHECKPOINT, tmp_path / "native", "--no-cache")
    assert code == 2
    assert "native" in err


@pytest.mark.slow
def test_programs_are_cached_unless_the_cache_is_off(tmp_path):
    command = [sys.executable, "-m", "dsm_jax", "codec", "encode", CLIP, str(tmp_path / "c.safetensors")]
    command += ["--model", str(stt_model.CHECKPOINT)]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home")}
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert any((tmp_path / "home/dsm_jax/compiled").iterdir())
    subprocess.run([*command, "--compile-cache", str(tmp_path / "mine")], env=env, check=True, capture_output=True)
    assert any((tmp_path / "mine").iterdir())
    shutil.rmtree(tmp_path / "home")
    subprocess.run([*command, "--no-cache"], env=env, check=True, capture_output=True)
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_file_that_fails_midway_costs_only_itself(capsys, tmp_path, result):
    pcm = np.tile(stt_model.recording(), 4)
    pcm[-9] = np.nan
    soundfile.write(tmp_path / "bad.wav", pcm, 24_000, subtype="FLOAT")
    code, out, err = run(capsys, "transcribe", tmp_path / "bad.wav", CLIP, *MODEL)
    assert code == 1
    assert out == f"{CLIP}: {result.text}\n"
    assert "bad.wav holds NaN" in err


@pytest.mark.slow
def test_a_file_that_was_cut_short_is_transcribed_with_a_warning(capsys, tmp_path):
    path = tmp_path / "cut.flac"
    path.write_bytes(stt_model.RECORDING.read_bytes()[:-7])
    code, out, err = run(capsys, "transcribe", path, *MODEL)
    assert code == 0
    assert out.strip()
    assert re.fullmatch(r"dsm-jax: .*cut\.flac lacks 0\.\d s of its 5\.9 s: .*; the rest is used\n", err), err
    assert run(capsys, "transcribe", path, *MODEL, "--quiet") == (0, out, "")


@pytest.mark.slow
def test_jsonl_has_a_line_for_each_event_and_the_end(capsys, result):
    code, out, _ = run(capsys, "transcribe", CLIP, *MODEL, "--format", "jsonl")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["text"] for line in lines if line["type"] == "word"] == [word.text for word in result.words]
    assert [line["time"] for line in lines if line["type"] == "pause"] == [round(p.time, 3) for p in result.pauses]
    assert lines[-1] == {"audio": CLIP, "type": "end", "duration": round(result.duration, 3), "text": result.text}
    assert {line["audio"] for line in lines} == {CLIP}


@pytest.mark.slow
def test_a_name_that_is_not_utf8_costs_nothing(capfd, tmp_path, result):
    path = os.fsencode(tmp_path) + b"/caf\xe9.flac"
    shutil.copy(CLIP, path)
    assert cli.main(["transcribe", os.fsdecode(path), CLIP, *MODEL]) == 0
    assert capfd.readouterr().out.count(result.text) == 2
    assert cli.main(["transcribe", os.fsdecode(path), *MODEL, "--format", "json", "--output-dir", str(tmp_path)]) == 0
    (made,) = tmp_path.glob("*.json")
    assert json.loads(made.read_text(encoding="utf-8"))["text"] == result.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "code", "message"),
    [
        ("{command} {clip} > /dev/full", 1, "standard output cannot be written (No space left on device)"),
        ("{command} - <&-", 1, "standard input"),
        ("PYTHONIOENCODING=ascii {command} {clip}", 0, None),
    ],
)
def test_odd_standard_streams_are_one_line_at_most(shell, code, message):
    command = shlex.join([sys.executable, "-m", "dsm_jax", "transcribe", *MODEL])
    script = shell.format(command=command, clip=shlex.quote(CLIP))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (1 if message else 0), done.stderr
    assert message is None or message in done.stderr


@pytest.mark.slow
def test_one_interrupt_ends_the_command():
    command = [sys.executable, "-m", "dsm_jax", "transcribe", *[CLIP] * 40, *MODEL, "--batch-size", "1"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=20) == 130
    running.communicate()


LONG_CALLS = {
    "a library that takes minutes": "say('started'); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "a callback that drops errors": "gc.callbacks.append(lambda *_: (say('started'), time.sleep(60))); gc.collect()",
}


@pytest.mark.slow
@pytest.mark.parametrize("call", LONG_CALLS.values(), ids=LONG_CALLS)
def test_an_interrupt_ends_the_command_though_python_raises_nothing(call):
    script = "import functools, gc, hashlib, time\nfrom dsm_jax.cli import terminal\n"
    script += f"say = functools.partial(print, flush=True)\nwith terminal.ended_by_one_interrupt():\n    {call}"
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    running = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    running.stdout.readline()
    time.sleep(0.5)  # until the call has begun
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert (running.returncode, err) == (130, "")


@pytest.mark.slow
def test_an_interrupted_compilation_does_not_crash(tmp_path):
    command = [sys.executable, "-m", "dsm_jax", "transcribe", CLIP, "--model", "digits", "--verbose"]
    command += ["--compile-cache", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "loaded" not in running.stderr.readline():
        pass
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "Traceback" not in err


@pytest.mark.slow
def test_damaged_entries_of_the_compile_cache_are_replaced(tmp_path):
    command = [sys.executable, "-m", "dsm_jax", "codec", "encode", CLIP, str(tmp_path / "c.safetensors")]
    command += ["--model", str(stt_model.CHECKPOINT), "--compile-cache", str(tmp_path / "cache")]
    subprocess.run(command, check=True, capture_output=True)
    entries = list((tmp_path / "cache").glob("*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
    second = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "damaged entries of the compile cache" in second.stderr
    assert "Error reading persistent" not in second.stderr
    assert all(entry.stat().st_size > 100 for entry in entries)
    third = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "compile cache" not in third.stderr


@pytest.mark.slow
def test_a_file_that_cannot_be_written_costs_only_itself(capsys, tmp_path):
    short = tmp_path / "short.wav"
    audio.write(short, stt_model.recording()[:30_000], 24_000)
    (tmp_path / "out/short.txt").mkdir(parents=True)
    code, _, err = run(capsys, "transcribe", short, CLIP, *MODEL, "--output-dir", tmp_path / "out")
    assert code == 1
    assert "short.txt cannot be written" in err
    assert (tmp_path / f"out/{stt_model.RECORDING.stem}.txt").is_file()


def test_results_without_a_place_are_refused_before_the_work(capsys, tmp_path):
    nowhere = tmp_path / "nowhere"
    for command in (
        ["codec", "encode", CLIP, nowhere / "c.safetensors", *MODEL],
        ["codec", "decode", CLIP, nowhere / "x.wav", *MODEL],
        ["convert", stt_model.CHECKPOINT, tmp_path / "made", "--report", nowhere / "r.json", "--no-cache"],
    ):
        code, _, err = run(capsys, *command)
        assert code == 2
        assert f"there is no folder {nowhere}" in err
    code, _, err = run(capsys, "convert", stt_model.CHECKPOINT, tmp_path / "made", "--report", tmp_path, "--no-cache")
    assert code == 2
    assert f"{tmp_path} is a folder; name a file in it" in err
    assert not (tmp_path / "made").exists()


def test_a_report_that_cannot_be_written_is_refused_in_a_sentence(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "r.json")

    monkeypatch.setattr(files, "write_text", full)
    report = tmp_path / "r.json"
    code, _, err = run(capsys, "convert", stt_model.CHECKPOINT, tmp_path / "made", "--report", report, "--no-cache")
    assert code == 2
    assert f"made is written, and {report} cannot be (No space left on device); choose another place" in err
    assert (tmp_path / "made" / "dsm_jax.json").is_file()


def test_bench_prints_a_row_per_measurement(capsys, monkeypatch):
    asked = []

    def measure(what, **settings):
        asked.append((what, settings))
        yield {"bench": "none"}

    monkeypatch.setattr("dsm_jax.benchmark.run.run", measure)
    assert run(capsys, "bench", "--no-cache") == (0, '{"bench": "none"}\n', "")
    assert run(capsys, "bench", "stt", "--size", "stt-2.6b", "--batch", "4", "--no-cache")[0] == 0
    assert [what for what, _ in asked] == [["lm", "mimi"], ["stt"]]
    assert asked[1][1] == {"sizes": ["stt-2.6b"], "batches": [4], "dtype": None, "quantize": None, "steps": 20}


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-m", "dsm_jax", "transcribe", CLIP, *MODEL]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    assert (running.wait(), running.stderr.read()) == (0, b"")
    running.stderr.close()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dsm-jax {dsm_jax.__version__}\n"
