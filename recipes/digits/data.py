"""Read the recordings of the recipes and draw training rows from them.

Recordings: the Free Spoken Digit Dataset (six speakers, single digits, 8 kHz), and read sentences, from which the codec
learns speech other than digits.
"""

import csv
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsm_jax import audio
from dsm_jax.configs import MimiConfig, QuantizerConfig, SeanetConfig, TransformerConfig
from dsm_jax.errors import AudioError, ConfigError
from dsm_jax.training.data import WordSpan
from recipes.digits import augment
from recipes.digits.utterances import Clip, ProsodyConfig, concat_words, frame_labels

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PARTS = 3  # labels per word, so that the semantic codebook distinguishes beginning, middle and end
OTHER_SPEECH = 1 + len(WORDS) * PARTS  # label of speech without digits
LABELS = OTHER_SPEECH + 1
CLIP_RATE = 8_000  # sample rate of the single digits, Hz
WIDTH = 96  # width of the codec's latents
ROWS = 1 << 31  # rows that can be drawn, all of them different

# Clips by the number in their file name; the dataset's own test clips, 0 to 4, are never read. A speaker's recordings
# change slowly with the number, so validation and test clips have numbers on either side of the training clips.
TEST_CLIPS = range(5, 8)  # for the figures on the model card
TRAINING_CLIPS = range(8, 47)
VALIDATION_CLIPS = range(47, 50)  # for choosing between recipes
HELD_OUT_SENTENCES = 20  # every twentieth sentence is kept for evaluating the codec

MIMI = MimiConfig(
    seanet=SeanetConfig(dimension=WIDTH, n_filters=8),
    quantizer=QuantizerConfig(dimension=48, n_q=8, bins=256, input_dimension=WIDTH, output_dimension=WIDTH),
    transformer=TransformerConfig(
        d_model=WIDTH,
        num_heads=4,
        num_layers=4,
        dim_feedforward=384,
        context=250,
        layer_scale=0.1,
        input_dimension=WIDTH,
        output_dimensions=(WIDTH,),
    ),
)


def load_clips(folder: Path, numbers: Sequence[int]) -> list[Clip]:
    """Load the clips with these numbers, from files named DIGIT_SPEAKER_NUMBER.flac.

    Raises:
      AudioError: there are no such clips, or a clip cannot be read.
    """
    clips = []
    for path in sorted(folder.glob("*_*_*.flac")):
        digit, speaker, number = path.stem.split("_")
        if int(number) in numbers:
            pcm_T = audio.read(path, CLIP_RATE)
            clips.append(Clip(WORDS[int(digit)], speaker, pcm_T, *augment.active(pcm_T, CLIP_RATE)))
    if not clips:
        raise AudioError(
            f"{folder} holds no clips DIGIT_SPEAKER_NUMBER.flac of numbers {list(numbers)}; name its folder"
        )
    return clips


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A recording of a read sentence."""

    path: Path
    text: str
    pcm_T: np.ndarray

    @functools.cached_property
    def has_digits(self) -> bool:
        """True if the sentence has a digit among its words."""
        return bool(set(re.findall(r"[a-z]+", self.text.lower())) & set(WORDS))


def load_sentences(folder: Path, sample_rate: int, *, held_out: bool) -> list[Sentence]:
    """Load the held-out or the other sentences of a folder with a `transcripts.tsv` (file, seconds, text)."""
    with (folder / "transcripts.tsv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    chosen = [line for i, line in enumerate(lines) if (i % HELD_OUT_SENTENCES == 0) == held_out]
    sentences = []
    for line in chosen:
        path = folder / line["file"]
        sentences.append(Sentence(path, line["text"], audio.read(path, sample_rate)))
    return sentences


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataMix:
    """Kinds of rows with their shares, and settings of the augmentation; all other rows are utterances of digits.

    Attributes:
      sentences: share of rows with read sentences.
      noise: share of rows with background noise alone.
      short: share of utterances with at most five words, followed by silence.
      prosody: settings of the utterances.
      strength, quietest_db: settings of the augmentation, see `augment.augment`.
      oversampled: speakers that are drawn more often than other speakers.
      oversampling: factor by which they are drawn more often.
    """

    sentences: float = 0.3
    noise: float = 0.08
    short: float = 0.3
    prosody: ProsodyConfig = ProsodyConfig(speed=0.15, tempo=0.2)
    strength: float = 1.0
    quietest_db: float = -26.0
    oversampled: tuple[str, ...] = ()
    oversampling: int = 3

    def __post_init__(self) -> None:
        if self.oversampling < 1:
            raise ConfigError(f"oversampling is {self.oversampling}; give 1 or more")


def digits_row(
    random: np.random.Generator, clips: Sequence[Clip], mix: DataMix, *, frames: int, config: MimiConfig = MIMI
) -> tuple[np.ndarray, list[WordSpan]]:
    """Draw an augmented utterance: samples [frames * frame size] at the codec's rate, and its words."""
    seconds = frames / config.frame_rate
    words = None if random.random() >= mix.short else int(random.integers(0, 6))
    pcm_T, spans = concat_words(random, clips, CLIP_RATE, seconds=seconds, words=words, prosody=mix.prosody)
    pcm_T = augment.augment(random, pcm_T, CLIP_RATE, strength=mix.strength, quietest_db=mix.quietest_db)
    return augment.resample(pcm_T, CLIP_RATE, config.sample_rate)[: frames * config.frame_size], spans


def noise_row(random: np.random.Generator, *, frames: int, config: MimiConfig = MIMI) -> np.ndarray:
    """Draw background noise of random level, or sometimes silence."""
    samples = frames * config.frame_size
    if random.random() < 0.15:
        return np.zeros(samples, np.float32)
    rate = CLIP_RATE if random.random() < 0.5 else config.sample_rate
    noise_T = augment.noise(random, samples * rate // config.sample_rate, rate) * augment.gain(random.uniform(-75, -14))
    return np.clip(augment.resample(noise_T, rate, config.sample_rate), -1, 1)


def sentence_row(
    random: np.random.Generator, sentences: Sequence[Sentence], mix: DataMix, *, frames: int, config: MimiConfig = MIMI
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a part of augmented sentences with its labels: speech or silence, or all -1 if a sentence has digits."""
    samples = frames * config.frame_size
    pcm_T, known = np.zeros(0, np.float32), True
    while len(pcm_T) < samples:
        sentence = sentences[int(random.integers(len(sentences)))]
        known = known and not sentence.has_digits
        speech_T = augment.change_speed(sentence.pcm_T, np.exp(random.uniform(-0.15, 0.15)))
        pcm_T = np.concatenate([pcm_T, speech_T, np.zeros(random.integers(config.sample_rate), np.float32)])
    first = random.integers(len(pcm_T) - samples + 1)
    pcm_T = pcm_T[first : first + samples]
    level_N = np.sqrt(np.mean(pcm_T.reshape(frames, -1) ** 2, axis=1))
    labels_N = np.where(level_N > 0.05 * level_N.max(), OTHER_SPEECH, 0) if known else np.full(frames, -1)
    if random.random() < 0.5:  # so that the bandwidth does not distinguish digits from other speech
        pcm_T = augment.resample(augment.resample(pcm_T, config.sample_rate, CLIP_RATE), CLIP_RATE, config.sample_rate)
    pcm_T = augment.augment(random, pcm_T, config.sample_rate, strength=mix.strength, quietest_db=mix.quietest_db)
    return pcm_T, labels_N.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Dataset:
    """Random rows from recordings; `rows[i]` is always the same row."""

    clips: Sequence[Clip]
    sentences: Sequence[Sentence]
    frames: int
    seed: tuple[int, ...]
    mix: DataMix = DataMix()
    config: MimiConfig = MIMI

    def __len__(self) -> int:
        return ROWS

    @functools.cached_property
    def _oversampled(self) -> list[Clip]:
        # An utterance's speaker is the speaker of a random clip, so repeated clips make a speaker more frequent.
        mix = self.mix
        return [clip for clip in self.clips for _ in range(mix.oversampling if clip.speaker in mix.oversampled else 1)]

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng((*self.seed, index))


class CodecDataset(_Dataset):
    """Training rows of the codec."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Draw one row: `pcm_BT` and `labels_BN` without their batch axis."""
        random = self._random(index)
        kind = random.random()
        if kind < self.mix.sentences:
            pcm_T, labels_N = sentence_row(random, self.sentences, self.mix, frames=self.frames, config=self.config)
        elif kind < self.mix.sentences + self.mix.noise:
            pcm_T, labels_N = noise_row(random, frames=self.frames, config=self.config), np.zeros(self.frames, np.int32)
        else:
            pcm_T, words = digits_row(random, self._oversampled, self.mix, frames=self.frames, config=self.config)
            labels_N = frame_labels(words, WORDS, frames=self.frames, frame_rate=self.config.frame_rate, parts=PARTS)
        return {"pcm_BT": pcm_T.astype(np.float32), "labels_BN": labels_N}


class SttDataset(_Dataset):
    """Training rows of the language model of `digits`."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[WordSpan]]:
        """Draw samples [frames * frame size] at the codec's rate, and their digits."""
        random = self._random(index)
        kind = random.random()
        if kind < self.mix.sentences:
            other = [sentence for sentence in self.sentences if not sentence.has_digits]
            return sentence_row(random, other, self.mix, frames=self.frames, config=self.config)[0], []
        if kind < self.mix.sentences + self.mix.noise:
            return noise_row(random, frames=self.frames, config=self.config), []
        return digits_row(random, self._oversampled, self.mix, frames=self.frames, config=self.config)


def plain_utterances(clips: Sequence[Clip], count: int, *, seed: int = 0) -> list[tuple[np.ndarray, list[WordSpan]]]:
    """Make utterances of 3 to 9 digits without augmentation, for evaluation: samples at the codec's rate, and words."""
    prosody, utterances = ProsodyConfig(lead=0.5, shortest_gap=0.05, longest_gap=0.5), []
    for i in range(count):
        random = np.random.default_rng((seed, 4, i))
        words = int(random.integers(3, 10))
        pcm_T, spans = concat_words(random, clips, CLIP_RATE, seconds=15.0, words=words, prosody=prosody)
        end = round((spans[-1].end + random.uniform(0.1, 0.6)) * CLIP_RATE)
        utterances.append((augment.resample(pcm_T[:end], CLIP_RATE, MIMI.sample_rate), spans))
    return utterances
