"""Time steps of the published sizes on this machine, with random weights; one JSON row per measurement.

The times exclude compilation. States are donated as in use, and every step waits for the device.

Shape letters: B batch rows, T samples, C audio channels, M streams, Q codebooks.
"""

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.checkpoints import Model
from dsm_jax.configs import MimiConfig, ModelConfig, TensorConditioner, presets
from dsm_jax.csm import host as csm_host
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.program import CsmSettings
from dsm_jax.errors import ConfigError
from dsm_jax.models.csm import CsmLM
from dsm_jax.models.family import csm_config
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.nn.linear import fan_in
from dsm_jax.runtime.compile import compiled, plain
from dsm_jax.runtime.steps import Leave
from dsm_jax.stt import program as stt_program
from dsm_jax.tts import host as tts_host
from dsm_jax.tts.script import Entry
from dsm_jax.tts.state import TtsSettings
from dsm_jax.tts.words import WordMachine

SIZES = {"stt-1b": presets.STT_1B, "stt-2.6b": presets.STT_2_6B}
FRAME_S = 0.08
VOICE_STEPS = 125  # length of the published voices: 10 s
Step = Callable[[Any], tuple[Any, Any]]  # state to (output, state)


def random_params(make: Callable[[], nnx.Module], dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """Return a module's structure and random weights of a trained model's scale, drawn on the device one by one."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    flat = nnx.to_flat_state(abstract)
    keys = jax.random.split(jax.random.key(0), len(flat))

    def draw(key: jax.Array, shape: tuple[int, ...], rows: int) -> jax.Array:
        return (jax.random.normal(key, shape) * rows**-0.5).astype(dtype)

    drawn = jax.jit(draw, static_argnums=(1, 2))
    made = [
        (path, variable.replace(drawn(key, variable.get_value().shape, fan_in(variable))))
        for key, (path, variable) in zip(keys, flat, strict=True)
    ]
    return graph, nnx.from_flat_state(made)


def _random_lm(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    lm = config.lm
    if lm is None:
        raise ConfigError("a codec alone has no language model to time; give a speech-to-text config")
    return random_params(lambda: DelayedStreamsLM(lm, dtype=dtype, rngs=nnx.Rngs(0)), dtype)


def lm_step(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """Make the step of one frame through the language model, greedy token included."""
    graph, params = _random_lm(config, dtype)
    assert config.lm is not None
    tokens_BMT = jnp.zeros((batch, config.lm.n_q + 1, 1), jnp.int32)
    step, networks = compiled(_greedy_step, (graph,), donate=(1,)), plain(params)
    return lambda state: step(networks, tokens_BMT, state), compiled(_lm_state, (graph,), batch)(networks)


def _greedy_step(lm: DelayedStreamsLM, tokens_BMT: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    hidden_BTD, state = lm.step(tokens_BMT, state)
    return jnp.argmax(lm.text_logits(hidden_BTD), axis=-1), state


def _lm_state(lm: DelayedStreamsLM, batch: int) -> Any:
    return lm.init_state(batch)


def mimi_step(batch: int, way: str, config: MimiConfig = MimiConfig()) -> tuple[Step, Any]:
    """Make the step of one frame through the codec, "encode" or "decode"."""
    graph, params = random_params(lambda: Mimi(config, rngs=nnx.Rngs(0)), jnp.float32)
    mimi = nnx.merge(graph, params)
    if way == "encode":
        frame = 0.1 * jax.random.normal(jax.random.key(1), (batch, config.frame_size, 1))
    else:
        shape = batch, config.quantizer.n_q, 1
        frame = jax.random.randint(jax.random.key(2), shape, 0, config.quantizer.bins)
    step = compiled(_encode_step if way == "encode" else _decode_step, (graph,), donate=(1,))
    half, networks = mimi.encoder if way == "encode" else mimi.decoder, plain(params)
    return lambda state: step(networks, frame, state), half.init_state(batch)


def _encode_step(mimi: Mimi, pcm_BTC: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    return mimi.encode_step(pcm_BTC, state)


def _decode_step(mimi: Mimi, codes_BQT: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    return mimi.decode_step(codes_BQT, state)


def stt_step(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """Make the step of one frame of speech to text: codec, language model and sampling, as a server runs them."""
    lm_def, lm_params = _random_lm(config, dtype)
    mimi_def, mimi_params = random_params(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), jnp.float32)
    pcm_BTC = 0.1 * jax.random.normal(jax.random.key(1), (batch, config.mimi.frame_size, 1))
    settings, slot_B = stt_program.SttSettings(batch), np.arange(batch)
    inputs = stt_program.SttInputs(pcm_BTC, jnp.ones((batch,), jnp.int32))
    graphs, params = (lm_def, mimi_def), plain(lm_params, mimi_params)
    step = compiled(stt_program.step, graphs, settings, donate=(0,))
    state = compiled(stt_program.init_state, graphs, settings)(params)
    state = compiled(stt_program.insert, graphs, settings)(params, state, slot_B, state.request)
    return lambda state: step(params, state, inputs), state


def tts_step(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """Make the step of one frame of text to speech, for a text that does not end.

    A step runs the language model, word machine, sampling and codec. The first steps, before the audio begins, run
    neither depformer nor codec.
    """
    lm_def, lm_params = _random_lm(config, dtype)
    mimi_def, mimi_params = random_params(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), jnp.float32)
    lm_config, tts = config.lm, config.tts
    assert lm_config is not None
    assert tts is not None
    speaker = lm_config.conditioner("speaker_wavs")
    assert isinstance(speaker, TensorConditioner)
    machine = WordMachine(lm_config.text_card + 1, tts.second_stream_ahead)
    request = tts_host.SpeechRequest(
        entries=[Entry((4, 5), "word", 0)] * 1000,
        complete=True,
        voices=[np.random.default_rng(0).standard_normal((VOICE_STEPS, speaker.dim), np.float32)],
        condition_guidance=2.0,
        prefix_QT=np.zeros((lm_config.n_q, 0), np.int32),
        seed=0,
        temperature=0.6,
        top_k_text=25,
        top_k_audio=250,
        guidance=1.0,
        padding_bonus=0.0,
        codebooks=lm_config.dep_q,
        max_padding=8,
        initial_padding=2,
        final_padding=4,
        max_steps=30_000,
    )
    delay_steps = int(tts.audio_delay * config.mimi.frame_rate)
    settings = TtsSettings(slots=batch, machine=machine, delay_steps=delay_steps, steps=1)
    model = Model(config, lm_def, lm_params, mimi_def, mimi_params, None, "random")
    program = tts_host.TtsProgram(model, request.fitted(settings))
    state = program.init()
    for slot in range(batch):
        state = program.insert(state, [slot], [request])
    everyone = [Leave()] * batch
    return lambda state: program.step(state, everyone, waiting=False), state


def csm_program(
    config: ModelConfig, batch: int, dtype: jnp.dtype, *, prompt: int, frames: int
) -> tuple[csm_host.CsmProgram, list[csm_host.ConversationRequest]]:
    """Make the program of a conversational speech model, and a request of `prompt` tokens of text for each slot."""
    csm = csm_config(config)
    lm_def, lm_params = random_params(lambda: CsmLM(csm, dtype=dtype, rngs=nnx.Rngs(0)), dtype)
    mimi_def, mimi_params = random_params(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), jnp.float32)
    model = Model(config, lm_def, lm_params, mimi_def, mimi_params, None, "random")
    tokens_MT = np.full((1 + csm.n_q, prompt), ZERO_TOKEN, np.int32)
    tokens_MT[0] = np.arange(prompt) % csm.text_card
    options = CsmOptions(temperature=0.0, max_frames=frames)
    request = csm_host.ConversationRequest(text="", prompt_MT=tokens_MT, options=options, max_frames=frames)
    settings = request.fitted(CsmSettings(slots=batch, positions=1, steps=1), csm.backbone.context)
    return csm_host.CsmProgram(model, settings), [request] * batch


def csm_step(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """Make the step of one frame of conversational speech after a prompt of 64, with its samples."""
    program, requests = csm_program(config, batch, dtype, prompt=64, frames=1000)
    state = program.insert(program.init(), range(batch), requests)
    everyone = [Leave()] * batch
    return lambda state: program.step(state, everyone, waiting=False), state


def csm_prefill(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """Make the prefill of prompts of 64 tokens; its output is the state's last hidden states."""
    program, requests = csm_program(config, batch, dtype, prompt=64, frames=100)

    def step(state: Any) -> tuple[jax.Array, Any]:
        state = program.insert(state, range(batch), requests)
        return state.hidden_BD + 0, state

    return step, program.init()


def time_steps(step: Step, state: Any, steps: int) -> list[float]:
    """Time each of `steps` steps, in seconds, after three warm-up steps."""
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        output, state = step(state)
        jax.block_until_ready(output)
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def row(name: str, batch: int, dtype: str, seconds: Sequence[float]) -> dict[str, Any]:
    """Make the row of one measurement: median, tail, device, versions and date."""
    median = statistics.median(seconds)
    tail = float(np.quantile(seconds, 0.99))
    return {
        "bench": name,
        "batch": batch,
        "dtype": dtype,
        "p50_ms": round(1e3 * median, 3),
        "p99_ms": round(1e3 * tail, 3),
        "steps": len(seconds),
        "x_real_time": round(batch * FRAME_S / median, 2),
        "keeps_up": tail < FRAME_S,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def run(
    what: Sequence[str], *, sizes: Sequence[str], batches: Sequence[int], dtype: str | None, steps: int
) -> Iterator[dict[str, Any]]:
    """Measure, and yield each row when it is ready.

    Args:
      what: steps to time, any of "lm", "mimi" and "stt".
      sizes: names in `SIZES`, for "lm" and "stt".
      batches: batch sizes.
      dtype: dtype of the language model's weights; None means float32 on CPU and bfloat16 elsewhere.
      steps: number of timed steps.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for batch in batches:
        if "mimi" in what:
            for way in ("encode", "decode"):
                yield row(f"mimi_{way}_frame", batch, "float32", time_steps(*mimi_step(batch, way), steps))
        for size in sizes:
            for name, make in (("lm", lm_step), ("stt", stt_step)):
                if name in what:
                    seconds = time_steps(*make(SIZES[size], batch, jnp.dtype(dtype)), steps)
                    yield row(f"{name}_step {size}", batch, dtype, seconds)
