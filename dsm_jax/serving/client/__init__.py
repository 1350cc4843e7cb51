"""Clients of a server: live and whole recordings to text, text to speech, async and plain.

What is here speaks moshi-server's dialect, as it tells the most: words with their times and probabilities, live. The
module `dsm_jax.serving.client.openai` has the same names for servers of OpenAI's dialect, ours or another.

>>> def words_of(url, recording):
...     return [word.text for word in transcribe(url, recording).words]
"""

from dsm_jax.serving.client.moshi import (
    Speech,
    Transcription,
    synthesize,
    synthesize_async,
    transcribe,
    transcribe_async,
)
from dsm_jax.serving.client.moshi_sessions import AsyncSpeech, AsyncTranscription

__all__ = [
    "AsyncSpeech",
    "AsyncTranscription",
    "Speech",
    "Transcription",
    "synthesize",
    "synthesize_async",
    "transcribe",
    "transcribe_async",
]
