"""Serve random weights on a GPU to live streams, for `tests.benchmarks.gpu`: how late their frames are answered.

The weights are saved as a model in bfloat16, `dsm-jax serve` loads it in a process of its own, and the load is that of
`dsm-jax bench serve`, on the same machine.
"""

import asyncio
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dsm_jax import checkpoints
from dsm_jax.benchmark.run import FRAME_S
from dsm_jax.benchmark.weights import random_model
from dsm_jax.configs import ModelConfig
from dsm_jax.models.family import lm_config
from dsm_jax.serving.load import Load, Report, run
from dsm_jax.tokenizers import load_tokenizer
from tests.benchmarks.server import serving
from tests.helpers.tokenizer_maker import make_tokenizer


def save_random(config: ModelConfig, folder: Path, dtype: str) -> Path:
    """Save a speech-to-text model of random weights with a tokenizer; how many words it hears is left to chance."""
    tokenizer = load_tokenizer(make_tokenizer(folder / "words.model", lm_config(config).text_card))
    model = dataclasses.replace(random_model(config, jnp.dtype(dtype)), tokenizer=tokenizer)
    checkpoints.save(model, folder / "random")
    return folder / "random"


def served(
    config: ModelConfig, streams: Sequence[int], *, dtype: str, platforms: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """Measure servers with so many slots, all taken, until one answers too late; yield each one's row."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_random(config, Path(folder), dtype)
        for slots in streams:
            command = ("--stt", str(model), "--slots", str(slots), "--dtype", dtype)
            with serving(command, {**os.environ, "JAX_PLATFORMS": platforms}) as server:
                report = asyncio.run(run(Load(url=server.url, streams=slots, seconds=seconds)))
            found = row(report)
            yield found
            if not found["streams"]:
                return


def row(report: Report) -> dict[str, Any]:
    """Return the figures of a load; "streams" is 0 unless 99 % of its frames were answered within a frame's time."""
    tail = report.latency
    return {
        "batch": report.streams,
        "p50_ms": tail.p50,
        "p95_ms": tail.p95,
        "p99_ms": tail.p99,
        "frames": report.frames,
        "dropped": report.dropped,
        "errors": sum(report.errors.values()),
        "busy": report.busy,
        "streams": report.streams if report.holds(1e3 * FRAME_S, "p99") else 0,
    }
