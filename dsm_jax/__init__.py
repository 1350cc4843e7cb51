"""Kyutai's delayed streams models and Sesame's CSM in JAX: the public names, each imported on first use."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # What an editor and a type checker see; _MODULE_OF is what runs.
    from dsm_jax.audio import Recorded
    from dsm_jax.checkpoints import Model, load, save
    from dsm_jax.codec import decode, encode
    from dsm_jax.convert import convert
    from dsm_jax.csm import CsmOptions
    from dsm_jax.errors import (
        AudioError,
        BatchError,
        CheckpointError,
        ConfigError,
        DsmError,
        EvaluationError,
        ForkError,
        ModelKindError,
        PromptError,
        ServerError,
        ServerFullError,
        SpeechError,
        StreamError,
        TextError,
        TrainingError,
    )
    from dsm_jax.evaluation import Evaluation, evaluate
    from dsm_jax.progress import Progress
    from dsm_jax.stt import (
        Pause,
        Prompt,
        Segment,
        StreamingTranscriber,
        TranscribeOptions,
        Transcript,
        VadOptions,
        Word,
        WordEnded,
        WordStarted,
        transcribe,
        transcribe_stream,
    )
    from dsm_jax.synthesis import synthesize, synthesize_stream
    from dsm_jax.training.finetune import finetune
    from dsm_jax.tts import (
        Dialogue,
        IncompleteSpeechError,
        Speech,
        SpokenWord,
        StreamingSynthesizer,
        SynthesizeOptions,
        Turn,
    )

    __version__: str

__all__ = [
    "AudioError",
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "CsmOptions",
    "Dialogue",
    "DsmError",
    "Evaluation",
    "EvaluationError",
    "ForkError",
    "IncompleteSpeechError",
    "Model",
    "ModelKindError",
    "Pause",
    "Progress",
    "Prompt",
    "PromptError",
    "Recorded",
    "Segment",
    "ServerError",
    "ServerFullError",
    "Speech",
    "SpeechError",
    "SpokenWord",
    "StreamError",
    "StreamingSynthesizer",
    "StreamingTranscriber",
    "SynthesizeOptions",
    "TextError",
    "TrainingError",
    "TranscribeOptions",
    "Transcript",
    "Turn",
    "VadOptions",
    "Word",
    "WordEnded",
    "WordStarted",
    "convert",
    "decode",
    "encode",
    "evaluate",
    "finetune",
    "load",
    "save",
    "synthesize",
    "synthesize_stream",
    "transcribe",
    "transcribe_stream",
]

_MODULE_OF = {
    "AudioError": "dsm_jax.errors",
    "BatchError": "dsm_jax.errors",
    "CheckpointError": "dsm_jax.errors",
    "ConfigError": "dsm_jax.errors",
    "CsmOptions": "dsm_jax.csm",
    "Dialogue": "dsm_jax.tts",
    "DsmError": "dsm_jax.errors",
    "Evaluation": "dsm_jax.evaluation",
    "EvaluationError": "dsm_jax.errors",
    "ForkError": "dsm_jax.errors",
    "IncompleteSpeechError": "dsm_jax.tts",
    "Model": "dsm_jax.checkpoints",
    "ModelKindError": "dsm_jax.errors",
    "Pause": "dsm_jax.stt",
    "Progress": "dsm_jax.progress",
    "Prompt": "dsm_jax.stt",
    "PromptError": "dsm_jax.errors",
    "Recorded": "dsm_jax.audio",
    "Segment": "dsm_jax.stt",
    "ServerError": "dsm_jax.errors",
    "ServerFullError": "dsm_jax.errors",
    "Speech": "dsm_jax.tts",
    "SpeechError": "dsm_jax.errors",
    "SpokenWord": "dsm_jax.tts",
    "StreamError": "dsm_jax.errors",
    "StreamingSynthesizer": "dsm_jax.tts",
    "StreamingTranscriber": "dsm_jax.stt",
    "SynthesizeOptions": "dsm_jax.tts",
    "TextError": "dsm_jax.errors",
    "TrainingError": "dsm_jax.errors",
    "TranscribeOptions": "dsm_jax.stt",
    "Transcript": "dsm_jax.stt",
    "Turn": "dsm_jax.tts",
    "VadOptions": "dsm_jax.stt",
    "Word": "dsm_jax.stt",
    "WordEnded": "dsm_jax.stt",
    "WordStarted": "dsm_jax.stt",
    "convert": "dsm_jax.convert",
    "decode": "dsm_jax.codec",
    "encode": "dsm_jax.codec",
    "evaluate": "dsm_jax.evaluation",
    "finetune": "dsm_jax.training.finetune",
    "load": "dsm_jax.checkpoints",
    "save": "dsm_jax.checkpoints",
    "synthesize": "dsm_jax.synthesis",
    "synthesize_stream": "dsm_jax.synthesis",
    "transcribe": "dsm_jax.stt",
    "transcribe_stream": "dsm_jax.stt",
}
# The modules whose other names users need, as in dsm_jax.tts.blend.
_MODULES = ("audio", "codec", "configs", "csm", "errors", "evaluation", "serving", "stt", "training", "tts")


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        value = metadata.version("dsm_jax")
    elif name in _MODULE_OF:
        module = importlib.import_module(_MODULE_OF[name])
        value = globals().get(name, getattr(module, name))  # the package `convert`, which can be called, is there now
    elif name in _MODULES:
        value = importlib.import_module(f"dsm_jax.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, "__version__"})
