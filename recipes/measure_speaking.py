"""Prints the figures of the model card of `digits-tts`: what is heard of what it says.

Usage: python recipes/measure_speaking.py [--model MODEL] [--whisper WHISPER], where WHISPER is a folder with a model of
faster-whisper (installed separately).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure_digits import recogniser, spelt  # beside this file

import dsm_jax
from dsm_jax.training.compose import Spoken
from dsm_jax.training.digits import WORDS
from dsm_jax.training.measure import Figures, compare
from dsm_jax.training.speaking import NAME
from dsm_jax.tts import Request, Speech, SpeechOptions, synthesize_each, voices_of

STRINGS, CONVERSATIONS = 200, 60
NOTHING = Figures(0, 0, 0, 0, ())


def strings(count: int, voices: list[str], *, turns: int = 1) -> list[Request]:
    """Random strings of 3 to 9 digits, cut into turns; voices one after another, and for each string a seed."""
    requests = []
    for i in range(count):
        random = np.random.default_rng((7, turns, i))
        words = random.choice(WORDS, random.integers(3, 10))
        text = tuple(" ".join(part) for part in np.array_split(words, turns))
        requests.append(Request(text, tuple(voices[(i + turn) % len(voices)] for turn in range(min(turns, 2))), seed=i))
    return requests


def say(model: dsm_jax.Model, requests: list[Request], options: SpeechOptions) -> list[Speech]:
    """The speech of every request."""
    said: dict[int, Speech] = {}
    for index, result in synthesize_each(model, requests, options, batch_size=20):
        if not isinstance(result, Speech):
            raise result
        said[index] = result
    return [said[index] for index in range(len(requests))]


def compared(speeches: list[Speech], hear: Callable[[np.ndarray], dsm_jax.Transcript]) -> list[Figures]:
    """What is heard of each, against what was said; starts are compared with the times that the speech gives."""
    return [
        compare([Spoken(word.text, word.start, word.end) for word in speech.words], hear(speech.pcm))
        for speech in speeches
    ]


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--whisper", type=Path)
    args = parser.parse_args()
    model, listener = dsm_jax.load(args.model), dsm_jax.load("digits")
    voices = list(voices_of(model))

    def listen(pcm_T: np.ndarray) -> dsm_jax.Transcript:
        return dsm_jax.transcribe(listener, pcm_T)

    requests = strings(STRINGS, voices)
    said = say(model, requests, SpeechOptions())
    print(f"{len(said)} strings, {sum(speech.duration for speech in said):.0f} s of speech")
    figures = compared(said, listen)
    print(f"heard by digits: {sum(figures, NOTHING)}")
    for place, voice in enumerate(voices):
        print(f"  {voice}: {sum(figures[place :: len(voices)], NOTHING)}")
    unguided = say(model, requests, SpeechOptions(guidance=1.0))
    print(f"without guidance: {sum(compared(unguided, listen), NOTHING)}")
    turns = say(model, strings(CONVERSATIONS, voices, turns=3), SpeechOptions())
    print(f"{CONVERSATIONS} conversations of three turns: {sum(compared(turns, listen), NOTHING)}")
    if args.whisper:
        recognise = recogniser(args.whisper)
        print(f"heard by whisper: {sum(compared(said, lambda pcm_T: spelt(recognise(pcm_T))), NOTHING)}")


if __name__ == "__main__":
    main()
