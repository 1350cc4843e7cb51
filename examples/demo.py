"""Transcribe recordings of spoken digits with the embedded model, offline and live, and encode one with the codec.

Usage: python examples/demo.py [RECORDING ...]
"""

import sys
import time
from pathlib import Path

import dsm_jax
from dsm_jax import audio, codec

RECORDINGS = sorted((Path(__file__).parent / "audio").glob("digits_*.flac"))


def main(recordings: list[Path]) -> None:
    start = time.perf_counter()
    model = dsm_jax.load("digits")
    print(f"{model!r}, loaded in {time.perf_counter() - start:.1f} s; compiling ...\n")
    for recording in recordings:
        whole = dsm_jax.transcribe(model, recording)
        print(f"{recording.name}, {whole.duration:.1f} s: {whole.text}")
        for word in whole.words:
            print(f"  {word.start:6.2f} to {word.end:5.2f} s   {word.text:6} {word.probability:.2f}")

    listener = dsm_jax.StreamingTranscriber(model)  # fed 50 ms at a time, as from a microphone
    events, seconds = [], 0.0
    for chunk in audio.blocks(recordings[0], model.sample_rate, block_seconds=0.05):
        events += listener.feed(chunk)
        seconds += chunk.size / model.sample_rate
    events += listener.finish()
    live = [event.word for event in events if isinstance(event, dsm_jax.WordEnded)]
    same = "the same words and times" if live == list(dsm_jax.transcribe(model, recordings[0]).words) else "OTHER words"
    print(f"\n{recordings[0].name} live, in chunks of 50 ms: {same}")

    codes_QT = codec.encode(model, recordings[0])
    config = model.config.mimi
    bits = codes_QT.shape[0] * config.quantizer.bins.bit_length() - codes_QT.shape[0]
    print(f"as codes: {codes_QT.shape[0]} codebooks x {codes_QT.shape[1]} frames, {bits * config.frame_rate:.0f} bit/s")
    print(f"\nall of this took {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or RECORDINGS)
