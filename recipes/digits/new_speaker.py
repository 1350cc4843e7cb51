"""Make `examples/new_speaker`: utterances of digits in a voice that no embedded model was trained on.

The voice is synthesised by flite (Debian's package `flite`), with different settings for training and for testing.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from recipes.digits import augment
from recipes.digits.data import WORDS
from recipes.digits.utterances import Clip, ProsodyConfig, concat_words

RATE = 16_000
PITCH = {"slt": 170, "rms": 100, "awb": 130, "kal16": 105}  # default pitch of each voice, Hz
SETTINGS = {
    "train": ((0.85, 0.9), (0.95, 1.05), (1.1, 0.95), (1.25, 1.1)),
    "test": ((0.9, 1.0), (1.05, 0.9), (1.2, 1.05)),
}
UTTERANCES = {"train": 40, "test": 20}


def synthesize_clip(word: str, voice: str, stretch: float, pitch: float, folder: Path) -> Clip:
    """Synthesise one word with flite."""
    path = folder / "word.wav"
    settings = ("--setf", f"duration_stretch={stretch}", "--setf", f"int_f0_target_mean={PITCH[voice] * pitch}")
    subprocess.run(["flite", "-voice", voice, *settings, "-t", word, "-o", path], check=True)
    pcm_T, rate = soundfile.read(path, dtype="float32")
    pcm_T = augment.resample(pcm_T, rate, RATE)
    start, end = augment.active(pcm_T, RATE)
    first, last = round(start * RATE), round(end * RATE)
    return Clip(word, voice, pcm_T[first:last], 0.0, (last - first) / RATE)


def make_new_speaker(voice: str, target: Path) -> None:
    """Write recordings, each with its transcript in the format of `dsm-jax transcribe --format json`."""
    for part, settings in SETTINGS.items():
        (target / part).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            clips = [
                synthesize_clip(word, voice, stretch, pitch, Path(scratch))
                for word in WORDS
                for stretch, pitch in settings
            ]
        for i in range(UTTERANCES[part]):
            random = np.random.default_rng((len(part), i))
            words = int(random.integers(3, 10))
            prosody = ProsodyConfig(lead=0.4, shortest_gap=0.05, longest_gap=0.4, speed=0.05)
            pcm_T, spans = concat_words(random, clips, RATE, seconds=9.0, words=words, prosody=prosody)
            end = round((spans[-1].end + 0.3) * RATE)
            path = target / part / f"{voice}_{i:02d}.ogg"
            soundfile.write(path, pcm_T[:end], RATE, format="OGG", subtype="OPUS")
            words_json = [{"text": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in spans]
            path.with_suffix(".json").write_text(json.dumps({"audio": path.name, "words": words_json}) + "\n")
