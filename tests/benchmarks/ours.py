"""The timed steps of this library: jitted steps with random weights, and `transcribe` on the shared checkpoint.

Shape letters: B batch rows, T samples, C audio channels.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsm_jax
from dsm_jax.benchmark import listening, speaking
from dsm_jax.benchmark.weights import random_model
from dsm_jax.configs import MimiConfig, ModelConfig, TtsConfig, presets
from tests.benchmarks.worker import Step
from tests.helpers import csm_model, small, tts_model

# `small.TTS` also has input audio streams, which Kyutai's loop for speech does not support.
_LM = dataclasses.replace(small.TTS, n_q=4, delays=(0, 0, 2, 2, 2), card=16)
TINY_TTS = ModelConfig(model_type="tts", lm=_LM, mimi=small.MIMI, tts=TtsConfig(audio_delay=0.2, second_stream_ahead=2))

FLOAT32 = jnp.dtype("float32")
TINY_CSM = ModelConfig(
    model_type="csm",
    csm=dataclasses.replace(csm_model.CSM, backbone=dataclasses.replace(csm_model.CSM.backbone, context=2048)),
    mimi=tts_model.MIMI,
)


def make(task: str, folder: Path, threads: int, tiny: bool, *, quantize: str | None = None) -> Step:
    """Make the step of `task`; JAX uses as many threads as the process has cores."""
    if task.startswith("train_"):
        from tests.benchmarks import training  # late: its imports would count as memory of other tasks

        return training.make(task, tiny)
    if task == "transcribe_45s":
        return _transcribe(folder, quantize)
    if task == "mimi_encode_10s":
        return _encode_10s(small.MIMI if tiny else MimiConfig())
    if task.startswith("lm_step_b"):
        config = ModelConfig(model_type="stt", lm=small.STT) if tiny else presets.STT_1B
        batch = int(task.removeprefix("lm_step_b"))
        return _threaded(*listening.lm_step(config, batch, FLOAT32, quantize))
    if task.startswith("tts_"):
        return _threaded(*speaking.tts_step(*speech_case(task, tiny), FLOAT32, quantize))
    if task.startswith("csm_"):
        make_step = speaking.csm_step if "frame" in task else speaking.csm_prefill
        config = TINY_CSM if tiny else presets.CSM_1B
        return _threaded(*make_step(config, int(task.partition("_b")[2]), FLOAT32, quantize))
    return _threaded(*listening.mimi_step(1, task.split("_")[1]))


def speech_case(task: str, tiny: bool) -> tuple[ModelConfig, int]:
    """Return the text-to-speech model of a task, and the batch size."""
    return TINY_TTS if tiny else presets.TTS_1_6B, int(task.partition("_b")[2])


def _threaded(step: listening.Step, state: Any) -> Step:
    def run() -> None:
        nonlocal state
        output, state = step(state)
        jax.block_until_ready(output)

    return run


def _encode_10s(config: MimiConfig) -> Step:
    model = random_model(ModelConfig(model_type="mimi", mimi=config), FLOAT32)
    encode = jax.jit(lambda params, pcm_BTC: nnx.merge(model.mimi_def, params).encode(pcm_BTC))
    pcm_BTC = 0.1 * jax.random.normal(jax.random.key(1), (1, 10 * config.sample_rate, 1))
    return lambda: jax.block_until_ready(encode(model.mimi_params, pcm_BTC))


def _transcribe(folder: Path, quantize: str | None) -> Step:
    # As `dsm-jax transcribe` does.
    model = dsm_jax.load(folder / "kyutai", dtype="float32", quantize=quantize, stt_only=True)
    pcm_T = np.load(folder / "pcm.npy")
    dsm_jax.transcribe(model, pcm_T[:48_000])
    return lambda: dsm_jax.transcribe(model, pcm_T).text
