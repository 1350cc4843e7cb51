"""The timed steps of what listens, with random weights: the codec, the language model, and speech to text as a whole.

Shape letters: B batch rows, T samples, C audio channels, M streams.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsm_jax import codec
from dsm_jax.benchmark.weights import random_model
from dsm_jax.configs import MimiConfig, ModelConfig
from dsm_jax.models.family import lm_config
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.runtime.compile import compiled, plain
from dsm_jax.stt import program as stt_program

Step = Callable[[Any], tuple[Any, Any]]  # state to (output, state)


def lm_step(config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame through the language model, greedy token included, and its first state."""
    tokens_BMT = jnp.zeros((batch, lm_config(config).n_q + 1, 1), jnp.int32)
    model = random_model(config, dtype, quantize)
    assert model.lm_def is not None
    assert model.lm_params is not None
    step, networks = compiled(_greedy_step, (model.lm_def,), donate=(1,)), plain(model.lm_params)
    return lambda state: step(networks, tokens_BMT, state), compiled(_lm_state, (model.lm_def,), batch)(networks)


def _greedy_step(lm: DelayedStreamsLM, tokens_BMT: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    hidden_BTD, state = lm.step(tokens_BMT, state)
    return jnp.argmax(lm.text_logits(hidden_BTD), axis=-1), state


def _lm_state(lm: DelayedStreamsLM, batch: int) -> Any:
    return lm.init_state(batch)


def mimi_step(batch: int, way: str, config: MimiConfig = MimiConfig()) -> tuple[Step, Any]:
    """Make the step of one frame through the codec, "encode" or "decode", and its first state."""
    model = random_model(ModelConfig(model_type="mimi", mimi=config), jnp.dtype("float32"))
    books, bins = config.quantizer.n_q, config.quantizer.bins
    if way == "encode":
        half, frame = model.codec.encoder, 0.1 * jax.random.normal(jax.random.key(1), (batch, config.frame_size, 1))
        step = compiled(codec.encode_step, (model.mimi_def,), books, donate=(1,))
    else:
        half, frame = model.codec.decoder, jax.random.randint(jax.random.key(2), (batch, books, 1), 0, bins)
        step = compiled(codec.decode_step, (model.mimi_def,), donate=(1,))
    assert half is not None
    networks = plain(model.mimi_params)
    return lambda state: step(networks, frame, state), half.init_state(batch)


def stt_step(config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame of speech to text and its first state: codec, language model and sampling.

    It is the step of a server.
    """
    model = random_model(config, dtype, quantize)
    assert model.lm_def is not None
    assert model.lm_params is not None
    pcm_BTC = 0.1 * jax.random.normal(jax.random.key(1), (batch, config.mimi.frame_size, 1))
    settings, slot_B = stt_program.SttSettings(batch), np.arange(batch)
    inputs = stt_program.SttInputs(pcm_BTC, jnp.ones((batch,), jnp.int32))
    graphs, params = (model.lm_def, model.mimi_def), plain(model.lm_params, model.mimi_params)
    step = compiled(stt_program.step, graphs, settings, donate=(0,))
    state = compiled(stt_program.init_state, graphs, settings)(params)
    state = compiled(stt_program.insert, graphs, settings)(params, state, slot_B, state.request)
    return lambda state: step(params, state, inputs), state
