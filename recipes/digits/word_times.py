"""Print how far the times of words are from the truth, in utterances with long pauses."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

import dsm_jax
from dsm_jax.evaluation.metrics import correct_words
from dsm_jax.training.data import WordSpan
from recipes.digits import augment
from recipes.digits.data import CLIP_RATE, MIMI, TEST_CLIPS, load_clips
from recipes.digits.utterances import Clip

RATE = MIMI.sample_rate
STRINGS = 200
PAUSES = 0.5, 20.0  # seconds; as many between 0.5 and 3.2 as above
CHUNK = 0.08  # seconds that a live stream sends at once
DEEP = 0.5  # seconds; an end that lies further in a pause is counted


@dataclasses.dataclass(frozen=True)
class Deviations:
    """Differences in seconds, found minus true, of the words that were transcribed, and what a live stream told.

    Attributes:
      starts, ends: of each word.
      late: from the end of a word's sound to the chunk with which a stream told that the word has ended, of each word.
      same: number of recordings whose stream gave the words and times of the whole recording.
      recordings, words: numbers of recordings and of words in them.
    """

    starts: np.ndarray
    ends: np.ndarray
    late: np.ndarray
    same: int
    recordings: int
    words: int

    def __str__(self) -> str:
        ends, starts = (
            f"{kind} off by {1e3 * np.median(off):.0f} ms (median), {1e3 * np.quantile(off, 0.95):.0f} ms (95 %)"
            for kind, off in (("ends", np.abs(self.ends)), ("starts", np.abs(self.starts)))
        )
        return (
            f"{self.recordings} recordings with pauses, {len(self.ends)} of {self.words} words: {ends}; {starts}; "
            f"{int((self.ends > DEEP).sum())} ends over {DEEP} s in a pause; {self.same} streams equal the whole "
            f"recording; words end {self.late.max():.2f} s after their sound at the latest"
        )


def with_pauses(random: np.random.Generator, clips: Sequence[Clip]) -> tuple[np.ndarray, list[WordSpan]]:
    """Concatenate three to five clips of one speaker, with a pause before each: samples at `RATE`, and words."""
    speaker = clips[int(random.integers(len(clips)))].speaker
    own = [clip for clip in clips if clip.speaker == speaker]
    parts, spans, at = [], [], 0
    for _ in range(int(random.integers(3, 6))):
        pause = round(float(np.exp(random.uniform(*np.log(PAUSES)))) * CLIP_RATE)
        clip = own[int(random.integers(len(own)))]
        first, last = round(clip.start * CLIP_RATE), round(clip.end * CLIP_RATE)
        parts += [np.zeros(pause, np.float32), clip.pcm_T[first:last] * (0.1 / augment.rms(clip.pcm_T))]
        spans.append(WordSpan(clip.word, (at + pause) / CLIP_RATE, (at + pause + last - first) / CLIP_RATE, speaker))
        at += pause + last - first
    pcm_T = np.concatenate([*parts, np.zeros(2 * CLIP_RATE, np.float32)])
    return augment.resample(pcm_T, CLIP_RATE, RATE), spans


def live_words(model: dsm_jax.Model, pcm_T: np.ndarray, *, chunk: float) -> list[tuple[dsm_jax.Word, float]]:
    """Transcribe a recording that arrives in chunks of so many seconds.

    Returns:
      The words, and the seconds that had been sent when the stream told that the word has ended.
    """
    sent = 0.0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal sent
        size = round(chunk * RATE)
        for i in range(0, len(pcm_T), size):
            sent = min(i + size, len(pcm_T)) / RATE
            yield pcm_T[i : i + size]

    events = dsm_jax.transcribe_stream(model, chunks())
    return [(event.word, sent) for event in events if isinstance(event, dsm_jax.WordEnded)]


def times(words: Iterable[dsm_jax.Word]) -> list[tuple[str, float, float]]:
    """Drop the words' probabilities, whose last digits depend on the shapes of batches."""
    return [(word.text, word.start, word.end) for word in words]


def matches(spans: Sequence[WordSpan], words: Iterable[dsm_jax.Word]) -> Iterator[tuple[int, int]]:
    """Yield the positions of equal words in an alignment with the fewest edits."""
    return correct_words([span.text for span in spans], [word.text.lower() for word in words])


def deviations(model: dsm_jax.Model, utterances: Sequence[tuple[np.ndarray, list[WordSpan]]]) -> Deviations:
    """Transcribe recordings, whole and live, and compare the times of their words with the truth."""
    whole = dsm_jax.transcribe(model, [pcm_T for pcm_T, _ in utterances])
    starts, ends, late, same = [], [], [], 0
    for (pcm_T, spans), transcript in zip(utterances, whole, strict=True):
        live = live_words(model, pcm_T, chunk=CHUNK)
        same += times(transcript.words) == times(word for word, _ in live)
        for i, j in matches(spans, transcript.words):
            starts.append(transcript.words[j].start - spans[i].start)
            ends.append(transcript.words[j].end - spans[i].end)
        for i, j in matches(spans, (word for word, _ in live)):
            late.append(live[j][1] - spans[i].end)
    words = sum(len(spans) for _, spans in utterances)
    return Deviations(np.array(starts), np.array(ends), np.array(late), same, len(utterances), words)


def print_word_times(model: dsm_jax.Model, fsdd: Path, *, strings: int = STRINGS) -> None:
    """Print the deviations of word times in `strings` utterances of test clips."""
    clips, random = load_clips(fsdd, TEST_CLIPS), np.random.default_rng(7)
    print(deviations(model, [with_pauses(random, clips) for _ in range(strings)]))
