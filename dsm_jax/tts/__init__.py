"""Text to speech: `synthesize` for whole texts, `synthesize_stream` for live text, and the program over slots."""

from dsm_jax.tts.batch import synthesize, synthesize_each
from dsm_jax.tts.live import StreamingSynthesizer, synthesize_stream
from dsm_jax.tts.speech import (
    Dialogue,
    IncompleteSpeechError,
    Request,
    Speech,
    SpokenWord,
    SynthesizeOptions,
    Turn,
)
from dsm_jax.tts.voices import blend, read_voice, voices_of

__all__ = [
    "Dialogue",
    "IncompleteSpeechError",
    "Request",
    "Speech",
    "SpokenWord",
    "StreamingSynthesizer",
    "SynthesizeOptions",
    "Turn",
    "blend",
    "read_voice",
    "synthesize",
    "synthesize_each",
    "synthesize_stream",
    "voices_of",
]
