"""Fine-tune a text-to-speech model on a new voice, and count the errors of its speech before and after.

Each recording needs a JSON file of the same name with the words and their times, as for `examples/finetune.py`. Without
arguments, the example trains `digits-tts` on the synthetic voice of `examples/new_speaker`. `digits` transcribes the
speech, and also the speaker's own recordings after the codec: speech that imitates the voice perfectly would have as
many errors as these (docs/decisions/0024-errors-of-a-new-voice.md).

The voices of `digits-tts` are one-hot vectors, so a new speaker has no embedding. The example draws a random unit
vector, which is neither a voice of the model nor a blend of voices. For a published model, give the speaker's embedding
with --voice.

A few recordings make a model learn by heart which words follow each other, and forget its other voices. So it is
trained on their words in random orders, half of them cut from the recordings and half of them said by the model itself
in its own voices. That is for words that are spoken apart, as here; for sentences, --orders 0 takes the recordings.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

import dsm_jax
from dsm_jax import audio
from dsm_jax.evaluation import Evaluation, Sample
from dsm_jax.training.data import WordSpan, read_recordings
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.step import OptimizerConfig
from dsm_jax.tts import Request, Speech, SpokenWord, read_voice, synthesize_each, voices_of
from dsm_jax.tts.voices import write_voices

DATA = Path(__file__).parent / "new_speaker"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA / "train", help="recordings to train on")
    parser.add_argument("--validation", type=Path, default=DATA / "test", help="recordings to evaluate the loss on")
    parser.add_argument("--model", default="digits-tts")
    parser.add_argument("--voice", type=Path, help="safetensors file of the new voice; without it, a random vector")
    parser.add_argument("--output", type=Path, default=Path("out/new_voice"), help="checkpoints, curve and model")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapters; 0 trains the whole model")
    parser.add_argument(
        "--strength", type=float, default=0.4, help="share of what the adapters have learnt that is kept"
    )
    parser.add_argument("--sentences", type=int, default=100, help="utterances to count errors on")
    parser.add_argument("--orders", type=int, default=240, help="random orders of words of each kind; 0 for recordings")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def draw_voice(folder: Path, model: dsm_jax.Model) -> Path:
    """Write a random unit vector of the width of the model's voices, unless it exists."""
    if not folder.exists():
        width = read_voice(next(iter(voices_of(model))), model).shape[1]
        vector = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_voices(folder, {"new_speaker": vector / np.linalg.norm(vector)})
    return folder / "new_speaker.safetensors"


def say(model: dsm_jax.Model, requests: list[Request]) -> list[Speech]:
    speeches: dict[int, Speech] = {}
    for number, result in synthesize_each(model, requests, batch_size=20):
        if not isinstance(result, Speech):
            raise result
        speeches[number] = result
    return [speeches[number] for number in range(len(requests))]


def reordered(model: dsm_jax.Model, data: Path, voice: Path, folder: Path, count: int) -> Path:
    """List strings of words in random orders: `count` cut from recordings, and as many in the model's own voices."""
    listing, random = folder / "recordings.jsonl", np.random.default_rng(0)
    if listing.exists():
        return listing
    folder.mkdir(parents=True, exist_ok=True)
    recordings = read_recordings(data, model.sample_rate)
    clips: list[tuple[str, np.ndarray]] = []
    for recording in recordings:
        pcm_T = audio.read(recording.audio, model.sample_rate)
        clips += [(word.text, _samples(pcm_T, word.start, word.end, model.sample_rate)) for word in recording.words]

    def drawn() -> list[tuple[str, np.ndarray]]:
        words = len(recordings[random.integers(len(recordings))].words)  # as many as a recording has
        return [clips[index] for index in random.integers(len(clips), size=words)]

    lines = []
    for number in range(count):
        path = folder / f"cut_{number}.wav"
        lines.append(_line(path, joined(random, drawn(), path, model.sample_rate), voice))
    own = list(voices_of(model).items())
    said = [" ".join(text for text, _ in drawn()) for _ in lines]
    requests = [Request(text, (own[seed % len(own)][0],), seed=seed) for seed, text in enumerate(said)] if own else []
    for number, speech in enumerate(say(model, requests)):
        path = folder / f"said_{number}.wav"
        speech.save(path)
        lines.append(_line(path, speech.words, own[number % len(own)][1]))
    listing.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return listing


def joined(
    random: np.random.Generator, clips: Sequence[tuple[str, np.ndarray]], path: Path, rate: int
) -> list[WordSpan]:
    """Write words one after the other with 0.05 to 0.4 s of silence around each; return their times."""
    parts, words, at = [], [], 0
    for text, clip_T in clips:
        silence_T = np.zeros(round(random.uniform(0.05, 0.4) * rate), np.float32)
        at += silence_T.size
        words.append(WordSpan(text, at / rate, (at + clip_T.size) / rate))
        parts += [silence_T, clip_T]
        at += clip_T.size
    soundfile.write(path, np.concatenate([*parts, np.zeros(round(0.3 * rate), np.float32)]), rate)
    return words


def _samples(pcm_T: np.ndarray, start: float, end: float, rate: int) -> np.ndarray:
    return pcm_T[round(start * rate) : round(end * rate)]


def _line(audio: Path, words: Sequence[WordSpan | SpokenWord], voice: Path) -> dict[str, object]:
    times = [{"text": word.text, "start": word.start, "end": word.end} for word in words]
    return {"audio": str(Path(audio).absolute()), "words": times, "voice": str(voice.absolute())}


def errors(model: dsm_jax.Model, voice: Path, count: int) -> Evaluation:
    """Synthesise random digits in a voice, and count the errors in transcripts of the speech."""
    randoms = [np.random.default_rng(seed) for seed in range(count)]
    texts = [" ".join(random.choice(WORDS, random.integers(3, 10))) for random in randoms]
    speeches = say(model, [Request(text, (voice,), seed=seed) for seed, text in enumerate(texts)])
    return heard(texts, [speech.pcm for speech in speeches])


def errors_of_recordings(model: dsm_jax.Model, folder: Path) -> Evaluation:
    """Count the errors in transcripts of recordings that went through the model's codec."""
    recordings = read_recordings(folder, model.sample_rate)
    decoded = [dsm_jax.decode(model, dsm_jax.encode(model, recording.audio)) for recording in recordings]
    return heard([" ".join(word.text for word in recording.words) for recording in recordings], decoded)


def heard(texts: Sequence[str], pcm: Sequence[np.ndarray]) -> Evaluation:
    """Count the errors in the transcripts of `digits`."""
    samples = [Sample(str(number), *pair) for number, pair in enumerate(zip(texts, pcm, strict=True))]
    return dsm_jax.evaluate(dsm_jax.load("digits"), samples, normalizer="basic")


def main() -> None:
    args = arguments()
    model = dsm_jax.load(args.model)
    voice = args.voice or draw_voice(args.output.with_name(f"{args.output.name}-voice"), model)
    print(f"the speaker's recordings, after the codec: {errors_of_recordings(model, args.validation).summary()}")
    print(f"before: {errors(model, voice, args.sentences).summary()}")
    strings = args.output.with_name(f"{args.output.name}-strings")
    config = FinetuneConfig(
        data=str(reordered(model, args.data, voice, strings, args.orders) if args.orders else args.data),
        validation=str(args.validation),
        output=str(args.output),
        model=args.model,
        seconds=9.0,
        voice=str(voice),
        run=RunConfig(steps=args.steps, log_every=10, save_every=20),
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, warmup=10),
        # All matrices: how a voice sounds is also in the embeddings and in the heads.
        lora=LoraConfig(rank=args.rank, alpha=float(args.rank), targets=(".",)) if args.rank else None,
        # A model between the two sounds like the voice, and makes fewer mistakes than its recordings.
        strength=args.strength if args.rank else 1.0,
    )
    tuned = finetune(config, resume=args.resume)
    print(f"after: {errors(tuned, voice, args.sentences).summary()}")
    print(f"dsm-jax speak 'one two three' --model {args.output / 'model'} --voice {voice.stem} said.wav uses it")


if __name__ == "__main__":
    main()
