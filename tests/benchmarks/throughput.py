"""Time many texts of very different lengths through few slots; one JSON row.

To compare two versions, run `python throughput.py` in turns with the interpreter of each. It runs with any version,
but the first ones call `SynthesizeOptions` `SpeechOptions`.
"""

import argparse
import json
import time

import numpy as np

import dsm_jax
from dsm_jax.tts import Request, SynthesizeOptions, synthesize_each

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


def requests(count: int, longest: int) -> list[Request]:
    """Make requests of 1 to `longest` words in random order, each with its own voice and seed."""
    random = np.random.default_rng(0)
    lengths = random.permutation(np.linspace(1, longest, count).round().astype(int))
    return [
        Request(" ".join(str(word) for word in random.choice(DIGITS, length)), (VOICES[n % 6],), seed=n)
        for n, length in enumerate(lengths)
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=40, help="words")
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    model, options = dsm_jax.load("digits-tts"), SynthesizeOptions()
    several = requests(args.requests, args.longest)
    list(synthesize_each(model, several[: args.slots], options=options, batch_size=args.slots))  # compiles
    start = time.perf_counter()
    results = dict(synthesize_each(model, several, options=options, batch_size=args.slots))
    seconds = time.perf_counter() - start
    spoken = sum(speech.duration for speech in results.values() if isinstance(speech, dsm_jax.Speech))
    frames = sum(int(speech.frames.sum()) for speech in results.values() if isinstance(speech, dsm_jax.Speech))
    row = {"bench": "speech_throughput", "requests": len(several), "slots": args.slots, "seconds": round(seconds, 3)}
    print(json.dumps(row | {"speech_seconds": round(spoken, 2), "checksum": frames}))


if __name__ == "__main__":
    main()
