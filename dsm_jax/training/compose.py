"""Strings of words put together from recordings of single words, with the time of each."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsm_jax.training import sounds


@dataclasses.dataclass(frozen=True)
class Take:
    """One recording of one word, by one speaker; `start` and `end` are where the word is in it, in seconds."""

    word: str
    speaker: str
    pcm_T: np.ndarray
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Spoken:
    """Where a word lies in a recording, in seconds, and who says it, where that is known."""

    text: str
    start: float
    end: float
    speaker: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the words of a string follow each other, and what becomes of each; as recorded, unless told otherwise.

    Attributes:
      lead: the most there is before the first word, in seconds.
      shortest_gap, longest_gap: between words, in seconds; most are near the shortest.
      speed: each string is said up to this much faster and higher, or slower and deeper, and each word half of that
        beside.
      tempo: the same at the pitch that it has; times are then exact to some milliseconds.
      cut: half of the words lack up to this much of their beginning and of their end, in seconds, and at most a quarter
        of each, as takes trimmed by level do.
      taking_turns: how often the speaker changes from one word to the next; 0 is never.
    """

    lead: float = 1.2
    shortest_gap: float = 0.0
    longest_gap: float = 0.9
    speed: float = 0.0
    tempo: float = 0.0
    cut: float = 0.0
    taking_turns: float = 0.0


def string_of(
    random: np.random.Generator,
    takes: Sequence[Take],
    sample_rate: int,
    *,
    seconds: float,
    words: int | None = None,
    delivery: Delivery = Delivery(),
) -> tuple[np.ndarray, list[Spoken]]:
    """A string of words by one speaker, or two who take turns, in silence.

    Args:
      random: what to draw from.
      takes: what to draw; those of one speaker are used, or of two.
      sample_rate: of the takes, Hz.
      seconds: of the result.
      words: how many; None for as many as there is room for.
      delivery: how they are said.

    Returns:
      samples: float32 [seconds * sample_rate].
      The words, in order; those that did not fit are left out.
    """
    own = _of_one_speaker(random, takes)
    other = _of_one_speaker(random, takes) if delivery.taking_turns else own
    pcm_T = np.zeros(round(seconds * sample_rate), np.float32)
    at, spoken = random.uniform(0, delivery.lead), []
    shortest, longest, most = delivery.shortest_gap, delivery.longest_gap, (delivery.speed, delivery.tempo)
    speeds = np.exp(random.uniform(-1, 1, 2) * most)
    tightness = random.choice([1.0, 2.0, 4.0])
    while words is None or len(spoken) < words:
        if delivery.taking_turns and random.random() < delivery.taking_turns:
            own, other = other, own
        take = own[int(random.integers(len(own)))]
        if delivery.cut and random.random() < 0.5:
            take = _cut(random, take, delivery.cut, sample_rate)
        higher, faster = speeds * np.exp(random.uniform(-0.5, 0.5, 2) * most)
        factor = higher * faster
        said_T = sounds.change_speed(take.pcm_T, higher)
        if delivery.tempo:
            said_T = sounds.change_tempo(said_T, faster, sample_rate)
        said_T = said_T * (sounds.gain(random.uniform(-4, 4)) * 0.1 / sounds.rms(said_T))
        first = round(at * sample_rate)
        if first + len(said_T) > len(pcm_T):
            break
        pcm_T[first : first + len(said_T)] += said_T
        spoken.append(Spoken(take.word, at + take.start / factor, at + take.end / factor, take.speaker))
        at += len(said_T) / sample_rate + shortest + (longest - shortest) * random.random() ** tightness
    return pcm_T, spoken


def _of_one_speaker(random: np.random.Generator, takes: Sequence[Take]) -> list[Take]:
    speaker = takes[int(random.integers(len(takes)))].speaker
    return [take for take in takes if take.speaker == speaker]


def _cut(random: np.random.Generator, take: Take, most: float, sample_rate: int) -> Take:
    """The take without up to `most` seconds of its word at either end, and without what is beside the word."""
    lost = random.random(2) ** 2 * min(most, (take.end - take.start) / 4)
    first, last = round((take.start + lost[0]) * sample_rate), round((take.end - lost[1]) * sample_rate)
    pcm_T = take.pcm_T[first:last]
    return dataclasses.replace(take, pcm_T=pcm_T, start=0.0, end=len(pcm_T) / sample_rate)


def labels_of(
    spoken: Sequence[Spoken], vocabulary: Sequence[str], *, frames: int, frame_rate: float, parts: int
) -> np.ndarray:
    """What is being said in each frame, int32 [frames]: 0 for nothing, else which part of which word.

    A word of the vocabulary at place w has the labels 1 + w * parts to (w + 1) * parts, from its first part to its
    last. A frame has the label of what is said at its middle.
    """
    labels_T = np.zeros(frames, np.int32)
    for word in spoken:
        middles = (np.arange(frames) + 0.5) / frame_rate
        inside_T = (word.start <= middles) & (middles < word.end)
        part_T = np.minimum((middles - word.start) / (word.end - word.start) * parts, parts - 1).astype(np.int32)
        labels_T[inside_T] = (1 + vocabulary.index(word.text) * parts + part_T)[inside_T]
    return labels_T
