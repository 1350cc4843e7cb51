"""Write stored results into the README: `python -m tests.benchmarks.table tests/benchmarks/results/FILE.jsonl...`.

The table is between two markers and names its source files, so that a test can make it again.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.rows import QUIET_CORES, Row
from tests.benchmarks.tasks import INT8, OURS, PACKAGES, TASKS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("tests", "benchmarks", "results")
BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
_SOURCE = re.compile(r"\[rows\]\(([^)]+)\)")
_MISSING = "–"
# The timed steps on a GPU: the end of their title, and the peer.
_GPU_STEPS = {
    "stt_step": ("", "moshi"),
    "serve": (" served", ""),
    "tts_frame": ("", "moshi"),
    "csm_prefill": (", a prompt of 64", "transformers"),
    "csm_frame": ("", "transformers"),
}
_TITLES = {OURS: "dsm_jax", INT8: "with int8 layers"}


def read(path: Path) -> list[Row]:
    """Read the rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def block(paths: Sequence[str], root: Path = ROOT) -> str:
    """Make the text between the markers.

    Args:
        paths: results files, relative to `root`.
        root: the repository's root.

    Raises:
        ValueError: if a file holds no measurements, or some of miniature models.
    """
    parts = []
    for path in paths:
        rows = read(root / path)
        if not rows or any(row.get("tiny") for row in rows):
            raise ValueError(
                f"{path} holds {len(rows)} rows, some of them of miniature models or none; give a full run"
            )
        table = cpu_table(rows) if any("task" in row for row in rows) else gpu_table(rows)
        parts.append(f"{table}\n\n{_caption(rows)} [rows]({path})")
    return "\n\n".join(parts)


def cpu_table(rows: Sequence[Row]) -> str:
    """Make a line per task: milliseconds of every contender, and our ratio to the best of the others with its target.

    The last row of a task and contender counts, as running a task again appends to the file.
    """
    figures = {(row["task"], row["contender"]): row for row in rows if "contender" in row}
    ratios = {(row["task"], row["measure"]): row for row in rows if "measure" in row}
    lines = [_line("median ms (99 %)", *(_TITLES.get(c, c) for c in PACKAGES), "ratio", "target")]
    lines.append("|---" + "|--:" * (len(PACKAGES) + 2) + "|")
    for task in TASKS:
        cells = [figures.get((task, contender), {}) for contender in PACKAGES]
        if any(cells):
            times = (f"{_ms(row['p50_ms'])} ({_ms(row['p99_ms'])})" if "p50_ms" in row else _MISSING for row in cells)
            lines.append(_line(f"`{task}`", *times, *_ratio_cells(ratios.get((task, "p50_ms")))))
        if any(cells) and TASKS[task].memory_target is not None:
            peaks = (f"{row['peak_rss_mb']:.0f}" if "peak_rss_mb" in row else _MISSING for row in cells)
            lines.append(_line(f"`{task}`, peak MB", *peaks, *_ratio_cells(ratios.get((task, "peak_rss_mb")))))
    failed = [row for row in figures.values() if "error" in row]
    notes = [f"{row['task']}: {row['contender']}: {row['error']}" for row in failed]
    busy = [row["task"] for row in figures.values() if row.get("others_cores", 0) > QUIET_CORES]
    if busy:
        notes.append(f"other programs were running during {', '.join(dict.fromkeys(busy))}")
    return _with_notes(lines, notes)


def gpu_table(rows: Sequence[Row]) -> str:
    """Make a line per step and number of streams: the time of ours and of the peer, and ours over the lower bound."""
    steps = [row for row in rows if row.get("bench") in _GPU_STEPS and "p50_ms" in row]
    cases = sorted({(row["size"], list(_GPU_STEPS).index(row["bench"]), row["batch"]) for row in steps})
    found = {(row["size"], row["bench"], row["batch"], row["who"]): row for row in steps}
    head = "model, streams", "dsm_jax, median ms (99 %)", "peer", "ratio", "keeps up", "share of the bandwidth limit"
    lines = [_line(*head), "|---|--:|--:|--:|--:|--:|"]
    for size, place, batch in cases:
        bench, (title, who) = list(_GPU_STEPS.items())[place]
        ours, peer = found.get((size, bench, batch, OURS), {}), found.get((size, bench, batch, who), {})
        times = (f"{_ms(row['p50_ms'])} ({_ms(row['p99_ms'])})" if row else _MISSING for row in (ours, peer))
        ratio = f"**{ours['p50_ms'] / peer['p50_ms']:.2f}** of {who}" if ours and peer else _MISSING
        has_sound = ours and "prefill" not in bench
        keeps_up = ("yes" if ours["streams"] else "no") if has_sound else _MISSING
        share = f"{100 * ours['share_of_limit']:.0f} %" if "share_of_limit" in ours else _MISSING
        lines.append(_line(f"{size}{title}, {batch}", *times, ratio, keeps_up, share))
    return _with_notes(lines, ["A dash marks what was not measured."] if any("error" in row for row in rows) else [])


def rewrite(text: str, content: str) -> str:
    """Replace the text between the markers.

    Raises:
        ValueError: the text does not have each marker once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"found {text.count(BEGIN)} {BEGIN} and {text.count(END)} {END}, expected one of each: add them"
        )
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def is_current(text: str, root: Path = ROOT) -> bool:
    """Return whether the table in a text matches the files that it names.

    A text without markers has no table to check; while no results are stored, the table may be empty.
    """
    if BEGIN not in text:
        return True
    shown = text.partition(BEGIN)[2].partition(END)[0]
    if not shown.strip():
        return not any((root / RESULTS).glob("*.jsonl"))
    return rewrite(text, block(_SOURCE.findall(shown), root)) == text


def _with_notes(lines: Sequence[str], notes: Sequence[str]) -> str:
    return "\n\n".join(["\n".join(lines), *notes])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio_cells(row: Row | None) -> tuple[str, str]:
    if row is None or "ratio" not in row:
        return _MISSING, f"{row['target']:.2f}" if row else _MISSING
    return f"**{row['ratio']:.2f}** of {row['best_peer']}", f"{row['target']:.2f}"


def _caption(rows: Sequence[Row]) -> str:
    first = next(row for row in rows if "versions" in row)
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    threads = f", {first['threads']} threads, float32" if "threads" in first else ""
    return f"{first['device']}{threads}, {first['date']}; {versions}; compilation and warm-up not counted;"


def main(paths: Sequence[str]) -> None:
    """Rewrite the README's table."""
    if not paths:
        sys.exit("give the results files to make the table from, as in tests/benchmarks/results/cpu.jsonl")
    readme = ROOT / "README.md"
    try:
        relative = [Path(path).resolve().relative_to(ROOT).as_posix() for path in paths]
        readme.write_text(rewrite(readme.read_text(), block(relative)))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
