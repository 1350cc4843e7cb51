"""Prints the figures of the model card of `digits-tts`: what is heard of what it says.

Usage: python recipes/measure_speaking.py [--model MODEL] [--whisper WHISPER], where WHISPER is a folder with a model of
faster-whisper (installed separately).
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from measure_digits import recogniser  # beside this file

import dsm_jax
from dsm_jax.training.compose import Spoken
from dsm_jax.training.digits import WORDS
from dsm_jax.training.measure import Figures, compare
from dsm_jax.training.speaking import NAME
from dsm_jax.tts import Request, Speech, synthesize_each
from dsm_jax.tts.voices import voices_of

STRINGS = 200
NUMBERS = {str(number): word for number, word in enumerate(WORDS)}


def strings(count: int, voices: list[str]) -> list[Request]:
    """Random strings of 3 to 9 digits, the voices one after another, each with a seed of its own."""
    requests = []
    for i in range(count):
        random = np.random.default_rng((7, i))
        text = " ".join(random.choice(WORDS, random.integers(3, 10)))
        requests.append(Request(text, (voices[i % len(voices)],), seed=i))
    return requests


def spelt(transcript: dsm_jax.Transcript) -> dsm_jax.Transcript:
    """What Whisper wrote, with numbers as words: "8 41" as "eight four one"."""
    words = [NUMBERS.get(part, part) for word in transcript.words for part in re.findall(r"[0-9]|[a-z']+", word.text)]
    return dsm_jax.Transcript("", tuple(dsm_jax.Word(w, 0.0, 0.0, 1.0) for w in words), (), 0.0, None, None, "whisper")


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--whisper", type=Path)
    args = parser.parse_args()
    model, listener = dsm_jax.load(args.model), dsm_jax.load("digits")
    requests = strings(STRINGS, list(voices_of(model)))
    said: dict[int, Speech] = {}
    for index, result in synthesize_each(model, requests, batch_size=20):
        if not isinstance(result, Speech):
            raise result
        said[index] = result
    seconds = sum(speech.duration for speech in said.values())
    print(f"{len(said)} strings, {seconds:.0f} s of speech")
    listeners = {"digits": lambda pcm_T: dsm_jax.transcribe(listener, pcm_T)}
    if args.whisper:
        whisper = recogniser(args.whisper)
        listeners["whisper"] = lambda pcm_T: spelt(whisper(pcm_T))
    for name, hear in listeners.items():
        by_voice: dict[str, Figures] = defaultdict(lambda: Figures(0, 0, 0, 0, ()))
        for index, speech in sorted(said.items()):
            words = [Spoken(word.text, word.start, word.end) for word in speech.words]
            by_voice[str(requests[index].voices[0])] += compare(words, hear(speech.pcm))
        print(f"heard by {name}: {sum(by_voice.values(), Figures(0, 0, 0, 0, ()))}")
        for voice, figures in by_voice.items():
            print(f"  {voice}: {figures}")


if __name__ == "__main__":
    main()
