"""Measure one task with one contender, alone in this process: `python -m tests.benchmarks.worker TASK CONTENDER`.

The last printed line is a JSON object. Loading, compilation and warm-up are not timed; memory is the peak of the
whole process, loading and compilation included.
"""

import argparse
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.tasks import PACKAGES, PEERS, TASKS

Step = Callable[[], object]  # does one unit of work, and returns when it is done

_MODULES = {name: f"tests.benchmarks.{name.replace('-', '_')}{'_peer' if name in PEERS else ''}" for name in PACKAGES}


def time_steps(step: Step, warm_up: int, steps: int) -> list[float]:
    """Return the seconds of each of `steps` calls, after `warm_up` calls that are not counted."""
    for _ in range(warm_up):
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def figures(seconds: Sequence[float]) -> dict[str, Any]:
    """Summarise the times of a worker's steps, with the peak memory of this process so far."""
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "steps": len(seconds),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("contender", choices=PACKAGES)
    parser.add_argument("--steps", type=int, help="at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="what tests.benchmarks.checkpoints made")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    # XLA takes as many threads as it may use cores, so the cores are limited to the threads of torch and rayon.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    task = TASKS[args.task]
    contender = importlib.import_module(_MODULES[args.contender])
    step = contender.make(args.task, args.folder, args.threads, args.tiny)
    steps = min(args.steps or task.steps, task.steps)
    print(json.dumps(figures(time_steps(step, task.warm_up, steps))))


if __name__ == "__main__":
    main()
