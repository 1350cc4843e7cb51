"""Time steps of the published sizes on this machine, with random weights; one JSON row per measurement.

The times exclude compilation. States are donated as in use, and every step waits for the device.

Shape letters: B batch rows, T samples, C audio channels, M streams.
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

from dsm_jax import codec
from dsm_jax.configs import MimiConfig, ModelConfig, presets
from dsm_jax.errors import ConfigError
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.nn import quant
from dsm_jax.nn.linear import fan_in
from dsm_jax.runtime.compile import compiled, plain
from dsm_jax.stt import program as stt_program

SIZES = {"stt-1b": presets.STT_1B, "stt-2.6b": presets.STT_2_6B}
FRAME_S = 0.08
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


def _random_lm(config: ModelConfig, dtype: jnp.dtype, quantize: str | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    lm = config.lm
    if lm is None:
        raise ConfigError("a codec alone has no language model to time; give a speech-to-text config")
    graph, params = random_params(lambda: DelayedStreamsLM(lm, dtype=dtype, rngs=nnx.Rngs(0)), dtype)
    return graph, params if quantize is None else quant.quantize(params)


def lm_step(config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame through the language model, greedy token included."""
    graph, params = _random_lm(config, dtype, quantize)
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
    books, bins = config.quantizer.n_q, config.quantizer.bins
    if way == "encode":
        half, frame = mimi.encoder, 0.1 * jax.random.normal(jax.random.key(1), (batch, config.frame_size, 1))
        step = compiled(codec.encode_step, (graph,), books, donate=(1,))
    else:
        half, frame = mimi.decoder, jax.random.randint(jax.random.key(2), (batch, books, 1), 0, bins)
        step = compiled(codec.decode_step, (graph,), donate=(1,))
    networks = plain(params)
    return lambda state: step(networks, frame, state), half.init_state(batch)


def stt_step(config: ModelConfig, batch: int, dtype: jnp.dtype, quantize: str | None = None) -> tuple[Step, Any]:
    """Make the step of one frame of speech to text: codec, language model and sampling, as a server runs them."""
    lm_def, lm_params = _random_lm(config, dtype, quantize)
    mimi_def, mimi_params = random_params(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), jnp.float32)
    pcm_BTC = 0.1 * jax.random.normal(jax.random.key(1), (batch, config.mimi.frame_size, 1))
    settings, slot_B = stt_program.SttSettings(batch), np.arange(batch)
    inputs = stt_program.SttInputs(pcm_BTC, jnp.ones((batch,), jnp.int32))
    graphs, params = (lm_def, mimi_def), plain(lm_params, mimi_params)
    step = compiled(stt_program.step, graphs, settings, donate=(0,))
    state = compiled(stt_program.init_state, graphs, settings)(params)
    state = compiled(stt_program.insert, graphs, settings)(params, state, slot_B, state.request)
    return lambda state: step(params, state, inputs), state


def time_steps(step: Step, state: Any, steps: int) -> list[float]:
    """Time each of `steps` steps, in seconds, after three warm-up steps."""
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        output, state = step(state)
        jax.block_until_ready(output)
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def row(name: str, batch: int, dtype: str, seconds: Sequence[float], *, quantize: str | None = None) -> dict[str, Any]:
    """Make the row of one measurement: median, tail, device, versions and date."""
    median = statistics.median(seconds)
    tail = float(np.quantile(seconds, 0.99))
    return {
        "bench": name,
        "batch": batch,
        "dtype": dtype,
        "quantize": quantize,
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
    what: Sequence[str],
    *,
    sizes: Sequence[str],
    batches: Sequence[int],
    dtype: str | None,
    quantize: str | None = None,
    steps: int,
) -> Iterator[dict[str, Any]]:
    """Measure, and yield each row when it is ready.

    Args:
      what: steps to time, any of "lm", "mimi" and "stt".
      sizes: names in `SIZES`, for "lm" and "stt".
      batches: batch sizes.
      dtype: dtype of the language model's weights; None means float32 on CPU and bfloat16 elsewhere.
      quantize: "int8" for int8 weights of the layers; None for weights of `dtype`.
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
                    seconds = time_steps(*make(SIZES[size], batch, jnp.dtype(dtype), quantize), steps)
                    yield row(f"{name}_step {size}", batch, dtype, seconds, quantize=quantize)
