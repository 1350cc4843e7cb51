"""The timed steps of speech with random weights: a frame of text to speech, a frame and a prefill of CSM.

Shape letters: B batch rows, D width of the backbone, M streams (text first), Q codebooks, T frames or positions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.benchmark import Step, random_params
from dsm_jax.checkpoints import Model
from dsm_jax.configs import ModelConfig, TensorConditioner
from dsm_jax.csm.host import ConversationRequest, CsmProgram
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.program import CsmSettings
from dsm_jax.models.csm import CsmLM
from dsm_jax.models.family import csm_config
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.nn import quant
from dsm_jax.runtime.steps import Leave
from dsm_jax.tts.host import SpeechRequest, TtsProgram
from dsm_jax.tts.script import Entry
from dsm_jax.tts.speech import SynthesizeOptions, settings_of
from tests.benchmarks.tasks import VOICE_STEPS

PROMPT = 64  # positions of a conversation's prompt, all of text


def tts_step(config: ModelConfig, batch: int, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame of text to speech for a text that does not end.

    A step runs the language model, word machine, sampling and codec. The first steps, before the audio begins, run
    neither depformer nor codec.
    """
    lm, options = config.lm, SynthesizeOptions()
    assert lm is not None
    speaker = lm.conditioner("speaker_wavs")
    assert isinstance(speaker, TensorConditioner)
    model = _random_model(config, lambda: DelayedStreamsLM(lm, rngs=nnx.Rngs(0)), quantize)
    request = SpeechRequest(
        entries=[Entry((4, 5), "word", 0)] * 1000,
        complete=True,
        voices=[np.random.default_rng(0).standard_normal((VOICE_STEPS, speaker.dim), np.float32)],
        condition_guidance=options.guidance_scale,
        prefix_QT=np.zeros((lm.n_q, 0), np.int32),
        seed=options.seed,
        temperature=options.temperature_of(model),
        top_k_text=options.top_k_text,
        top_k_audio=options.top_k,
        guidance=1.0,
        padding_bonus=options.padding_bonus,
        codebooks=lm.dep_q,
        max_padding=options.max_padding,
        initial_padding=options.initial_padding,
        final_padding=options.final_padding,
        max_steps=options.max_frames,
    )
    settings = dataclasses.replace(settings_of(model, batch), steps=1)
    program = TtsProgram(model, request.fitted(settings))
    state = program.init()
    for slot in range(batch):
        state = program.insert(state, [slot], [request])
    everyone = [Leave()] * batch
    return lambda state: program.step(state, everyone, waiting=False), state


def csm_step(config: ModelConfig, batch: int, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame of conversational speech after a prompt, with its samples."""
    program, requests = _csm_program(config, batch, quantize, frames=1000)
    state = program.insert(program.init(), range(batch), requests)
    everyone = [Leave()] * batch
    return lambda state: program.step(state, everyone, waiting=False), state


def csm_prefill(config: ModelConfig, batch: int, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the prefill of prompts; its output is the state's last hidden states."""
    program, requests = _csm_program(config, batch, quantize, frames=100)

    def step(state: Any) -> tuple[jax.Array, Any]:
        state = program.insert(state, range(batch), requests)
        return state.hidden_BD + 0, state

    return step, program.init()


def _csm_program(
    config: ModelConfig, batch: int, quantize: str | None, *, frames: int
) -> tuple[CsmProgram, list[ConversationRequest]]:
    """Make the program of a conversational speech model, and a request for each slot."""
    csm = csm_config(config)
    model = _random_model(config, lambda: CsmLM(csm, rngs=nnx.Rngs(0)), quantize)
    tokens_MT = np.full((1 + csm.n_q, PROMPT), ZERO_TOKEN, np.int32)
    tokens_MT[0] = np.arange(PROMPT) % csm.text_card
    options = CsmOptions(temperature=0.0, max_frames=frames)
    request = ConversationRequest(text="", prompt_MT=tokens_MT, options=options, max_frames=frames)
    settings = request.fitted(CsmSettings(slots=batch, positions=1, steps=1), csm.backbone.context)
    return CsmProgram(model, settings), [request] * batch


def _random_model(config: ModelConfig, make: Callable[[], nnx.Module], quantize: str | None) -> Model:
    """Return a model of random weights, float32 but for quantised layers, without a tokenizer."""
    lm_def, lm_params = random_params(make, jnp.dtype("float32"))
    if quantize is not None:
        lm_params = quant.quantize(lm_params)
    mimi_def, mimi_params = random_params(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), jnp.dtype("float32"))
    return Model(config, lm_def, lm_params, mimi_def, mimi_params, None, "random")
