"""Keep the tests that take long in a list, so that `make test` leaves them out and `make test-all` begins with them.

To write the list anew, run `PYTEST_ADDOPTS=--junitxml=all.xml make test-all` and `python -m tests.helpers.durations
all.xml`; then once more with the report of `make test` beside the first, as a test may have to make what a longer one
has made before.
"""

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests/durations.txt"
LONG_S = 1.0  # seconds of a test that is in the list


def read_list(path: Path = LIST) -> dict[str, float]:
    """Return the seconds of each test that takes long, by its file and name."""
    lines = [
        line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    return {name: float(seconds) for seconds, name in lines}


def name_of(item: Any) -> str:
    """Return the file and name of a collected test, as the list has them."""
    return f"{item.path.relative_to(ROOT).as_posix()}::{item.name}"


def of_files(durations: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each file's tests together."""
    total: dict[str, float] = defaultdict(float)
    for name, seconds in durations.items():
        total[name.partition("::")[0]] += seconds
    return total


def lines_of(*reports: Path) -> list[str]:
    """Return the lines of the list for reports of runs in JUnit's format, the longest first."""
    longest: dict[str, float] = defaultdict(float)
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            longest[name] = max(longest[name], float(case.get("time", 0)))
    found = [(seconds, name) for name, seconds in longest.items() if seconds > LONG_S]
    return [f"{seconds:.0f} {name}" for seconds, name in sorted(found, key=lambda one: (-one[0], one[1]))]


def missing(names: Mapping[str, float], root: Path = ROOT) -> list[str]:
    """Return the tests of the list that are not there."""

    @functools.cache
    def defined(file: str) -> set[str]:
        path = root / file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        return set(re.findall(r"^(?:async )?def (\w+)\(", source, re.MULTILINE))

    return [name for name in names if name.partition("::")[2].partition("[")[0] not in defined(name.partition("::")[0])]


if __name__ == "__main__":
    head = f"# Seconds of each test that takes more than {LONG_S:.0f} s: written by tests/helpers/durations.py."
    LIST.write_text("\n".join([head, *lines_of(*map(Path, sys.argv[1:]))]) + "\n")
