"""Utterance concatenated from clips: words, times and speakers; the same seed gives the same utterance.

Shape letters: T samples or frames.
"""

import itertools

import numpy as np
import pytest

from dsm_jax.training.data import WordSpan
from recipes.digits import augment
from recipes.digits.utterances import Clip, ProsodyConfig, concat_words, frame_labels

RATE = 8_000
WORDS = ("one", "two", "three")


def clips(random: np.random.Generator) -> list[Clip]:
    """Make six clips of noise, which resembles nothing else, by two speakers, with silence at both ends."""
    made = []
    for word in WORDS:
        for speaker in ("ann", "bob"):
            said_T = random.normal(size=random.integers(2_000, 3_000)).astype(np.float32)
            # Low enough to stay in band at any speed.
            said_T = np.convolve(said_T, np.hanning(17), "same").astype(np.float32)
            pcm_T = np.concatenate([np.zeros(400, np.float32), said_T, np.zeros(800, np.float32)])
            made.append(Clip(word, speaker, pcm_T, 400 / RATE, (400 + len(said_T)) / RATE))
    return made


def speaker_of(pcm_T: np.ndarray, word: WordSpan, given: list[Clip]) -> str:
    """Find the speaker whose clip is at a word's times; fail if there is none."""
    for clip in given:
        factor = (clip.end - clip.start) / (word.end - word.start)
        if clip.word != word.text or not 0.5 < factor < 2:
            continue
        said_T = augment.change_speed(clip.pcm_T, factor)
        first = round((word.start - clip.start / factor) * RATE)
        heard_T = pcm_T[first : first + len(said_T)]
        if len(heard_T) == len(said_T) and np.corrcoef(heard_T, said_T)[0, 1] > 0.98:
            return clip.speaker
    raise AssertionError(f"{word} is not there")


@pytest.mark.parametrize("speed", [0.0, 0.15])
def test_words_lie_at_their_times_by_one_speaker_and_do_not_overlap(speed):
    speakers = set()
    for seed in range(10):
        random = np.random.default_rng(seed)
        given = clips(random)
        pcm_T, words = concat_words(random, given, RATE, seconds=4.0, prosody=ProsodyConfig(speed=speed))
        assert (pcm_T.dtype, pcm_T.shape) == (np.float32, (4 * RATE,))
        assert 2 <= len(words) <= 10
        heard = {speaker_of(pcm_T, word, given) for word in words}
        assert len(heard) == 1
        speakers |= heard
        times = [time for word in words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert times[0] >= 0
        assert times[-1] <= 4.0
        silent_T = np.ones(len(pcm_T), bool)
        for word in words:
            silent_T[int(word.start * RATE) - 20 : int(word.end * RATE) + 20] = False
        assert np.abs(pcm_T[silent_T]).max() < 0.02 * np.abs(pcm_T).max(), "nothing is said between words"
    assert speakers == {"ann", "bob"}


def test_a_change_of_tempo_moves_words_and_their_times_together():
    given = clips(np.random.default_rng(0))
    lengths = {clip.word + clip.speaker: clip.end - clip.start for clip in given}
    factors = []
    for seed in range(10):
        pcm_T, words = concat_words(
            np.random.default_rng(seed), given, RATE, seconds=4.0, prosody=ProsodyConfig(tempo=0.2)
        )
        silent_T = np.ones(len(pcm_T), bool)
        for word in words:
            silent_T[int(word.start * RATE) - 120 : int(word.end * RATE) + 120] = False
            factors.append((word.end - word.start) / np.mean([lengths[word.text + who] for who in ("ann", "bob")]))
        assert np.abs(pcm_T[silent_T]).max() < 0.05 * np.abs(pcm_T).max(), "nothing is said between words"
    assert min(factors) < 0.9
    assert max(factors) > 1.1


@pytest.mark.parametrize(("cut", "share"), [(0.05, 1.0), (1.0, 0.25)])
def test_half_of_the_words_are_truncated_and_their_times_follow(cut, share):
    given, lost = clips(np.random.default_rng(0)), []
    for seed in range(20):
        pcm_T, words = concat_words(
            np.random.default_rng(seed), given, RATE, seconds=4.0, prosody=ProsodyConfig(truncate=cut)
        )
        silent_T = np.ones(len(pcm_T), bool)
        for word in words:
            heard = slice(round(word.start * RATE), round(word.end * RATE))
            silent_T[heard] = False
            clip = next(clip for clip in given if (clip.word, clip.speaker) == (word.text, word.speaker))
            said_T, heard_T = clip.pcm_T[round(clip.start * RATE) : round(clip.end * RATE)], pcm_T[heard]
            first = int(np.correlate(said_T, heard_T, "valid").argmax())
            likeness = np.corrcoef(said_T[first : first + len(heard_T)], heard_T)[0, 1]
            assert likeness > 0.999, "what is heard is part of the clip, at its time"
            most = min(cut * RATE, share * len(said_T))
            lost.append((first / most, (len(said_T) - first - len(heard_T)) / most))
        assert np.abs(pcm_T[silent_T]).max() < 0.02 * np.abs(pcm_T).max(), "nothing is heard beside words"
    assert 0.35 < np.any(lost, axis=1).mean() < 0.65
    assert np.all(np.max(lost, axis=0) > 0.8)
    assert np.all(np.max(lost, axis=0) <= 1.01)


def test_two_speakers_take_turns_and_each_word_has_its_speaker():
    given, alone, turns = clips(np.random.default_rng(0)), 0, 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        pcm_T, words = concat_words(random, given, RATE, seconds=6.0, prosody=ProsodyConfig(turn_taking=0.5))
        who = [word.speaker for word in words]
        assert who == [speaker_of(pcm_T, word, given) for word in words]
        alone += len(set(who)) == 1
        turns += sum(a != b for a, b in itertools.pairwise(who))
    assert 0 < alone < 10, "both that are drawn may be one"
    assert turns > 10


def test_an_utterance_is_the_same_for_the_same_seed():
    def made(seed: int) -> tuple[np.ndarray, list[WordSpan]]:
        return concat_words(
            np.random.default_rng(seed),
            clips(np.random.default_rng(0)),
            RATE,
            seconds=3.0,
            prosody=ProsodyConfig(speed=0.15),
        )

    (pcm_T, words), (again_T, same), (other_T, _) = made(1), made(1), made(2)
    np.testing.assert_array_equal(pcm_T, again_T)
    assert words == same
    assert not np.array_equal(pcm_T, other_T)


def test_words_that_do_not_fit_are_left_out():
    random = np.random.default_rng(0)
    given = clips(random)
    prosody = ProsodyConfig(lead=0.0, shortest_gap=0.1, longest_gap=0.1)
    for seconds, most in ((0.2, 0), (0.8, 1), (1.6, 3)):
        pcm_T, words = concat_words(random, given, RATE, seconds=seconds, words=10, prosody=prosody)
        assert len(words) <= most
        assert len(pcm_T) == round(seconds * RATE)
        assert bool(words) == pcm_T.any()
    pcm_T, words = concat_words(random, given, RATE, seconds=10.0, words=2, prosody=prosody)
    assert len(words) == 2
    pcm_T, words = concat_words(random, given, RATE, seconds=1.0, words=0)
    assert words == []
    assert not pcm_T.any()


def test_gaps_between_clips_lie_in_their_range():
    random = np.random.default_rng(0)
    given = clips(random)
    prosody = ProsodyConfig(lead=0.3, shortest_gap=0.2, longest_gap=0.5)
    found = []
    for _ in range(10):
        _, words = concat_words(random, given, RATE, seconds=6.0, prosody=prosody)
        assert 400 / RATE <= words[0].start <= 0.3 + 400 / RATE
        # A clip has 0.1 s of silence after its word, and 0.05 s before.
        found += [b.start - a.end - 0.15 for a, b in itertools.pairwise(words)]
    assert 0.2 - 1e-6 < min(found) < 0.25
    assert 0.4 < max(found) < 0.5 + 1e-6


def test_labels_are_those_of_the_middle_of_each_frame():
    random = np.random.default_rng(0)
    for parts in (1, 3):
        _, words = concat_words(random, clips(random), RATE, seconds=4.0)
        labels_T = frame_labels(words, WORDS, frames=50, frame_rate=12.5, parts=parts)
        assert (labels_T.dtype, labels_T.shape) == (np.int32, (50,))
        for frame, label in enumerate(labels_T):
            middle, wanted = (frame + 0.5) / 12.5, 0
            for word in words:
                for part in range(parts):
                    length = (word.end - word.start) / parts
                    if word.start + part * length <= middle < word.start + (part + 1) * length:
                        wanted = 1 + WORDS.index(word.text) * parts + part
            assert label == wanted
        assert len(set(labels_T.tolist())) > parts
