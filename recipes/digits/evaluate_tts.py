"""Print the figures of the model card of `digits-tts`: word errors in transcripts of its speech."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import dsm_jax
from dsm_jax.training.data import WordSpan
from dsm_jax.tts import Request, Speech, SynthesizeOptions, synthesize_each, voices_of
from recipes.digits.data import WORDS
from recipes.digits.whisper import spell_numbers, whisper
from recipes.digits.word_errors import word_errors

UTTERANCES, CONVERSATIONS = 200, 60

Heard = tuple[list[WordSpan], dsm_jax.Transcript]


def requests_of(count: int, voices: list[str], *, turns: int = 1) -> list[Request]:
    """Draw requests of 3 to 9 digits, cut into turns, with the voices in rotation and a seed per request."""
    requests = []
    for i in range(count):
        random = np.random.default_rng((7, turns, i))
        words = random.choice(WORDS, random.integers(3, 10))
        text = tuple(" ".join(part) for part in np.array_split(words, turns))
        requests.append(Request(text, tuple(voices[(i + turn) % len(voices)] for turn in range(min(turns, 2))), seed=i))
    return requests


def synthesize(model: dsm_jax.Model, requests: list[Request], options: SynthesizeOptions) -> list[Speech]:
    """Synthesise every request, in order."""
    speeches: dict[int, Speech] = {}
    for index, result in synthesize_each(model, requests, options=options, batch_size=20):
        if not isinstance(result, Speech):
            raise result
        speeches[index] = result
    return [speeches[index] for index in range(len(requests))]


def heard(speeches: list[Speech], transcribe: Callable[[np.ndarray], dsm_jax.Transcript]) -> list[Heard]:
    """Transcribe speech, and return the speech's own words and the transcript of each."""
    return [
        ([WordSpan(word.text, word.start, word.end) for word in speech.words], transcribe(speech.pcm))
        for speech in speeches
    ]


def evaluate_digits_tts(name: str, whisper_folder: Path | None) -> None:
    """Print every figure of the model card.

    Args:
      name: the model, as for `dsm_jax.load`.
      whisper_folder: a model of faster-whisper to compare with; None omits its figures.
    """
    model, stt = dsm_jax.load(name), dsm_jax.load("digits")
    voices = list(voices_of(model))

    def transcribe(pcm_T: np.ndarray) -> dsm_jax.Transcript:
        return dsm_jax.transcribe(stt, pcm_T)

    requests = requests_of(UTTERANCES, voices)
    speeches = synthesize(model, requests, SynthesizeOptions())
    print(f"{len(speeches)} utterances, {sum(speech.duration for speech in speeches):.0f} s of speech")
    pairs = heard(speeches, transcribe)
    print(f"transcribed by digits: {word_errors(pairs)}")
    for place, voice in enumerate(voices):
        print(f"  {voice}: {word_errors(pairs[place :: len(voices)])}")
    unguided = synthesize(model, requests, SynthesizeOptions(guidance_scale=1.0))
    print(f"without guidance: {word_errors(heard(unguided, transcribe))}")
    turns = synthesize(model, requests_of(CONVERSATIONS, voices, turns=3), SynthesizeOptions())
    print(f"{CONVERSATIONS} conversations of three turns: {word_errors(heard(turns, transcribe))}")
    if whisper_folder:
        recognise = whisper(whisper_folder)
        pairs = heard(speeches, lambda pcm_T: spell_numbers(recognise(pcm_T)))
        print(f"transcribed by whisper: {word_errors(pairs)}")
