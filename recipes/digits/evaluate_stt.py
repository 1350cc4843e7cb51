"""Print the figures of the model card of `digits`: word errors and times, words in noise, quality of the codec."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import dsm_jax
from dsm_jax import audio, codec
from dsm_jax.evaluation.metrics import corpus_wer
from dsm_jax.training.data import WordSpan, read_recordings
from recipes.digits import augment
from recipes.digits.data import MIMI, TEST_CLIPS, load_clips, load_sentences, plain_utterances
from recipes.digits.metrics import mel_distance, si_sdr
from recipes.digits.whisper import Recogniser, spell_numbers, whisper, words_of
from recipes.digits.word_errors import evaluate, word_errors
from recipes.digits.word_times import live_words, print_word_times, times

RATE = MIMI.sample_rate
UTTERANCES = 1200  # each of the 180 clips occurs forty times; in 300 utterances, one clip alone is half a percent
NOISY = 300  # number of the utterances that are also evaluated with noise
SENTENCES = 18  # sentences of each reader
NEW_SPEAKER = Path(__file__).parents[2] / "examples/new_speaker/test"

Utterances = list[tuple[np.ndarray, list[WordSpan]]]


def print_word_errors(model: dsm_jax.Model, utterances: Utterances) -> None:
    """Print word errors of utterances as recorded and with noise, and compare streaming with offline."""
    print(f"as recorded, {len(utterances)} utterances: {evaluate(model, utterances)}")
    offline = dsm_jax.transcribe(model, [pcm_T for pcm_T, _ in utterances[:40]])
    streamed = [[word for word, _ in live_words(model, pcm_T, chunk=0.037)] for pcm_T, _ in utterances[:40]]
    same = sum(times(whole.words) == times(words) for whole, words in zip(offline, streamed, strict=True))
    print(f"streamed in chunks of 37 ms: {same} of {len(streamed)} utterances give the same words and times")
    for db in (30, 20, 10, 5):
        mixed = [(add_noise(i, pcm_T, db), words) for i, (pcm_T, words) in enumerate(utterances[:NOISY])]
        print(f"with noise {db} dB below: {evaluate(model, mixed)}")


def add_noise(seed: int, pcm_T: np.ndarray, db: float) -> np.ndarray:
    """Add noise `db` decibels below the recording."""
    noise_T = augment.noise(np.random.default_rng((seed, 5)), len(pcm_T), RATE)
    mixed_T = pcm_T + augment.rms(pcm_T) * augment.gain(-db) * noise_T
    return (mixed_T / max(1.0, np.abs(mixed_T).max())).astype(np.float32)


def print_errors_by_speaker(model: dsm_jax.Model, folder: Path) -> None:
    """Print word errors of each of the six speakers."""
    clips = load_clips(folder, TEST_CLIPS)
    for speaker in sorted({clip.speaker for clip in clips}):
        own = [clip for clip in clips if clip.speaker == speaker]
        print(f"{speaker}: {evaluate(model, plain_utterances(own, 50, seed=1))}")


def print_false_words(model: dsm_jax.Model) -> None:
    """Print the numbers of words transcribed from 30 s of silence, and from six noises at four levels."""
    silence = [np.zeros(30 * RATE, np.float32)]
    kinds = [brown_noise(np.random.default_rng(6))]
    kinds += [augment.noise(np.random.default_rng((6, i)), 30 * RATE, RATE) for i in range(5)]
    noises = [np.clip(noise_T * augment.gain(db), -1, 1) for noise_T in kinds for db in (-70, -50, -35, -20)]
    words = [len(t.words) for t in dsm_jax.transcribe(model, silence + noises)]
    print(f"30 s of silence: {words[0]} words; {len(noises)} noises of 30 s: {sum(words[1:])} words, {words[1:]}")


def brown_noise(random: np.random.Generator) -> np.ndarray:
    """Make 30 s of brown noise of rms 1: summed white noise, most of whose power is below 1 Hz."""
    noise_T = np.cumsum(random.normal(size=30 * RATE))
    noise_T -= noise_T.mean()
    return (noise_T / augment.rms(noise_T)).astype(np.float32)


def print_codec_quality(model: dsm_jax.Model, data: Path, recognise: Recogniser | None) -> None:
    """Print the quality of decoded held-out sentences."""
    for name in ("kathleen", "ljspeech"):
        sentences = load_sentences(data / name, RATE, held_out=True)[:SENTENCES]
        decoded = []
        distances: list[tuple[float, float]] = []
        for sentence in sentences:
            decoded_T = codec.decode(model, codec.encode(model, sentence.pcm_T))[: len(sentence.pcm_T)]
            pair = jnp.asarray(sentence.pcm_T)[None], jnp.asarray(decoded_T)[None]
            distances.append((float(mel_distance(*pair, sample_rate=RATE)[0]), float(si_sdr(*pair)[0])))
            decoded.append(decoded_T)
        mel, sdr = np.mean(distances, axis=0)
        false_words = sum(len(t.words) for t in dsm_jax.transcribe(model, [s.pcm_T for s in sentences]))
        seconds = sum(len(s.pcm_T) for s in sentences) / RATE
        print(f"{name}, {len(sentences)} sentences: mel distance {mel:.3f}, SI-SDR {sdr:.1f} dB", end="")
        print(f"; {false_words} digits transcribed from {seconds:.0f} s of them")
        if recognise:
            for kind, clips in (("original", [s.pcm_T for s in sentences]), ("decoded", decoded)):
                pairs = zip(sentences, clips, strict=True)
                found = word_errors((words_of(sentence.text), recognise(clip_T)) for sentence, clip_T in pairs)
                print(f"  whisper on the {kind}: word error rate {100 * corpus_wer(found.errors):.1f} %")


def print_errors_of_decoded(model: dsm_jax.Model, utterances: Utterances, recognise: Recogniser | None) -> None:
    """Print word errors of utterances, of the recordings and after the codec."""
    decoded = [(codec.decode(model, codec.encode(model, pcm_T))[: len(pcm_T)], words) for pcm_T, words in utterances]
    for kind, clips in (("as recorded", utterances), ("decoded", decoded)):
        print(f"{len(clips)} utterances {kind}: {evaluate(model, clips)}")
        if recognise:
            found = word_errors((words, spell_numbers(recognise(pcm_T))) for pcm_T, words in clips)
            print(f"  whisper: word error rate {100 * corpus_wer(found.errors):.1f} %")


def print_errors_of_new_speaker(model: dsm_jax.Model) -> None:
    """Print word errors on the voice of `examples/new_speaker`, before any fine-tuning."""
    recordings = read_recordings(NEW_SPEAKER, RATE)
    utterances = [(audio.read(recording.audio), recording.words) for recording in recordings]
    print(f"a new, synthetic voice: {evaluate(model, utterances)}")


def evaluate_digits(name: str, data: Path, whisper_folder: Path | None) -> None:
    """Print every figure of the model card.

    Args:
      name: the model, as for `dsm_jax.load`.
      data: a folder with `fsdd`, `kathleen` and `ljspeech`.
      whisper_folder: a model of faster-whisper to compare with; None omits its figures.
    """
    model = dsm_jax.load(name)
    utterances = plain_utterances(load_clips(data / "fsdd", TEST_CLIPS), UTTERANCES)
    print_word_errors(model, utterances)
    print_word_times(model, data / "fsdd")
    print_errors_by_speaker(model, data / "fsdd")
    print_false_words(model)
    print_errors_of_new_speaker(model)
    recognise = whisper(whisper_folder) if whisper_folder else None
    print_errors_of_decoded(model, utterances[:100], recognise)
    print_codec_quality(model, data, recognise)
