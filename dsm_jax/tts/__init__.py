"""Text to speech: whole texts, live text, and the program over slots."""

from dsm_jax.speech import IncompleteSpeechError, Speech, SpokenWord
from dsm_jax.tts.batch import synthesize_each
from dsm_jax.tts.live import StreamingSynthesizer
from dsm_jax.tts.speech import Dialogue, Request, SynthesizeOptions, Turn
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
    "synthesize_each",
    "voices_of",
]
