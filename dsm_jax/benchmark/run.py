"""Time steps of the published sizes on this machine, with random weights; one JSON row per measurement.

The times exclude compilation. States are donated as in use, and every step waits for the device.
"""

import dataclasses
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsm_jax.benchmark.listening import Step, lm_step, mimi_step, stt_step
from dsm_jax.benchmark.speaking import csm_prefill, csm_step, tts_step
from dsm_jax.configs import ModelConfig, presets
from dsm_jax.errors import ConfigError

SIZES = {
    "stt-1b": presets.STT_1B,
    "stt-2.6b": presets.STT_2_6B,
    "tts-1.6b": presets.TTS_1_6B,
    "csm-1b": presets.CSM_1B,
}
FRAME_S = 0.08


@dataclasses.dataclass(frozen=True)
class Timed:
    """A step to time.

    Attributes:
      make: maps a config, a batch size, a dtype and a form of the weights to the step and its first state.
      warm_up: steps before those that count.
      frame_s: seconds of each row's sound that a step is for; None for a step that is for none.
    """

    make: Callable[[ModelConfig, int, jnp.dtype, str | None], tuple[Step, Any]]
    warm_up: int = 3
    frame_s: float | None = FRAME_S


# The kinds of steps besides "mimi": the model type of their sizes, and the step of each row. The sound of tts-1.6b is
# 16 steps behind its text, and 2 more for the last codebooks: only then is a frame whole.
STEPS: Mapping[str, tuple[str, Mapping[str, Timed]]] = {
    "lm": ("stt", {"lm_step": Timed(lm_step)}),
    "stt": ("stt", {"stt_step": Timed(stt_step)}),
    "tts": ("tts", {"tts_frame": Timed(tts_step, warm_up=20)}),
    "csm": ("csm", {"csm_prefill": Timed(csm_prefill, frame_s=None), "csm_frame": Timed(csm_step)}),
}
KINDS = ("lm", "mimi", "stt", "tts", "csm")


def time_steps(step: Step, state: Any, steps: int, warm_up: int = 3) -> list[float]:
    """Time each of `steps` steps, in seconds, after `warm_up` steps that are not counted."""
    seconds = []
    for _ in range(steps + warm_up):
        start = time.perf_counter()
        output, state = step(state)
        jax.block_until_ready(output)
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def row(
    name: str,
    batch: int,
    dtype: str,
    seconds: Sequence[float],
    *,
    quantize: str | None = None,
    frame_s: float | None = FRAME_S,
) -> dict[str, Any]:
    """Make the row of one measurement: median, tail, device, versions and date.

    Args:
      name: of the step.
      batch: rows of a step.
      dtype: of the weights.
      seconds: duration of each step.
      quantize: form of the weights of the layers, if it is another one.
      frame_s: as in `Timed`.
    """
    median = statistics.median(seconds)
    tail = float(np.quantile(seconds, 0.99))
    live = {} if frame_s is None else {"x_real_time": round(batch * frame_s / median, 2), "keeps_up": tail < frame_s}
    return {
        "bench": name,
        "batch": batch,
        "dtype": dtype,
        "quantize": quantize,
        "p50_ms": round(1e3 * median, 3),
        "p99_ms": round(1e3 * tail, 3),
        "steps": len(seconds),
        **live,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def run(
    what: Sequence[str],
    *,
    sizes: Sequence[str] = (),
    batches: Sequence[int] = (1, 8),
    dtype: str | None = None,
    quantize: str | None = None,
    steps: int = 20,
) -> Iterator[dict[str, Any]]:
    """Measure, and yield each row when it is ready.

    Args:
      what: steps to time, any of `KINDS`.
      sizes: names in `SIZES`; a kind of step without any in it is timed with its first size.
      batches: batch sizes.
      dtype: dtype of the language model's weights; None means float32 on CPU and bfloat16 elsewhere.
      quantize: "int8" for int8 weights of the layers; None for weights of `dtype`.
      steps: number of timed steps.

    Raises:
      ConfigError: a kind of step that there is not, or a size that none of `what` has.
    """
    asked = [(kind, size) for kind in STEPS if kind in what for size in _sizes_of(kind, sizes)]
    if unknown := sorted(set(what) - set(KINDS)):
        raise ConfigError(f"{unknown[0]} cannot be timed; choose of {', '.join(KINDS)}")
    if unused := sorted(set(sizes) - {size for _, size in asked}):
        raise ConfigError(f"{unused[0]} is not a size of {' or '.join(what)}; add {SIZES[unused[0]].model_type}")
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for batch in batches:
        if "mimi" in what:
            for way in ("encode", "decode"):
                yield row(f"mimi_{way}_frame", batch, "float32", time_steps(*mimi_step(batch, way), steps))
        for kind, size in asked:
            for name, timed in STEPS[kind][1].items():
                # No name holds the weights, so that they are freed before the next are drawn.
                seconds = time_steps(*timed.make(SIZES[size], batch, jnp.dtype(dtype), quantize), steps, timed.warm_up)
                yield row(f"{name} {size}", batch, dtype, seconds, quantize=quantize, frame_s=timed.frame_s)


def _sizes_of(kind: str, sizes: Sequence[str]) -> list[str]:
    """Return those of `sizes` that a kind of step has, or its first one."""
    own = [size for size, config in SIZES.items() if config.model_type == STEPS[kind][0]]
    return [size for size in own if size in sizes] or own[:1]
