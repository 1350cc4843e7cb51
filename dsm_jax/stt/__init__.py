"""Speech to text: `transcribe` for whole recordings, `transcribe_stream` for live audio, and the program over slots.

Each name is imported on first use: a client of a server reads events and transcripts without JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # What an editor and a type checker see; _MODULE_OF is what runs.
    from dsm_jax.stt.batch import transcribe, transcribe_each
    from dsm_jax.stt.events import Event, Pause, Word, WordEnded, WordStarted
    from dsm_jax.stt.live import StreamingTranscriber, transcribe_stream
    from dsm_jax.stt.options import Prompt, TranscribeOptions
    from dsm_jax.stt.transcript import Frames, Segment, Transcript
    from dsm_jax.stt.words import VadOptions

__all__ = [
    "Event",
    "Frames",
    "Pause",
    "Prompt",
    "Segment",
    "StreamingTranscriber",
    "TranscribeOptions",
    "Transcript",
    "VadOptions",
    "Word",
    "WordEnded",
    "WordStarted",
    "transcribe",
    "transcribe_each",
    "transcribe_stream",
]

_MODULE_OF = {
    "Event": "dsm_jax.stt.events",
    "Frames": "dsm_jax.stt.transcript",
    "Pause": "dsm_jax.stt.events",
    "Prompt": "dsm_jax.stt.options",
    "Segment": "dsm_jax.stt.transcript",
    "StreamingTranscriber": "dsm_jax.stt.live",
    "TranscribeOptions": "dsm_jax.stt.options",
    "Transcript": "dsm_jax.stt.transcript",
    "VadOptions": "dsm_jax.stt.words",
    "Word": "dsm_jax.stt.events",
    "WordEnded": "dsm_jax.stt.events",
    "WordStarted": "dsm_jax.stt.events",
    "transcribe": "dsm_jax.stt.batch",
    "transcribe_each": "dsm_jax.stt.batch",
    "transcribe_stream": "dsm_jax.stt.live",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
