"""Turn the workers' measurements into rows: one per task and contender, and one per ratio."""

import datetime
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.benchmarks.tasks import OURS, PEERS, TASKS

Row = dict[str, Any]

_PACKAGES = ("jax", "flax", "torch", "moshi", "transformers", "rustymimi")
_FIGURES = ("p50_ms", "p99_ms", "peak_rss_mb", "others_cores")
QUIET_CORES = 0.1  # a measurement is disturbed if other programs use more cores than this


def about(threads: int) -> Row:
    """Collect the part that all rows of a run share: device, threads, date and versions of packages."""
    return {
        "device": cpu_name(_cpuinfo()),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the version of each package that takes part; None if it is not installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_name(cpuinfo: str) -> str:
    """Return the processor's name, with its family and its widest vector instructions where Linux tells them.

    Families with the same instructions differ by a factor of two in products: AMD's family 25 takes AVX-512 in two
    halves, family 26 in one go.
    """

    def field(name: str) -> str | None:
        found = re.search(rf"^{name}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        return found and found[1].strip()

    name = field("model name") or platform.processor() or platform.machine()
    family, flags = field("cpu family"), (field("flags") or "").split()
    vectors = next((title for flag, title in {"avx512f": "AVX-512", "avx2": "AVX2"}.items() if flag in flags), None)
    name = f"{name} of family {family}" if family else name
    return f"{name} with {vectors}" if vectors else name


def slug(device: str) -> str:
    """Convert a device's name to a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def contender_row(task: str, contender: str, rounds: Sequence[Mapping[str, Any]], about: Row) -> Row:
    """Make a contender's row, with the median over rounds of each figure.

    Args:
        task: of `TASKS`.
        contender: name in `PACKAGES`.
        rounds: the worker's output in each round; if any has an "error", the row has only this error.
        about: the shared part, from `about`.
    """
    head = {"task": task, "contender": contender}
    error = next((found["error"] for found in rounds if "error" in found), None)
    if error is not None:
        return head | {"error": error} | about
    figures = {name: round(statistics.median(found[name] for found in rounds), 3) for name in _FIGURES}
    return head | figures | {"rounds": len(rounds), "steps": rounds[0]["steps"]} | about


def ratio_rows(task: str, rows: Sequence[Row]) -> list[Row]:
    """Divide our figures, in float32, by the best of the peers, for time and, if it has a target, for peak memory.

    Args:
        task: of `TASKS`.
        rows: rows of any tasks.

    Returns:
        A row per measure, with "error" in place of the ratio when there is nothing to divide. A target is met only by
        figures that no other program disturbed.
    """
    by_contender = {row["contender"]: row for row in rows if row["task"] == task and "contender" in row}
    targets = {"p50_ms": TASKS[task].target, "peak_rss_mb": TASKS[task].memory_target}
    return [_ratio(task, measure, target, by_contender) for measure, target in targets.items() if target is not None]


def _ratio(task: str, measure: str, target: float, by_contender: Mapping[str, Row]) -> Row:
    head = {"task": task, "measure": measure, "target": target}
    figures = {contender: row[measure] for contender, row in by_contender.items() if measure in row}
    ours = figures.get(OURS)
    peers = {contender: figure for contender, figure in figures.items() if contender in PEERS}
    if ours is None or not peers:
        return head | {"error": f"no figure of {OURS if ours is None else 'any peer'}, so no ratio"}
    best = min(peers, key=peers.__getitem__)
    ratio = round(ours / peers[best], 3)
    disturbed = any(by_contender[contender]["others_cores"] > QUIET_CORES for contender in (OURS, best))
    return head | {"ratio": ratio, "best_peer": best, "disturbed": disturbed, "met": ratio <= target and not disturbed}
