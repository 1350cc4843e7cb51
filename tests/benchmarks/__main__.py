"""Time the library against the reference packages, in one run on this machine: `python -m tests.benchmarks`.

Each measurement runs in its own process, and contenders take turns, so that other load slows all of them alike. Torch
suffers more than others, as its threads wait for each other at every operation; so each row has the number of cores
that other programs used meanwhile, and only rows near zero are worth keeping. Rows go to standard output and, as JSON
lines, to a file that `tests.benchmarks.table` reads.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tests.benchmarks import rows
from tests.benchmarks.table import RESULTS, ROOT
from tests.benchmarks.tasks import PACKAGES, PEERS, TASKS, missing

_LAST_LINES = 20  # lines of a failed worker's output to print


def environment(threads: int) -> dict[str, str]:
    """Make a worker's environment: number of threads, CPU only, no network, no compiler for the reference."""
    count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    switches = dict.fromkeys(("NO_TORCH_COMPILE", "NO_CUDA_GRAPH", "HF_HUB_OFFLINE"), "1")
    # An empty list hides GPUs from torch.
    return {**os.environ, **count, **switches, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def run_worker(command: Sequence[str], threads: int, timeout_s: float) -> rows.Row:
    """Run a module; return its last line, as JSON, with the cores that other programs used, or an "error"."""
    before = time.monotonic(), others_seconds()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment(threads),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout_s:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on standard error"]
        print(*lines[-_LAST_LINES:], sep="\n", file=sys.stderr)
        # The line with the exception is not indented; the lines of a backtrace are.
        reason = next((line for line in reversed(lines) if line[:1].strip()), lines[-1])
        return {"error": f"exit code {done.returncode}: {reason}"}
    elapsed_s, others_s = time.monotonic() - before[0], others_seconds() - before[1]
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "others_cores": max(0.0, others_s / elapsed_s)}


def others_seconds(statistics: Path = Path("/proc/stat")) -> float:
    """Return the processor time of all other processes since the machine started; 0 if not on Linux."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, statistics.read_text().split()[1:9])
    except OSError:
        return 0.0
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    mine = sum(usage.ru_utime + usage.ru_stime for usage in used)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - mine


def measure(task: str, contenders: Sequence[str], args: argparse.Namespace) -> list[rows.Row]:
    """Measure a task; return the row of every contender, then the ratios."""
    found: dict[str, list[rows.Row]] = {contender: [] for contender in contenders}
    rounds = TASKS[task].rounds or args.rounds
    for number in range(rounds):
        for contender in contenders:
            if any("error" in earlier for earlier in found[contender]):
                continue
            why_not = missing(contender)
            command = ["tests.benchmarks.worker", task, contender, "--folder", str(args.checkpoints)]
            command += ["--threads", str(args.threads), *(["--tiny"] if args.tiny else [])]
            command += ["--steps", str(args.steps)] if args.steps else []
            result = {"error": why_not} if why_not else run_worker(command, args.threads, args.timeout)
            found[contender].append(result)
            figures = "{p50_ms:.1f} ms, {peak_rss_mb:.0f} MB, others {others_cores:.2f} cores"
            said = result.get("error") or figures.format(**result)
            print(f"{task}, round {number + 1} of {rounds}: {contender}: {said}", file=sys.stderr)
    about = rows.about(args.threads) | {"tiny": args.tiny}
    measured = [rows.contender_row(task, contender, results, about) for contender, results in found.items()]
    return measured + rows.ratio_rows(task, measured)


def checkpoints_needed(tasks: Sequence[str], contenders: Sequence[str]) -> bool:
    """Return whether a task reads a checkpoint: the reference packages do in most tasks, ours to transcribe."""
    read = [task for task in tasks if TASKS[task].checkpoint]
    return bool(read) and (not set(PEERS).isdisjoint(contenders) or "transcribe_45s" in read)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--contender", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--rounds", type=int, default=3, help="how often contenders take turns (45 s tasks: once)")
    parser.add_argument("--steps", type=int, help="timed steps in each round, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one worker may take")
    parser.add_argument("--tiny", action="store_true", help="miniature models: a test that the benchmark runs")
    parser.add_argument("--checkpoints", type=Path, help="made on first use (9 GB); by default, in out/benchmarks")
    parser.add_argument("--out", type=Path, help="JSON lines, added to; by default, in tests/benchmarks/results")
    args = parser.parse_args()
    size = "tiny" if args.tiny else "stt-1b"
    args.checkpoints = (args.checkpoints or ROOT / "out" / "benchmarks" / size).resolve()
    about = rows.about(args.threads)
    name = f"{rows.slug(about['device'])}-{about['date']}.jsonl"
    out = args.out or (ROOT / "out" / "benchmarks" if args.tiny else ROOT / RESULTS) / name

    if checkpoints_needed(args.task, args.contender):
        command = ["tests.benchmarks.checkpoints", str(args.checkpoints), *(["--tiny"] if args.tiny else [])]
        _make_checkpoints(command, args)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for task in args.task:
            contenders = [contender for contender in TASKS[task].contenders if contender in args.contender]
            for row in measure(task, contenders, args) if contenders else []:
                _emit(row, file)
    print(f"rows are in {out}", file=sys.stderr)


def _make_checkpoints(command: list[str], args: argparse.Namespace) -> None:
    """Make the checkpoints in a separate process, as workers inherit a large parent's peak memory."""
    print(f"checkpoints: {args.checkpoints}", file=sys.stderr)
    env = environment(args.threads)
    if subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, timeout=args.timeout).returncode:
        print("checkpoints: could not be made; tasks that need them will fail", file=sys.stderr)


def _emit(row: rows.Row, file: TextIO) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    file.write(line + "\n")
    file.flush()


if __name__ == "__main__":
    main()
