"""The README's code blocks, run word for word: its model names resolve to a stored miniature in a hub cache."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from dsm_jax import checkpoints
from tests.helpers import csm_model, stt_model, tts_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return a folder with the README's recordings, and an environment with its model in the hub's cache."""
    desk = tmp_path_factory.mktemp("desk")
    pcm = stt_model.recording()[:48_000]
    soundfile.write(desk / "talk.mp3", pcm, 24_000)
    soundfile.write(desk / "note.flac", pcm[10_000:], 24_000)
    shutil.copytree(ROOT / "examples/audio", desk / "examples/audio")
    shutil.copytree(ROOT / "examples/new_speaker/test", desk / "recordings")
    shutil.copytree(ROOT / "examples/new_speaker/test", desk / "examples/new_speaker/test")
    (desk / "finetune.json").write_text(*blocks(README, "json"))
    _publish(desk, "stt-1b-en_fr", stt_model.CHECKPOINT)
    (desk / "speaking").mkdir()
    # Enough pieces for the tokenizer to have one for every byte, and so for any letter.
    config = dataclasses.replace(tts_model.SPEAKERS, text_card=1000)
    checkpoints.save(tts_model.random_model(desk / "speaking", config), desk / "speaking/model")
    _publish(desk, "tts-1.6b-en_fr", desk / "speaking/model")
    voice = Path("expresso/ex03-ex01_happy_001_channel1_334s.wav")
    (desk / "voices" / voice.parent).mkdir(parents=True)
    tts_model.write_voice(desk / f"voices/{voice}.0a1b2c3d@7.safetensors", tts_model.voice(0))
    _publish(desk, "tts-voices", desk / "voices")
    tts_model.write_requests(desk, {"id": "one", "text": "Good morning.", "voice": str(voice)})
    (desk / "talking").mkdir()
    checkpoints.save(csm_model.random_model(desk / "talking"), desk / "talking/model")
    _publish(desk, "csm-1b", desk / "talking/model", "sesame")
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(desk / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return desk, environment


def _publish(desk: Path, name: str, folder: Path, organisation: str = "kyutai") -> None:
    """Put a folder into the hub's cache."""
    repository = desk / f"hub/models--{organisation}--{name}"
    shutil.copytree(folder, repository / "snapshots/0123abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abc")


def test_python_blocks_run_in_order(desk):
    folder, environment = desk
    script = "\n".join(blocks(README, "python"))
    assert script.count("\n") > 20
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shell_blocks_run_in_order(desk):
    folder, environment = desk
    commands = [block for block in blocks(README, "sh") if "make " not in block]  # CI runs make itself
    assert len(commands) >= 3
    for block in commands:
        done = subprocess.run(["bash", "-ec", block], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, block + done.stderr
    assert (folder / "subtitles/note.srt").is_file()
    assert (folder / "again.wav").is_file()
    assert (folder / "learnt/curve.png").is_file()
    assert soundfile.info(folder / "morning.wav").duration > 0.5
    assert {path.name for path in (folder / "said").iterdir()} == {"one.wav", "one.json", "one.safetensors"}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([\w-]+)", README))
    assert {"demo", "test"} <= named <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def test_a_broken_block_would_be_noticed(desk):
    folder, environment = desk
    (script,) = blocks("```python\nimport dsm_jax\ndsm_jax.nosuch\n```\n", "python")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nosuch" in done.stderr
