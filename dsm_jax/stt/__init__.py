"""Speech to text: whole recordings with `transcribe`, live audio with `stream`, the program over slots in `program`."""

from dsm_jax.stt.batch import transcribe, transcribe_each
from dsm_jax.stt.live import Listener, stream
from dsm_jax.stt.options import Options, Prompt
from dsm_jax.stt.transcript import Frames, Pause, Transcript, Word, WordEnded, WordStarted
from dsm_jax.stt.words import PauseRule

__all__ = [
    "Frames",
    "Listener",
    "Options",
    "Pause",
    "PauseRule",
    "Prompt",
    "Transcript",
    "Word",
    "WordEnded",
    "WordStarted",
    "stream",
    "transcribe",
    "transcribe_each",
]
