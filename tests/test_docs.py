"""The pages' code blocks, run word for word, as `test_readme` does with the README's."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import soundfile

from dsm_jax.cli.parser import parser
from tests.helpers.desk import ROOT, VOICE, blocks, make_desk
from tests.helpers.serving import running, served

pytestmark = pytest.mark.slow
ADDRESS = "127.0.0.1:8080"  # of the pages


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return a folder with the pages' recordings, and an environment with their models in the hub's cache."""
    folder = tmp_path_factory.mktemp("desk")
    return folder, make_desk(folder)


def run(desk, *command: str, **environment: str) -> subprocess.CompletedProcess:
    folder, found = desk
    done = subprocess.run(command, cwd=folder, env={**found, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_clients_of_a_server_do_what_the_page_says(desk):
    text = page("serving.md")
    (commands,) = [block for block in blocks(text, "sh") if "--server" in block]
    script = "\n".join(blocks(text, "python"))
    models = served("stt", "digits"), served("tts", "digits-tts", slots=2)
    with running(*models, page=False) as server:
        assert commands.count(ADDRESS) >= 3 < script.count(ADDRESS)
        done = run(
            desk,
            "bash",
            "-ec",
            commands.replace("--streams 8", "--streams 2 --seconds 2").replace(ADDRESS, server.address),
        )
        assert " --> " in done.stdout
        assert soundfile.info(desk[0] / "said.wav").duration > 0.5
        (desk[0] / "said.wav").unlink()
        printed = run(desk, sys.executable, "-c", script.replace(ADDRESS, server.address)).stdout
        assert "[TranscriptionWord(" in printed  # of OpenAI's package
        assert "(Word(" in printed
        for name in ("said.wav", "speech.wav"):
            assert soundfile.info(desk[0] / name).duration > 0.5


def test_a_server_starts_from_the_pages_file(desk):
    folder, _ = desk
    (settings,) = blocks(page("serving.md"), "toml")
    (folder / "server.toml").write_text(re.sub("slots = .*", "slots = 2", settings))  # --check asks for more speed
    (folder / "voices").mkdir()
    shutil.copy(next(folder.glob(f"hub-voices/{VOICE}.*")), folder / "voices")
    done = run(desk, "dsm-jax", "serve", "--config", "server.toml", "--check", DSM_KEY="secret")
    assert {"kyutai/stt-1b-en_fr", "kyutai/tts-1.6b-en_fr"} <= set(re.findall(r"kyutai/[\w.-]+", done.stdout))


@pytest.fixture(scope="module")
def talk(desk):
    """Write the files that the page on conversations names; return lines that make the values that it names."""
    folder, _ = desk
    for name in ("first.wav", "hello.wav", "fine.wav"):
        pcm_T, rate = soundfile.read(ROOT / "examples/audio/digits_jackson.flac", stop=4_000)
        soundfile.write(folder / name, pcm_T, rate)  # short enough for the miniature
    turn = {"text": "I was there last week.", "speaker": 0, "audio": "first.wav"}
    (folder / "talk.jsonl").write_text(json.dumps(turn) + "\n")
    said = [{"type": "text", "text": turn["text"]}, {"type": "audio", "path": turn["audio"]}]
    answer = [{"type": "text", "text": "And what did you say?"}]
    chat = [{"role": "0", "content": said}, {"role": "1", "content": answer}]
    (folder / "conversation.json").write_text(json.dumps(chat))
    request = {"id": "one", "text": "And what did you say?", "speaker": 1, "context": [turn]}
    (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
    (literal,) = re.findall(r"^conversation = \[\n.*?^\]\n", page("conversational-speech.md"), re.MULTILINE | re.DOTALL)
    return (
        'from dsm_jax import audio\ntext, array = "I was there last week.", audio.read("first.wav")\n'
        f"{literal}conversation_a = conversation_b = conversation\n"
    )


def test_conversations_run_as_the_page_says(desk, talk):
    folder, _ = desk
    ours = [block for block in blocks(page("conversational-speech.md"), "python") if _is_ours(block)]
    assert len(ours) == 4
    run(desk, sys.executable, "-c", talk + "\n".join(ours))
    for name in ("example_without_context", "speech_batch_idx_0", "speech_batch_idx_1"):
        assert soundfile.info(folder / f"{name}.wav").duration > 0


def test_conversations_are_trained_on_as_the_page_says(desk, talk):
    folder, _ = desk
    text = page("training.md")
    for name in "abc":
        shutil.copy(folder / "first.wav", folder / f"{name}.wav")
    lines = blocks(text, "jsonl")
    assert len(lines) == 2
    (folder / "talks.jsonl").write_text("".join(lines))
    (settings,) = blocks(text, "json")
    assert '"steps": 500' in settings
    (folder / "talks.json").write_text(settings.replace('"steps": 500', '"steps": 2'))
    run(desk, "dsm-jax", "train", "talks.json")
    assert (folder / "learnt/model/config.json").is_file()


def test_recordings_are_evaluated_and_compared_as_the_page_says(desk, monkeypatch, capsys):
    folder, _ = desk
    text = page("evaluation.md")
    (block,) = [block for block in blocks(text, "sh") if "--compare" in block]
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("dsm-jax")]
    assert [parser().parse_args(words[1:]).command for words in commands] == ["evaluate"] * 3
    (script,) = blocks(text, "python")
    evaluating, compare, files = script.partition("print(evaluation.compare(")
    assert compare
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(evaluating, names)  # here, as another process would trace the programs again; README's test runs the command
    shutil.copy("results.json", "before.json")
    exec(compare + files, names)
    printed = capsys.readouterr().out
    assert "slt_12" in printed  # the worst one of the page
    assert "corpus WER, B - A" in printed


def _is_ours(block: str) -> bool:
    """Return whether an example is of this library, and needs no package that the tests do not install."""
    return not block.startswith("# transformers") and "silentcipher" not in block


def test_the_commands_of_conversations_run(desk, talk):
    folder, _ = desk
    (commands,) = blocks(page("conversational-speech.md"), "sh")
    run(desk, "bash", "-ec", commands)
    assert soundfile.info(folder / "answer.wav").duration > 0
    assert {path.suffix for path in (folder / "said").iterdir()} >= {".wav", ".safetensors"}
