"""Markers: each is registered, and the targets of the Makefile select by them."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
OF_PYTEST = {"parametrize", "skipif", "usefixtures"}
ONE_OF_EACH = """
import pytest

def test_plain(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.gpu
def test_gpu(): pass

@pytest.mark.browser
def test_browser(): pass

@pytest.mark.long
def test_long(): pass

@pytest.mark.slow
@pytest.mark.gpu
def test_both(): pass
"""


def markers(source: str) -> set[str]:
    """Return the markers that a test module uses."""
    return set(re.findall(r"\bpytest\.mark\.(\w+)", source)) - OF_PYTEST


def test_every_marker_is_registered():
    registered = {line.partition(":")[0] for line in PYTEST["markers"]}
    paths = [path for folder in PYTEST["testpaths"] for path in (ROOT / folder).rglob("*.py")]
    used = {path.name: markers(path.read_text(encoding="utf-8")) for path in paths if path != Path(__file__)}
    assert {name: found - registered for name, found in used.items() if found - registered} == {}
    assert "slow" in set().union(*used.values()) <= registered == {"slow", "long", "gpu", "browser"}
    assert "--strict-markers" in PYTEST["addopts"]


def test_a_marker_that_is_not_registered_is_found():
    assert markers("@pytest.mark.parametrize('a', [1])\n@pytest.mark.slwo\ndef test(): pass") == {"slwo"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "selected"),
    [
        ("test-fast", ["plain"]),
        ("test", ["plain", "slow"]),
        ("test-all", ["plain", "slow", "long"]),
        ("test-page", ["browser"]),
    ],
)
def test_the_targets_select_by_the_markers(tmp_path, target, selected):
    asked = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in asked.splitlines() if "-m pytest" in line]
    words = shlex.split(line)
    chosen = words[words.index("pytest") :]
    (tmp_path / "test_all.py").write_text(ONE_OF_EACH)
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider", "--collect-only", "-q"]
    command = [sys.executable, "-m", "pytest", *options, "-m", chosen[chosen.index("-m") + 1], tmp_path]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"::test_(\w+)", found) == selected, found
