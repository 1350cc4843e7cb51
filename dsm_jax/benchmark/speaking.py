"""The timed steps of what speaks, with random weights: a frame of text to speech, a frame and a prefill of CSM.

Shape letters: B batch rows, D width of the backbone, M streams (text first), Q codebooks, T frames or positions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsm_jax.benchmark.listening import Step
from dsm_jax.benchmark.weights import random_model
from dsm_jax.configs import ModelConfig, TensorConditioner
from dsm_jax.csm.host import ConversationRequest, CsmProgram
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.program import CsmSettings
from dsm_jax.models.family import csm_config, lm_config
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.runtime.steps import Leave
from dsm_jax.tts.host import SpeechRequest, TtsProgram
from dsm_jax.tts.script import Entry
from dsm_jax.tts.speech import SynthesizeOptions, settings_of

PROMPT = 64  # positions of a conversation's prompt, all of text
VOICE_STEPS = 125  # length of the published voices: 10 s


def tts_step(config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame of text to speech, for a text that does not end, and its first state.

    A step runs the language model, word machine, sampling and codec. The first steps, before the audio begins, run
    neither depformer nor codec.
    """
    lm, options = lm_config(config), SynthesizeOptions()
    speaker = lm.conditioner("speaker_wavs")
    assert isinstance(speaker, TensorConditioner)
    model = random_model(config, dtype, quantize)
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


def csm_step(config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame of conversational speech, with its samples, and the state after a prompt."""
    program, requests = _csm_program(config, batch, dtype, quantize, frames=1000)
    state = program.insert(program.init(), range(batch), requests)
    everyone = [Leave()] * batch
    return lambda state: program.step(state, everyone, waiting=False), state


def csm_prefill(config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the prefill of prompts, whose output is the state's last hidden states, and the first state."""
    program, requests = _csm_program(config, batch, dtype, quantize, frames=100)

    def step(state: Any) -> tuple[jax.Array, Any]:
        state = program.insert(state, range(batch), requests)
        return state.hidden_BD + 0, state

    return step, program.init()


def _csm_program(
    config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None, *, frames: int
) -> tuple[CsmProgram, list[ConversationRequest]]:
    """Make the program of a conversational speech model, and a request for each slot."""
    csm = csm_config(config)
    tokens_MT = np.full((1 + csm.n_q, PROMPT), ZERO_TOKEN, np.int32)
    tokens_MT[0] = np.arange(PROMPT) % csm.text_card
    options = CsmOptions(temperature=0.0, max_frames=frames)
    request = ConversationRequest(text="", prompt_MT=tokens_MT, options=options, max_frames=frames)
    settings = request.fitted(CsmSettings(slots=batch, positions=1, steps=1), csm.backbone.context)
    return CsmProgram(random_model(config, dtype, quantize), settings), [request] * batch
