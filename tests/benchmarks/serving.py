"""Run a server under load for a while, and fail where it breaks a promise: `python -m tests.benchmarks.serving`.

The server is `dsm-jax serve` in a process of its own, with the embedded models. Each part prints its figures as a line
of JSON; a figure beyond its bound is a fault, and so is one that is missing. Client and server share this machine.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.benchmarks import serving_limits, serving_loads
from tests.benchmarks.server import SLOTS, ServerProcess, serving

SECONDS = 600.0  # of the longest parts
MANY = 64  # live streams, and slots
# By part, the most that each figure may be.
BOUNDS: Mapping[str, Mapping[str, float]] = {
    "readiness": {"ready_s": 10, "first_frame_ms": 80, "compilations": 0},
    "many": {"p95_ms": 80, "errors": 0, "dropped": 0},
    "speech": {"first_alone_ms": 300, "first_of_eight_ms": 600, "errors": 0},
    "latency": {"p95_ms": 80, "p99_ms": 200, "errors": 0, "dropped": 0},
    "fairness": {"upload_s": 15, "live_p95_ms": 120, "unfairness": 0.25, "errors": 0},
    # Without audio for 0.3 s, then the eight steps by which the text of digits is late, and a tenth of a second.
    "markers": {"late_ms": 300 + 8 * 20 + 100, "early": 0, "differ": 0},
    "full": {"refused_ms": 100, "taken_ms": 100, "wrong": 0},
    "slow": {
        "reader_s": 75,
        "wrong_codes": 0,
        "writer_s": 75,
        "request_s": 75,
        "speech_s": 75,
        "live_p95_ms": 80,
        "errors": 0,
    },
    "mutations": {
        "faults": 0,
        "unanswered": 0,
        "dropped": 0,
        "silent": 0,
        "differ": 0,
        "used_slots": 0,
        "memory_mb": 150,
        "logged": 0,
    },
    "churn": {"differ": 0, "used_slots": 0, "failed": 0, "logged": 0},
    "soak": {"memory_growth": 0.05, "compilations": 0, "differ": 0, "slowdown": 1.5},
    "drain": {"unready_ms": 100, "drained_s": 3 + 5, "hurried_s": 1, "wrong": 0},
}
# By part, the least that a figure may be; of shorter runs, as much less.
LEAST: Mapping[str, Mapping[str, float]] = {
    "fairness": {"uploads": 3},
    "markers": {"markers": 100, "words": 1},
    "mutations": {"messages": 10_000},
    "churn": {"good": 600},
    "soak": {"hours_of_audio": 24},
}


def faults(part: str, figures: Mapping[str, float | None], share: float = 1.0) -> list[str]:
    """Return the bounds that figures break; a figure that is missing breaks its own.

    Args:
      part: of the run.
      figures: of the part.
      share: of the whole length, for bounds from below.
    """
    found = []
    for name, most in BOUNDS[part].items():
        value = figures.get(name)
        if value is None or not value <= most:
            found.append(f"{part}: {name} is {value}; expected at most {most}")
    for name, least in LEAST.get(part, {}).items():
        value = figures.get(name)
        if value is None or not value >= share * least:
            found.append(f"{part}: {name} is {value}; expected at least {share * least:g}")
    return found


def measure(seconds: float) -> list[str]:
    """Run all parts and print their figures; return the faults."""
    share, found = min(1.0, seconds / SECONDS), list[str]()

    def report(part: str, figures: Mapping[str, float | None]) -> None:
        print(json.dumps({"part": part, **figures}), flush=True)
        found.extend(faults(part, figures, share))

    report("readiness", serving_limits.readiness())
    with serving(("--stt", "digits", "--slots", str(MANY))) as server:
        report("many", asyncio.run(serving_loads.latency(server, MANY, min(20.0, seconds))))
    parts: dict[str, Callable[[ServerProcess], Any]] = {
        "speech": serving_loads.speech,
        "latency": lambda server: serving_loads.latency(server, SLOTS, min(60.0, seconds)),
        "fairness": lambda server: serving_loads.fairness(server, min(20.0, seconds)),
        "markers": lambda server: serving_loads.markers(server, round(100 * share)),
        "full": serving_limits.full,
        "slow": serving_limits.slow,
        "mutations": lambda server: serving_loads.mutations(server, round(10_000 * share)),
        "churn": lambda server: serving_loads.churn(server, seconds),
        "soak": lambda server: serving_loads.soak(server, seconds, 24 * share),
    }
    with serving() as server:
        for part, call in parts.items():
            server.wait_until_idle()
            report(part, asyncio.run(call(server)))
    report("drain", serving_limits.drain())
    return found


def main() -> int:
    """Run the parts; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of churn, and of the soak (default: %(default)s)"
    )
    found = measure(parser.parse_args().seconds)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
