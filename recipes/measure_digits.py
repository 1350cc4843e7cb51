"""Prints the figures of the model card of `digits`.

Usage: python recipes/measure_digits.py DATA [WHISPER], where DATA holds fsdd, kathleen and ljspeech, and WHISPER is a
folder with a model of faster-whisper (installed separately), for the word error rate of decoded sentences.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import dsm_jax
from dsm_jax import audio, codec
from dsm_jax.stt.transcript import Transcript
from dsm_jax.training import digits, manifest, sounds
from dsm_jax.training.compose import Spoken
from dsm_jax.training.digits import plain_strings
from dsm_jax.training.measure import compare_all, measure
from dsm_jax.training.spectral import mel_distance, si_sdr

RATE = digits.MIMI.sample_rate
STRINGS = 1200  # in which each of the 180 takes is said forty times: in 300, one that is misheard is half a percent
NOISY = 300  # of them, with noise too
SENTENCES = 18  # of each reader

Recogniser = Callable[[np.ndarray], Transcript]


def words_heard(model: dsm_jax.Model, strings: list[tuple[np.ndarray, list[Spoken]]]) -> None:
    """Word errors: as recorded, live, by speaker, in noise."""
    print(f"as recorded, {len(strings)} strings: {measure(model, strings)}")
    offline = dsm_jax.transcribe(model, [pcm_T for pcm_T, _ in strings[:40]])
    live = [listen(model, pcm_T) for pcm_T, _ in strings[:40]]
    same = sum(told(whole.words) == told(words) for whole, words in zip(offline, live, strict=True))
    print(f"live, in chunks of 37 ms: {same} of {len(live)} strings give the same words and times")
    for db in (30, 20, 10, 5):
        mixed = [(noisy(i, pcm_T, db), words) for i, (pcm_T, words) in enumerate(strings[:NOISY])]
        print(f"with noise {db} dB below: {measure(model, mixed)}")


def listen(model: dsm_jax.Model, pcm_T: np.ndarray) -> list[dsm_jax.Word]:
    """The words of a recording that comes in small chunks."""
    size = RATE * 37 // 1000
    chunks = (pcm_T[i : i + size] for i in range(0, len(pcm_T), size))
    return [event.word for event in dsm_jax.stream(model, chunks) if isinstance(event, dsm_jax.WordEnded)]


def told(words: Sequence[dsm_jax.Word]) -> list[tuple[str, float, float]]:
    """What was said when; probabilities differ in the last digit, as sums of other shapes round otherwise."""
    return [(word.text, word.start, word.end) for word in words]


def noisy(seed: int, pcm_T: np.ndarray, db: float) -> np.ndarray:
    """The recording with noise so many decibels below it."""
    noise_T = sounds.noise(np.random.default_rng((seed, 5)), len(pcm_T), RATE)
    mixed_T = pcm_T + sounds.rms(pcm_T) * sounds.gain(-db) * noise_T
    return (mixed_T / max(1.0, np.abs(mixed_T).max())).astype(np.float32)


def by_speaker(model: dsm_jax.Model, folder: Path) -> None:
    """Word errors of each of the six speakers."""
    takes = digits.load_takes(folder, digits.TEST_TAKES)
    for speaker in sorted({take.speaker for take in takes}):
        own = [take for take in takes if take.speaker == speaker]
        print(f"{speaker}: {measure(model, plain_strings(own, 50, seed=1))}")


def nothing_heard(model: dsm_jax.Model) -> None:
    """Words heard where none are said: 30 s of silence, and of brown noise and five others at four levels."""
    silence = [np.zeros(30 * RATE, np.float32)]
    kinds = [brown(np.random.default_rng(6))]
    kinds += [sounds.noise(np.random.default_rng((6, i)), 30 * RATE, RATE) for i in range(5)]
    rooms = [np.clip(noise_T * sounds.gain(db), -1, 1) for noise_T in kinds for db in (-70, -50, -35, -20)]
    heard = [len(t.words) for t in dsm_jax.transcribe(model, silence + rooms)]
    print(f"30 s of silence: {heard[0]} words; {len(rooms)} noises of 30 s: {sum(heard[1:])} words in all, {heard[1:]}")


def brown(random: np.random.Generator) -> np.ndarray:
    """30 s of rumble, rms 1: white noise added up, most of whose power is below 1 Hz."""
    noise_T = np.cumsum(random.normal(size=30 * RATE))
    noise_T -= noise_T.mean()
    return (noise_T / sounds.rms(noise_T)).astype(np.float32)


def codec_kept(model: dsm_jax.Model, data: Path, recognise: Recogniser | None) -> None:
    """What the codec keeps of sentences that training did not hear."""
    for name in ("kathleen", "ljspeech"):
        sentences = digits.load_sentences(data / name, RATE, held_out=True)[:SENTENCES]
        kept = []
        distances: list[tuple[float, float]] = []
        for sentence in sentences:
            decoded_T = codec.decode(model, codec.encode(model, sentence.pcm_T))[: len(sentence.pcm_T)]
            pair = jnp.asarray(sentence.pcm_T)[None], jnp.asarray(decoded_T)[None]
            distances.append((float(mel_distance(*pair, sample_rate=RATE)[0]), float(si_sdr(*pair)[0])))
            kept.append(decoded_T)
        mel, sdr = np.mean(distances, axis=0)
        false_words = sum(len(t.words) for t in dsm_jax.transcribe(model, [s.pcm_T for s in sentences]))
        seconds = sum(len(s.pcm_T) for s in sentences) / RATE
        print(f"{name}, {len(sentences)} sentences: mel distance {mel:.3f}, SI-SDR {sdr:.1f} dB", end="")
        print(f"; the language model hears {false_words} digits in {seconds:.0f} s of them")
        if recognise:
            for kind, clips in (("original", [s.pcm_T for s in sentences]), ("decoded", kept)):
                pairs = zip(sentences, clips, strict=True)
                figures = compare_all((spoken(sentence.text), recognise(clip_T)) for sentence, clip_T in pairs)
                print(f"  whisper on the {kind}: word error rate {100 * figures.word_error_rate:.1f} %")


def digits_kept(
    model: dsm_jax.Model, strings: list[tuple[np.ndarray, list[Spoken]]], recognise: Recogniser | None
) -> None:
    """What is heard of strings that went through the codec, against what is heard of them as recorded."""
    decoded = [(codec.decode(model, codec.encode(model, pcm_T))[: len(pcm_T)], words) for pcm_T, words in strings]
    for kind, clips in (("as recorded", strings), ("decoded", decoded)):
        print(f"{len(clips)} strings {kind}: {measure(model, clips)}")
        if recognise:
            figures = compare_all((words, spelt(recognise(pcm_T))) for pcm_T, words in clips)
            print(f"  whisper: word error rate {100 * figures.word_error_rate:.1f} %")


def spelt(transcript: Transcript) -> Transcript:
    """What Whisper wrote of digits, with numbers as words: "8 41" as "eight four one"."""
    numbers = {str(number): word for number, word in enumerate(digits.WORDS)}
    words = [numbers.get(part, part) for word in transcript.words for part in re.findall(r"[0-9]|[a-z']+", word.text)]
    return dataclasses.replace(transcript, words=tuple(dsm_jax.Word(word, 0.0, 0.0, 1.0) for word in words))


def spoken(text: str) -> list[Spoken]:
    """A transcript's words, without punctuation or times."""
    return [Spoken(word, 0.0, 0.0) for word in re.findall(r"[a-z0-9']+", text.lower())]


def recogniser(folder: Path) -> Recogniser:
    """A function that transcribes samples with faster-whisper."""
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type="float32")

    def recognise(pcm_T: np.ndarray) -> Transcript:
        segments, _ = model.transcribe(sounds.resample(pcm_T, RATE, 16_000), language="en", beam_size=5)
        words = spoken(" ".join(segment.text for segment in segments))
        return Transcript("", tuple(dsm_jax.Word(w.text, 0.0, 0.0, 1.0) for w in words), (), 0.0, None, None, "whisper")

    return recognise


def other_voice(model: dsm_jax.Model) -> None:
    """Word errors on the voice of `examples/new_speaker`, before any fine-tuning."""
    recordings = manifest.read(Path(__file__).parents[1] / "examples/new_speaker/test", RATE)
    strings = [(audio.read(recording.audio), recording.words) for recording in recordings]
    print(f"a voice it never heard (synthetic): {measure(model, strings)}")


def main(data: Path, whisper: Path | None) -> None:
    """Prints everything."""
    model = dsm_jax.load("digits")
    strings = plain_strings(digits.load_takes(data / "fsdd", digits.TEST_TAKES), STRINGS)
    words_heard(model, strings)
    by_speaker(model, data / "fsdd")
    nothing_heard(model)
    other_voice(model)
    recognise = recogniser(whisper) if whisper else None
    digits_kept(model, strings[:100], recognise)
    codec_kept(model, data, recognise)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
