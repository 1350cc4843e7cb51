"""JAX implementation of Kyutai's delayed streams models: the public names, each imported on first use."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # What an editor and a type checker see; _MODULE_OF is what runs.
    from dsm_jax.checkpoints import Model, load
    from dsm_jax.errors import BatchError, DsmError
    from dsm_jax.evaluation import Evaluation, evaluate
    from dsm_jax.stt import (
        Listener,
        Options,
        Pause,
        PauseRule,
        Prompt,
        Transcript,
        Word,
        WordEnded,
        WordStarted,
        stream,
        transcribe,
    )
    from dsm_jax.tts import Speech, SpeechOptions, SpokenWord, synthesize, synthesize_stream

    __version__: str

__all__ = [
    "BatchError",
    "DsmError",
    "Evaluation",
    "Listener",
    "Model",
    "Options",
    "Pause",
    "PauseRule",
    "Prompt",
    "Speech",
    "SpeechOptions",
    "SpokenWord",
    "Transcript",
    "Word",
    "WordEnded",
    "WordStarted",
    "evaluate",
    "load",
    "stream",
    "synthesize",
    "synthesize_stream",
    "transcribe",
]

_MODULE_OF = {
    "BatchError": "dsm_jax.errors",
    "DsmError": "dsm_jax.errors",
    "Evaluation": "dsm_jax.evaluation",
    "Listener": "dsm_jax.stt",
    "Model": "dsm_jax.checkpoints",
    "Options": "dsm_jax.stt",
    "Pause": "dsm_jax.stt",
    "PauseRule": "dsm_jax.stt",
    "Prompt": "dsm_jax.stt",
    "Speech": "dsm_jax.tts",
    "SpeechOptions": "dsm_jax.tts",
    "SpokenWord": "dsm_jax.tts",
    "Transcript": "dsm_jax.stt",
    "Word": "dsm_jax.stt",
    "WordEnded": "dsm_jax.stt",
    "WordStarted": "dsm_jax.stt",
    "evaluate": "dsm_jax.evaluation",
    "load": "dsm_jax.checkpoints",
    "stream": "dsm_jax.stt",
    "synthesize": "dsm_jax.tts",
    "synthesize_stream": "dsm_jax.tts",
    "transcribe": "dsm_jax.stt",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        value = metadata.version("dsm_jax")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
