"""Run `dsm-jax serve` in a process of its own, and look at it from outside: its metrics, memory and log."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SLOTS = 8
MODELS = ("--stt", "digits", "--slots", str(SLOTS), "--tts", "digits-tts", "--tts-slots", str(SLOTS))
CLIP = Path(__file__).resolve().parents[2] / "examples/audio/digits_jackson.flac"
_START_S = 600.0


@dataclasses.dataclass(frozen=True)
class ServerProcess:
    """A server that runs.

    Attributes:
      url: its address.
      process: its process.
      log: file of its log, a line of JSON for each record.
    """

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def address(self) -> str:
        """Its address without the scheme, such as 127.0.0.1:1234."""
        return self.url.rpartition("//")[2]

    @property
    def socket_url(self) -> str:
        """Its address for websockets."""
        return self.url.replace("http", "ws", 1)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = [line for line in text.splitlines() if re.match(rf"{name}[ {{]", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(one in line for one in wanted))

    def wait_until_idle(self) -> None:
        """Wait until no session holds a slot: it is free some milliseconds after its client has left."""
        while self.metric("dsm_slots_used"):
            time.sleep(0.02)

    def resident_mb(self) -> float:
        """Return the memory that the process holds, in 10^6 bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def errors(self) -> int:
        """Return the number of errors in the log, and of tracebacks outside it."""
        lines = self.log.read_text(errors="replace").splitlines()
        return sum('"level": "error"' in line or line.startswith("Traceback") for line in lines)


def handshake(address: str, path: str) -> bytes:
    """Return the request by which a client without a library opens a websocket.

    Args:
      address: of the server, such as 127.0.0.1:8080.
      path: of the websocket.
    """
    return (
        f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


@contextlib.contextmanager
def serving(arguments: Sequence[str] = MODELS, environment: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """Run a server while the block runs, from the moment at which it listens.

    Args:
      arguments: of the command.
      environment: of the process; None for this process's own.
    """
    command = [sys.executable, "-m", "dsm_jax", "serve", "--port", "0", "--no-page", "--log-format", "json", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out, subprocess.Popen(command, stderr=out, env=environment) as process:
            try:
                yield ServerProcess(_address(process, log), process, log)
            finally:
                process.terminate()
                process.wait(60)


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    ends = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < ends:
        if found := re.search(r"at (http://[^\s\"]+)", log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.01)
    raise RuntimeError(f"the server has not started: {log.read_text(errors='replace')}")
