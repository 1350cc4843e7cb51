"""Time frames on one GPU, ours and the references', in one run: `python -m tests.benchmarks.gpu --out FILE`.

Parts run in order of importance, each in a process of its own with the GPU to itself, until the time is up; what has
been measured by then is in the file. `--part` picks some, as in `--part ours-csm-1b transformers-csm-1b`.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import versions
from tests.benchmarks.table import ROOT
from tests.benchmarks.tasks import PEERS, missing

Row = dict[str, Any]
Attempt = Callable[[int], Row]  # maps a number of streams to its row

BATCHES = (1, 64, 256, 512)
SPEECH_BATCHES = (1, 8, 32)
PARTS = {  # seconds that each process of a part may take
    "ours-stt-1b": 240,
    "moshi-stt-1b": 150,
    "check": 120,
    "ours-csm-1b": 240,
    "ours-tts-1.6b": 240,
    "serve-stt-1b": 400,
    "transformers-csm-1b": 150,
    "moshi-tts-1.6b": 150,
    "ours-stt-2.6b": 300,
    "moshi-stt-2.6b": 150,
    "largest-stt-1b": 100,
    "largest-stt-2.6b": 130,
}
_MOST = 2**14  # streams: more than any device holds; ends the doubling for miniature models
_LEAST_S = 20  # no process is started with less time left than this


def largest(attempt: Attempt, start: int, finest: int) -> Iterator[Row]:
    """Search for the largest number of streams that the device holds: double until one fails, then halve the gap.

    Args:
        attempt: measures a number of streams; a row with "error" is a failure.
        start: the first number of streams.
        finest: the largest gap at which the search stops, in streams.

    Yields:
        The row of each attempt, then a summary: the largest number that fits, and the smallest that does not.
    """
    fits, fails, batch = 0, None, start
    while batch <= _MOST and (fails is None or fails - fits > finest):
        row = attempt(batch)
        yield row
        if "error" not in row:
            fits = batch
        elif row["error"] == "out of memory":
            fails = batch
        else:
            break  # out of time, or broken: the device's size is not the reason
        batch = 2 * fits if fails is None else (fits + fails) // 2
    yield {"bench": "largest", "fits": fits, "does_not_fit": fails}


class Run:
    """One call of the script: its output, and its deadline."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.end = args, time.monotonic() + 60 * args.minutes
        self.about = {"date": datetime.date.today().isoformat(), "versions": versions(), "tiny": args.tiny}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        self.file = args.out.open("a")

    def emit(self, row: Row) -> None:
        line = json.dumps(row | self.about)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def say(self, text: str) -> None:
        print(f"[{self.end - time.monotonic():.0f} s left] {text}", file=sys.stderr, flush=True)

    def work(self, part: str, *command: str) -> Iterator[Row]:
        """Yield the rows of one process; after a failure or a timeout, the last one has an "error"."""
        limit_s = min(PARTS[part], self.end - time.monotonic())
        if limit_s < _LEAST_S:
            yield {"part": part, "error": "no time left"}
            return
        self.say(f"{part}: {' '.join(command)}")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.gpu_worker", *command, *self._common()],
            cwd=ROOT,
            env=environment(os.environ),
            stdout=subprocess.PIPE,
            text=True,
        )
        stop = threading.Timer(limit_s, process.kill)
        stop.start()
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.wait()
        finally:
            in_time = stop.is_alive()
            stop.cancel()
            process.kill()
        if code:
            yield {"part": part, "error": f"exit code {code}" if in_time else f"stopped after {limit_s:.0f} s"}

    def _common(self) -> list[str]:
        return ["--steps", str(self.args.steps), "--device", self.args.device, *(["--tiny"] if self.args.tiny else [])]

    def part(self, part: str) -> None:
        """Run one of `PARTS` and emit its rows."""
        what, _, size = part.partition("-")
        batches: Sequence[int] = self.args.batches if "stt" in size else self.args.speech_batches
        if what in PEERS and (why_not := missing(what)):
            self.emit({"part": part, "error": why_not})
        elif what == "check":
            for row in self.work(part, "check"):
                self.emit(row)
        elif what == "largest":

            def attempt(batch: int) -> Row:
                return list(self.work(part, "ours", "--size", size, "--batches", str(batch)))[-1]

            for row in largest(attempt, 2 * max(batches), max(batches) // 8):
                self.emit({"size": size} | row)
        else:
            for row in self.work(part, what, "--size", size, "--batches", ",".join(map(str, batches))):
                self.emit(row)


def environment(outer: Mapping[str, str]) -> dict[str, str]:
    """Make a process's environment: 95 % of the memory for JAX, CUDA graphs but no compiler for the reference."""
    inner = {**outer, "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95", "NO_TORCH_COMPILE": "1", "HF_HUB_OFFLINE": "1"}
    inner.pop("NO_CUDA_GRAPH", None)
    return inner


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="streams that are heard")
    parser.add_argument("--speech-batches", type=int, nargs="+", default=list(SPEECH_BATCHES), help="speeches at once")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=9, help="after these nothing is started and all is stopped")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="miniature models: a test that the benchmark runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")
    run = Run(args := parser.parse_args())
    for part in args.part:
        run.part(part)
    run.say(f"done; rows are in {args.out}")


if __name__ == "__main__":
    main()
