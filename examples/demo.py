"""Sends a real recording through the Mimi codec, streaming and offline, and prints what it cost.

The weights are random, as trained ones are not in this repository, so there is no sound worth hearing; the codebooks
are drawn from the recording's own latents, so that codes mean something. Sizes, speed and exactness are the real thing.
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


def draw_codebooks(mimi: Mimi, latents_BTD: jax.Array) -> None:
    """Fills every codebook with points spread like what the ones before it leave of the latents, nearer the centre."""
    random = np.random.default_rng(0)
    for branch in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
        left_TC = np.asarray(latents_BTD[0] @ branch.input_proj_DC[...])
        for book in branch.codebooks:
            rows = left_TC.mean(0) + 0.3 * left_TC.std(0) * random.normal(size=book.embedding_VC.shape)
            book.embedding_VC[...] = jnp.asarray(rows, jnp.float32)
            left_TC = left_TC - rows[np.asarray(book.nearest(jnp.asarray(left_TC)))]


def main() -> None:
    config = MimiConfig()
    pcm = audio.read(RECORDING, config.sample_rate)
    frames = pcm.size // config.frame_size
    pcm_BTC = jnp.asarray(pcm[None, : frames * config.frame_size, None])
    print(f"{RECORDING.name}: {pcm.size / config.sample_rate:.2f} s, {frames} frames of {config.frame_size} samples")

    mimi = jax.jit(lambda: Mimi(config, rngs=nnx.Rngs(0)))()
    draw_codebooks(mimi, jax.jit(lambda mimi, pcm: mimi.latents(pcm))(mimi, pcm_BTC))
    graph, params = nnx.split(mimi)
    step = jax.jit(lambda params, pcm, state: nnx.merge(graph, params).encode_step(pcm, state), donate_argnums=2)
    step(params, pcm_BTC[:, : config.frame_size], mimi.encoder.init_state(1))  # compiles

    state, columns, start = mimi.encoder.init_state(1), [], time.perf_counter()
    for chunk in jnp.split(pcm_BTC, frames, axis=1):
        codes, state = step(params, chunk, state)
        columns.append(np.asarray(codes))
    seconds = time.perf_counter() - start
    streamed = np.concatenate(columns, axis=2)
    offline = np.asarray(jax.jit(lambda params, pcm: nnx.merge(graph, params).encode(pcm))(params, pcm_BTC))

    print(f"frames 20 to 22, the first 8 of {offline.shape[1]} codebooks:\n{offline[0, :8, 20:23].T}")
    print(f"{np.unique(offline).size} different codes; streaming equals offline in {np.mean(streamed == offline):.2%}")
    print(f"streaming took {1e3 * seconds / frames:.1f} ms a frame of 80 ms on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
