"""Speech to text: `transcribe` for whole recordings, `transcribe_stream` for live audio, and the program over slots."""

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
