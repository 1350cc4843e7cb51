"""Make the checkpoint of all contenders, with random weights: `python -m tests.benchmarks.checkpoints`.

A folder holds `kyutai` (one speech-to-text checkpoint in Kyutai's layout, the language model in bfloat16 as published;
every contender computes in float32), `transformers` and `transformers_mimi` (the same weights in transformers' layout)
and `pcm.npy` (the recording, decoded, 24 kHz mono).
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from tests.parity import references

DONE = "done"  # written last: a folder without this file is incomplete


def make(folder: Path, tiny: bool) -> None:
    """Write the missing parts of `folder`; the full size takes minutes, 9 GB of disk and some 15 GB of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).exists():
        return
    size = "small" if tiny else "stt-1b"
    kyutai = references.make_kyutai_stt(folder / "kyutai", size=size, dtype=torch.bfloat16)
    references.make_transformers_mimi(kyutai, folder / "transformers_mimi")
    references.make_transformers_stt(kyutai, folder / "transformers")
    np.save(folder / "pcm.npy", references.speech("bria"))
    (folder / DONE).touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    make(args.folder, args.tiny)
