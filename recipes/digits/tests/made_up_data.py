"""Write made-up recordings to the folders that the recipes read.

Shape letters: T samples.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from recipes.digits.data import TEST_CLIPS, TRAINING_CLIPS, VALIDATION_CLIPS

SENTENCES = ("There is nothing here.", "Only one of them has a digit.", "Some more words are read.")


def write_data(folder: Path, speakers: Sequence[str] = ("ann",)) -> Path:
    """Write a tone for each digit, half a second long after a tenth of silence, and three sentences of noise."""
    (folder / "fsdd").mkdir()
    numbers = [kind[0] for kind in (TEST_CLIPS, VALIDATION_CLIPS, TRAINING_CLIPS)]
    time_T = np.arange(4000) / 8000
    for digit in range(10):
        tone_T = 0.3 * np.sin(2 * np.pi * (200 + 100 * digit) * time_T)
        for speaker in speakers:
            for number in numbers:
                path = folder / f"fsdd/{digit}_{speaker}_{number}.flac"
                soundfile.write(path, np.concatenate([np.zeros(800), tone_T]), 8000)
    random = np.random.default_rng(0)
    for name in ("kathleen", "ljspeech"):
        (folder / name).mkdir()
        rows = ["file\tseconds\ttext"]
        for i, text in enumerate(SENTENCES):
            soundfile.write(folder / f"{name}/{i}.flac", 0.1 * random.normal(size=36_000), 24_000)
            rows.append(f"{i}.flac\t1.5\t{text}")
        (folder / f"{name}/transcripts.tsv").write_text("\n".join(rows) + "\n")
    return folder
