"""Codes and greedy tokens at the published sizes, ours against moshi's, on real speech.

Too large for every run: python -m tests.parity.full_size [stt-1b|stt-2.6b] [FOLDER]. FOLDER holds a float32 checkpoint
in Kyutai's layout of that size, such as `make bench` keeps in out/benchmarks/stt-1b; without it one is made.
"""

import sys
import time
from pathlib import Path

import numpy as np

import dsm_jax
from dsm_jax import codec
from tests.parity import references


def compare(folder: Path, recording: str) -> bool:
    """Print how many codes and tokens are equal; True if all are."""
    pcm = references.speech(recording)
    padded = references.moshi_pad(pcm, references.read_config(folder)["stt_config"])
    start = time.perf_counter()
    codes = references.moshi_codes(folder, padded)
    theirs = references.moshi_tokens(folder, codes[:, : padded.size // 1920])
    middle = time.perf_counter()
    model = dsm_jax.load(folder)
    ours = codec.encode(model, padded)
    tokens = np.array(dsm_jax.transcribe(model, pcm, frames=True).frames.text_tokens)
    end = time.perf_counter()
    print(f"{recording}: {pcm.size / 24_000:.1f} s, {len(codes)} codebooks x {codes.shape[1]} frames")
    print(f"  codes: {np.sum(ours == codes)} of {codes.size} equal, {np.unique(codes).size} different")
    first = np.argwhere(ours != codes)
    if len(first):
        print(f"  the first differs in frame {first[:, 1].min()}: {len(set(first[:, 1]))} frames have one")
    print(f"  tokens: {np.sum(tokens == theirs.tokens_T)} of {tokens.size} equal, {np.unique(tokens).size} different")
    print(f"  seconds, loading included: moshi {middle - start:.0f}, ours {end - middle:.0f}", flush=True)
    return bool(np.array_equal(ours, codes) and np.array_equal(tokens, theirs.tokens_T))


def main(size: str = "stt-1b", folder: str | None = None) -> int:
    checkpoint = Path(folder) if folder else references.kyutai_stt(size=size)
    return 0 if all([compare(checkpoint, recording) for recording in ("librispeech", "bria")]) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
