"""Start what the page needs around it: a server in its own process, and a recording for the microphone."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

AUDIO = Path(__file__).resolve().parents[2] / "examples/audio"
JACKSON = AUDIO / "digits_jackson.flac"
# Set for tests (tests/conftest.py); the server is to run as its users run it.
OF_TESTS = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "JAX_NUMPY_DTYPE_PROMOTION")


@contextlib.contextmanager
def serving(*options: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run `dsm-jax serve`; yield its address and its process."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_TESTS} | variables
    command = [Path(sys.executable).with_name("dsm-jax"), "serve", "--port", "0", *options]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    lines, ready = [], threading.Event()

    def read() -> None:
        for line in process.stderr:
            lines.append(line)
            if " at http://" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(300)
        found = re.search(r" at (http://\S+)", "".join(lines))
        assert found, "".join(lines)
        yield found[1], process
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def write_microphone(path: Path) -> Path:
    """Write a recording for the microphone: silence while the page sets up, nine digits, and silence."""
    pcm_T, rate = soundfile.read(JACKSON, dtype="float32")
    pcm_T = np.concatenate([np.zeros(rate // 2, np.float32), pcm_T, np.zeros(4 * rate, np.float32)])
    soundfile.write(path, soxr.resample(pcm_T, rate, 48_000), 48_000, subtype="PCM_16")
    return path
