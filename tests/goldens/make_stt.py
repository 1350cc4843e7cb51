"""Writes tests/goldens/stt: a small random checkpoint in Kyutai's layout, and what moshi makes of a recording.

Run from the repository's root, with what `make parity` installs: python -m tests.goldens.make_stt
"""

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.parity import references

FOLDER = Path(__file__).with_name("stt")


def outputs(folder: Path) -> tuple[dict[str, np.ndarray], list]:
    """Return the reference's outputs for the LibriSpeech clip: arrays by name, and (word, start, end)."""
    config = references.read_config(folder)
    padded = references.moshi_pad(references.speech("librispeech"), config["stt_config"])
    codes = references.moshi_codes(folder, padded)
    run = references.moshi_tokens(folder, codes[:, : padded.size // 1920])
    offset = sum(config["stt_config"].values())
    words = references.moshi_timestamped(run.tokens_T, folder / config["tokenizer_name"], offset)
    arrays = {
        "codes_QT": codes,
        "first_token": np.array([run.first_token], np.int32),
        "tokens_T": run.tokens_T,
        "logits_TV": run.logits_TV,
        "pauses_TH": run.pauses_TH,
    }
    return arrays, [[text, float(start), float(end)] for text, start, end in words]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    checkpoint = references.make_kyutai_stt(FOLDER / "checkpoint", extra_heads=True)
    arrays, words = outputs(checkpoint)
    made_with = {name: importlib.metadata.version(name) for name in ("moshi", "torch")}
    facts = {"made_by": "tests/goldens/make_stt.py", "recording": "tests/data/librispeech-1272-128104-0000.flac"}
    save_file(arrays, FOLDER / "expected.safetensors", metadata={**facts, **made_with})
    (FOLDER / "expected_words.json").write_text(json.dumps(words), encoding="utf-8")


if __name__ == "__main__":
    main()
