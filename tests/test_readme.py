"""The README's code blocks, run word for word: its model names resolve to a stored miniature in a hub cache."""

import re
import subprocess
import sys

import pytest
import soundfile

from tests.helpers.desk import ROOT, blocks, make_desk

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return a folder with the README's recordings, and an environment with its model in the hub's cache."""
    folder = tmp_path_factory.mktemp("desk")
    environment = make_desk(folder)
    (folder / "finetune.json").write_text(*blocks(README, "json"))
    return folder, environment


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
