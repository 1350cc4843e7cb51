"""Cut long recordings into parts that fit a row, between words.

Shape letters: T samples.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from dsm_jax import audio
from dsm_jax.training.data import Recording, WordSpan

LONGEST_WORD_S = 2


def cut(words: Sequence[WordSpan], samples: int, sample_rate: int, longest: int) -> list[int]:
    """Cut a recording into parts of at most `longest` samples: between words, unless the words overlap.

    Args:
      words: words in the order of their starts. Words are shortened to two seconds, as words of this library's
        transcripts last until the next word, pauses included, and to half a part.
      samples: length of the recording.
      sample_rate: sample rate of the recording, Hz.
      longest: most samples of a part.

    Returns:
      Rising positions in samples, the first 0 and the last the recording's end.
    """
    most = min(LONGEST_WORD_S * sample_rate, longest // 2)
    starts = [round(word.start * sample_rate) for word in words]
    ends = [min(round(word.end * sample_rate), start + most) for word, start in zip(words, starts, strict=True)]
    cuts = [0]
    while samples - cuts[-1] > longest:
        latest, spoken_until = cuts[-1] + longest, cuts[-1]
        place = latest
        for start, end in zip(starts, ends, strict=True):
            if start < latest < end:  # and after the last cut, as no word is longer than half a part
                place = max((min(spoken_until, start) + start + 1) // 2, start - sample_rate // 2)
                break
            spoken_until = max(spoken_until, end)
        cuts.append(place)
    return [*cuts, samples]


def spans_of(
    words: Sequence[WordSpan], samples: int, sample_rate: int, longest: int
) -> Iterator[tuple[int, int, list[WordSpan]]]:
    """Cut a recording as `cut` does; yield the first sample, the end and the words of each part."""
    for first, end in itertools.pairwise(cut(words, samples, sample_rate, longest)):
        yield (
            first,
            end,
            [
                WordSpan(word.text, word.start - first / sample_rate, word.end - first / sample_rate, word.speaker)
                for word in words
                # The last word may start after the recording's end.
                if first <= round(word.start * sample_rate)
                and (round(word.start * sample_rate) < end or end == samples)
            ],
        )


def parts_of(recording: Recording, sample_rate: int, longest: int) -> Iterator[tuple[np.ndarray, list[WordSpan]]]:
    """Cut a recording into parts of at most `longest` samples; yield the samples and the words of each.

    Raises:
      AudioError: the recording cannot be read.
    """
    pcm_T = audio.read(recording.audio, sample_rate, strict=True)
    for first, end, words in spans_of(recording.words, pcm_T.size, sample_rate, longest):
        yield pcm_T[first:end], words
