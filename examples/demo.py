"""Sends a real recording through the Mimi codec, streaming and offline, and prints what it cost.

The weights are random, so the sound that comes back is noise; codes, speed and exactness are the real thing.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import audio
from dsm_jax.configs import MimiConfig
from dsm_jax.models.mimi import Mimi

RECORDING = Path(__file__).parent / "audio" / "mister_quilter.flac"


def main() -> None:
    config = MimiConfig()
    pcm = audio.read(RECORDING, config.sample_rate)
    frames = pcm.size // config.frame_size
    pcm_BTC = jnp.asarray(pcm[: frames * config.frame_size, None])[None]
    print(f"{RECORDING.name}: {pcm.size / config.sample_rate:.2f} s, {frames} frames of {config.frame_size} samples")

    graph, params = nnx.split(jax.jit(lambda: Mimi(config, rngs=nnx.Rngs(0)))())
    offline = jax.jit(lambda params, pcm: nnx.merge(graph, params).encode(pcm))
    step = jax.jit(lambda params, pcm, state: nnx.merge(graph, params).encode_step(pcm, state), donate_argnums=2)

    whole = np.asarray(offline(params, pcm_BTC))
    state, columns = nnx.merge(graph, params).encoder.init_state(1), []
    step.lower(params, pcm_BTC[:, : config.frame_size], state).compile()
    start = time.perf_counter()
    for t in range(frames):
        chunk = pcm_BTC[:, t * config.frame_size : (t + 1) * config.frame_size]
        codes, state = step(params, chunk, state)
        columns.append(np.asarray(codes))
    seconds = time.perf_counter() - start
    streamed = np.concatenate(columns, axis=2)

    print(f"codes of the first three frames, 8 of {whole.shape[1]} codebooks:\n{whole[0, :8, :3].T}")
    print(f"streaming equals offline in {np.mean(streamed == whole):.2%} of {whole.size} codes")
    print(f"streaming: {1e3 * seconds / frames:.1f} ms a frame of 80 ms, on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
