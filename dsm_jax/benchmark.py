"""How long a step of the published sizes takes on this machine, with random weights; one JSON row per measurement.

Compilation is left out, the state is threaded and donated as in use, and every step waits for the device.

Shape letters: B batch rows, T samples, C audio channels, K streams, Q codebooks.
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

from dsm_jax.configs import MimiConfig, ModelConfig, TensorConditioner, presets
from dsm_jax.errors import ConfigError
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.stt import engine
from dsm_jax.tts import engine as tts_engine
from dsm_jax.tts import voices
from dsm_jax.tts.script import Entry, pack
from dsm_jax.tts.words import WordMachine

SIZES = {"stt-1b": presets.STT_1B, "stt-2.6b": presets.STT_2_6B}
FRAME_S = 0.08
VOICE_STEPS = 125  # of the published voices, 10 s
Step = Callable[[Any], tuple[Any, Any]]  # state to (output, state)


def random_params(make: Callable[[], nnx.Module], dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """A module's structure, and random weights of a trained model's size, made on the device one by one."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 1.0
        return (jax.random.normal(key, leaf.shape) * scale).astype(dtype)

    made = [jax.jit(draw, static_argnums=1)(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    return graph, jax.tree.unflatten(tree, made)


def _random_lm(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    lm = config.lm
    if lm is None:
        raise ConfigError("a codec alone has no language model to time; give a speech-to-text config")
    return random_params(lambda: DelayedStreamsLM(lm, rngs=nnx.Rngs(0)), dtype)


def lm_step(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """One frame through the language model, greedy token included."""
    graph, params = _random_lm(config, dtype)
    streams = nnx.merge(graph, params).config.n_q + 1
    tokens_BKT = jnp.zeros((batch, streams, 1), jnp.int32)

    def step(params: nnx.State, state: Any):
        lm = nnx.merge(graph, params)
        hidden_BTD, state = lm.step(tokens_BKT, state)
        return jnp.argmax(lm.text_logits(hidden_BTD), axis=-1), state

    jitted = jax.jit(step, donate_argnums=1)
    return lambda state: jitted(params, state), jax.jit(lambda p: nnx.merge(graph, p).init_state(batch))(params)


def mimi_step(batch: int, way: str, config: MimiConfig = MimiConfig()) -> tuple[Step, Any]:
    """One frame through the codec, "encode" or "decode"."""
    graph, params = random_params(lambda: Mimi(config, rngs=nnx.Rngs(0)), jnp.float32)
    pcm_BTC = 0.1 * jax.random.normal(jax.random.key(1), (batch, config.frame_size, 1))
    codes_BQT = jax.random.randint(jax.random.key(2), (batch, config.quantizer.n_q, 1), 0, config.quantizer.bins)

    def step(params: nnx.State, state: Any):
        mimi = nnx.merge(graph, params)
        return mimi.encode_step(pcm_BTC, state) if way == "encode" else mimi.decode_step(codes_BQT, state)

    jitted = jax.jit(step, donate_argnums=1)
    mimi = nnx.merge(graph, params)
    half = mimi.encoder if way == "encode" else mimi.decoder
    return lambda state: jitted(params, state), half.init_state(batch)


def stt_step(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """One frame of speech to text: codec, language model and sampling, as a server runs it."""
    lm_def, lm_params = _random_lm(config, dtype)
    mimi_def, mimi_params = random_params(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), jnp.float32)
    pcm_BTC = 0.1 * jax.random.normal(jax.random.key(1), (batch, config.mimi.frame_size, 1))
    all_B, prompt_BP = jnp.ones((batch,), jnp.int32), jnp.zeros((batch, 0), jnp.int32)
    key, greedy = jax.random.key(0), engine.Sampling()

    def step(lm_params: nnx.State, mimi_params: nnx.State, state: engine.SttState):
        lm, mimi = nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params)
        return engine.advance(lm, mimi, state, pcm_BTC, all_B, prompt_BP, key, greedy)

    def init(lm_params: nnx.State, mimi_params: nnx.State) -> engine.SttState:
        lm, mimi = nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params)
        state = engine.init_state(lm, mimi, batch)
        return engine.start(lm, state, all_B > 0, prompt_BP, key, greedy)

    jitted = jax.jit(step, donate_argnums=2)
    return lambda state: jitted(lm_params, mimi_params, state), jax.jit(init)(lm_params, mimi_params)


def tts_step(config: ModelConfig, batch: int, dtype: jnp.dtype) -> tuple[Step, Any]:
    """One frame of text to speech: language model, word machine, sampling and codec, of a text that does not end.

    The first steps, before the audio begins, run neither depformer nor codec.
    """
    lm_def, lm_params = _random_lm(config, dtype)
    mimi_def, mimi_params = random_params(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), jnp.float32)
    lm_config, tts = config.lm, config.tts
    assert lm_config is not None
    assert tts is not None
    how = tts_engine.Manner(
        machine=WordMachine(lm_config.text_card + 1, tts.second_stream_ahead),
        delay_steps=int(tts.audio_delay * config.mimi.frame_rate),
        codebooks=lm_config.dep_q,
    )
    speaker = lm_config.conditioner("speaker_wavs")
    assert isinstance(speaker, TensorConditioner)
    voice_XC = np.random.default_rng(0).standard_normal((VOICE_STEPS, speaker.dim), np.float32)
    values, masks = voices.conditions(lm_config, [[voice_XC]] * batch, 2.0)
    words = [Entry((4, 5), "word", 0)] * 1000

    def init(lm_params: nnx.State, mimi_params: nnx.State) -> tts_engine.TtsState:
        lm, mimi = nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params)
        return tts_engine.init_state(lm, mimi, how, batch)

    def step(lm_params: nnx.State, mimi_params: nnx.State, told: tts_engine.Told, state: tts_engine.TtsState):
        lm, mimi = nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params)
        return tts_engine.advance(lm, mimi, told, state, jnp.int32(1), how, most=1)

    told = tts_engine.Told(
        script=pack([words] * batch),
        conditions=jax.jit(lambda params: nnx.merge(lm_def, params).condition(values, masks))(lm_params),
        prefix_BQP=jnp.zeros((batch, lm_config.n_q, 0), jnp.int32),
        prefix_B=jnp.zeros(batch, jnp.int32),
        bonus_B=jnp.zeros(batch, jnp.float32),
        keys_B=jax.random.split(jax.random.key(0), batch),
    )
    jitted = jax.jit(step, donate_argnums=3)
    return lambda state: jitted(lm_params, mimi_params, told, state), jax.jit(init)(lm_params, mimi_params)


def time_steps(step: Step, state: Any, steps: int) -> list[float]:
    """Seconds of each of `steps` steps, after three that are not counted."""
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        output, state = step(state)
        jax.block_until_ready(output)
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def row(name: str, batch: int, dtype: str, seconds: Sequence[float]) -> dict[str, Any]:
    """One measurement, with what is needed to compare it: medians, tails, device, versions and date."""
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
    """Measures and yields rows as they are ready.

    Args:
      what: of "lm", "mimi" and "stt".
      sizes: of `SIZES`, for "lm" and "stt".
      batches: rows at a time.
      dtype: of the language model's weights; None means float32 on CPU and bfloat16 elsewhere.
      steps: timed steps.
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
