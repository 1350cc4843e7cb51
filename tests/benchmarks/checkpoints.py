"""Make the checkpoint of all contenders, with random weights: `python -m tests.benchmarks.checkpoints`.

A folder holds `kyutai` (one speech-to-text checkpoint in Kyutai's layout, the language model in bfloat16 as published;
every contender computes in float32), `transformers` and `transformers_mimi` (the same weights in transformers' layout)
and `pcm.npy` (the recording, decoded, 24 kHz mono). The model pads half of its steps, as trained ones do in speech:
with random weights alone it would never pad, and our time depends on that.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.parity import references

_PADDING = 3  # the text token
# The first row of random weights whose score is above zero about as often as a model pads 150 words a minute.
_PADDING_ROW = 11
DONE = "padding"  # written last: a folder without this file is incomplete


def make(folder: Path, tiny: bool) -> None:
    """Write the missing parts of `folder`; the full size takes minutes, 9 GB of disk and some 15 GB of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).exists():
        return
    size = "small" if tiny else "stt-1b"
    kyutai = references.make_kyutai_stt(folder / "kyutai", size=size, dtype=torch.bfloat16)
    _pad_often(kyutai / "model.safetensors")
    references.make_transformers_mimi(kyutai, folder / "transformers_mimi")
    references.make_transformers_stt(kyutai, folder / "transformers")
    np.save(folder / "pcm.npy", references.speech("bria"))
    (folder / DONE).touch()


def _pad_often(weights: Path) -> None:
    """Give padding a row of weights so large that it is chosen wherever its score is above zero."""
    tensors = load_file(weights)
    scores = tensors["text_linear.weight"]
    scores[_PADDING] = 50 * scores[_PADDING_ROW]
    save_file(tensors, weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    make(args.folder, args.tiny)
