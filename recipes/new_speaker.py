"""Makes `examples/new_speaker`: digits in a voice that the model `digits` never heard, synthesised by flite.

Usage: python recipes/new_speaker.py VOICE. Needs Debian's `flite`; takes for training and for testing are said with
different settings.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from dsm_jax.training import sounds
from dsm_jax.training.compose import Delivery, Take, string_of
from dsm_jax.training.digits import WORDS

RATE = 16_000
PITCH = {"slt": 170, "rms": 100, "awb": 130, "kal16": 105}  # Hz, of the voice as it comes
SETTINGS = {
    "train": ((0.85, 0.9), (0.95, 1.05), (1.1, 0.95), (1.25, 1.1)),
    "test": ((0.9, 1.0), (1.05, 0.9), (1.2, 1.05)),
}
STRINGS = {"train": 40, "test": 20}


def say(word: str, voice: str, stretch: float, pitch: float, folder: Path) -> Take:
    """One take, by flite."""
    path = folder / "take.wav"
    settings = ("--setf", f"duration_stretch={stretch}", "--setf", f"int_f0_target_mean={PITCH[voice] * pitch}")
    subprocess.run(["flite", "-voice", voice, *settings, "-t", word, "-o", path], check=True)
    pcm_T, rate = soundfile.read(path, dtype="float32")
    pcm_T = sounds.resample(pcm_T, rate, RATE)
    start, end = sounds.active(pcm_T, RATE)
    first, last = round(start * RATE), round(end * RATE)
    return Take(word, voice, pcm_T[first:last], 0.0, (last - first) / RATE)


def main(voice: str) -> None:
    """Writes recordings, and beside each its transcript as `dsm-jax transcribe --format json` has it."""
    target = Path(__file__).parents[1] / "examples" / "new_speaker"
    for part, settings in SETTINGS.items():
        (target / part).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            takes = [say(word, voice, *setting, Path(scratch)) for word in WORDS for setting in settings]
        for i in range(STRINGS[part]):
            random = np.random.default_rng((len(part), i))
            words = int(random.integers(3, 10))
            delivery = Delivery(lead=0.4, shortest_gap=0.05, longest_gap=0.4, speed=0.05)
            pcm_T, spoken = string_of(random, takes, RATE, seconds=9.0, words=words, delivery=delivery)
            end = round((spoken[-1].end + 0.3) * RATE)
            path = target / part / f"{voice}_{i:02d}.ogg"
            soundfile.write(path, pcm_T[:end], RATE, format="OGG", subtype="OPUS")
            words_json = [{"text": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in spoken]
            path.with_suffix(".json").write_text(json.dumps({"audio": path.name, "words": words_json}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
