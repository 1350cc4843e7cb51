"""Speech to text: whole recordings with `transcribe`, live audio with `stream`, pure functions in `engine`."""

from dsm_jax.stt.batch import transcribe, transcribe_each
from dsm_jax.stt.hearing import Prompt
from dsm_jax.stt.live import Listener, stream
from dsm_jax.stt.recognizer import Options
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
