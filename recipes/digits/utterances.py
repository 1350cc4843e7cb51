"""Concatenate recordings of single words into utterances, with the times of each word."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsm_jax.training.data import WordSpan
from recipes.digits import augment


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording of one word by one speaker, with the word's start and end in seconds."""

    word: str
    speaker: str
    pcm_T: np.ndarray
    start: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProsodyConfig:
    """Gaps between the words of an utterance, and changes of the words; by default the words are as recorded.

    Attributes:
      lead: longest silence before the first word, in seconds.
      shortest_gap, longest_gap: silence between words, in seconds; most gaps are near the shortest.
      speed: largest change of speed and pitch together, as a logarithm, of an utterance; each word has up to half of
        it in addition.
      tempo: largest change of speed at an unchanged pitch, as `speed`; word times are then exact to some milliseconds.
      truncate: longest loss at the beginning and at the end of half of the words, in seconds, and at most a quarter of
        the word; imitates recordings that were trimmed by level.
      turn_taking: probability that the speaker changes from one word to the next.
    """

    lead: float = 1.2
    shortest_gap: float = 0.0
    longest_gap: float = 0.9
    speed: float = 0.0
    tempo: float = 0.0
    truncate: float = 0.0
    turn_taking: float = 0.0


def concat_words(
    random: np.random.Generator,
    clips: Sequence[Clip],
    sample_rate: int,
    *,
    seconds: float,
    words: int | None = None,
    prosody: ProsodyConfig = ProsodyConfig(),
) -> tuple[np.ndarray, list[WordSpan]]:
    """Make an utterance by one speaker, or by two who take turns, with silence around it.

    Args:
      random: random generator.
      clips: recordings to draw one or two speakers from, and their words.
      sample_rate: sample rate of the clips, Hz.
      seconds: length of the result.
      words: number of words; None for as many as fit.
      prosody: gaps and changes of the words.

    Returns:
      Samples, float32 [seconds * sample_rate], and the words in order; words that do not fit are left out.
    """
    own = _of_one_speaker(random, clips)
    other = _of_one_speaker(random, clips) if prosody.turn_taking else own
    pcm_T = np.zeros(round(seconds * sample_rate), np.float32)
    at, spans = random.uniform(0, prosody.lead), []
    shortest, longest, most = prosody.shortest_gap, prosody.longest_gap, (prosody.speed, prosody.tempo)
    speeds = np.exp(random.uniform(-1, 1, 2) * most)
    tightness = random.choice([1.0, 2.0, 4.0])
    while words is None or len(spans) < words:
        if prosody.turn_taking and random.random() < prosody.turn_taking:
            own, other = other, own
        clip = own[int(random.integers(len(own)))]
        if prosody.truncate and random.random() < 0.5:
            clip = _truncate(random, clip, prosody.truncate, sample_rate)
        speed, tempo = speeds * np.exp(random.uniform(-0.5, 0.5, 2) * most)
        factor = speed * tempo
        word_T = augment.change_speed(clip.pcm_T, speed)
        if prosody.tempo:
            word_T = augment.change_tempo(word_T, tempo, sample_rate)
        word_T = word_T * (augment.gain(random.uniform(-4, 4)) * 0.1 / augment.rms(word_T))
        first = round(at * sample_rate)
        if first + len(word_T) > len(pcm_T):
            break
        pcm_T[first : first + len(word_T)] += word_T
        spans.append(WordSpan(clip.word, at + clip.start / factor, at + clip.end / factor, clip.speaker))
        at += len(word_T) / sample_rate + shortest + (longest - shortest) * random.random() ** tightness
    return pcm_T, spans


def _of_one_speaker(random: np.random.Generator, clips: Sequence[Clip]) -> list[Clip]:
    speaker = clips[int(random.integers(len(clips)))].speaker
    return [clip for clip in clips if clip.speaker == speaker]


def _truncate(random: np.random.Generator, clip: Clip, most: float, sample_rate: int) -> Clip:
    """Remove the silence around a word, and up to `most` seconds at each end of the word."""
    lost = random.random(2) ** 2 * min(most, (clip.end - clip.start) / 4)
    first, last = round((clip.start + lost[0]) * sample_rate), round((clip.end - lost[1]) * sample_rate)
    pcm_T = clip.pcm_T[first:last]
    return dataclasses.replace(clip, pcm_T=pcm_T, start=0.0, end=len(pcm_T) / sample_rate)


def frame_labels(
    words: Sequence[WordSpan], vocabulary: Sequence[str], *, frames: int, frame_rate: float, parts: int
) -> np.ndarray:
    """Label each frame, int32 [frames], with the part of a word at the frame's middle; 0 is silence.

    Word w of the vocabulary has the labels 1 + w * parts to (w + 1) * parts, from its first part to its last.
    """
    labels_T = np.zeros(frames, np.int32)
    for word in words:
        middles = (np.arange(frames) + 0.5) / frame_rate
        inside_T = (word.start <= middles) & (middles < word.end)
        part_T = np.minimum((middles - word.start) / (word.end - word.start) * parts, parts - 1).astype(np.int32)
        labels_T[inside_T] = (1 + vocabulary.index(word.text) * parts + part_T)[inside_T]
    return labels_T
