"""The decoder's stage: the decoder learns to reconstruct recordings, and the codes of the codec stay the same.

Shape letters: B batch rows, T samples, Q codebooks, N frames.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.models.mimi import Mimi
from dsm_jax.training.loop import Run, RunConfig
from dsm_jax.training.losses.codec import decoder_loss, is_decoder
from dsm_jax.training.step import OptimizerConfig
from recipes.digits.codec import DECODER, first_rows, train_decoder
from tests.helpers import small
from tests.test_codec_loss import CONFIG

FRAMES = 20
STAGE = dataclasses.replace(
    DECODER,
    batch_size=4,
    frames=FRAMES,
    run=RunConfig(steps=30, log_every=10, save_every=10),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=1),
)


class Rows:
    """Rows of tones that differ in pitch and level."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(index)
        time_T = np.arange(FRAMES * CONFIG.frame_size) / CONFIG.sample_rate
        pcm_T = random.uniform(0.1, 0.9) * np.sin(2 * np.pi * random.uniform(50, 1500) * time_T)
        return {"pcm_BT": pcm_T.astype(np.float32)}


def parts(state: nnx.State) -> set[str]:
    return {path[0].key for path, _ in jax.tree.leaves_with_path(state)}


@pytest.mark.slow
def test_only_the_decoder_learns_and_it_does(tmp_path):
    rows = Rows()
    held_out = first_rows(rows, 32)
    mimi = small.build(lambda rngs: Mimi(CONFIG, block_frames=None, rngs=rngs))
    graph, decoder, rest = nnx.split(mimi, is_decoder, ...)
    assert parts(decoder) == {"decoder"}
    assert parts(rest) == {"encoder", "quantizer"}
    before = jax.tree.map(np.asarray, rest)

    @jax.jit
    def look(decoder, rest):
        mimi, pcm_BT = nnx.merge(graph, decoder, rest), jnp.asarray(held_out["pcm_BT"])
        codes_BQN = mimi.encode(pcm_BT[..., None])
        loss, figures = decoder_loss(mimi, held_out, STAGE.objective)
        level_B1 = jnp.sqrt(jnp.mean(pcm_BT**2, axis=1, keepdims=True))
        waveform = jnp.mean(jnp.abs(pcm_BT - mimi.decode(codes_BQN)[..., 0]) / level_B1)
        return loss, codes_BQN, figures["waveform"], waveform

    loss, codes_BQN, *_ = look(decoder, rest)
    trained = train_decoder(STAGE, Run(tmp_path / "decoder", STAGE.run), mimi, rows, rows, seed=0, resume=False)
    _, decoder, rest = nnx.split(trained, is_decoder, ...)
    jax.tree.map(np.testing.assert_array_equal, rest, before)
    loss_after, codes_after_BQN, waveform, wanted = look(decoder, rest)
    np.testing.assert_array_equal(codes_after_BQN, codes_BQN)
    assert loss_after < 0.9 * loss
    np.testing.assert_allclose(waveform, wanted, rtol=1e-4)  # it is compared with the recording itself
    assert (tmp_path / "decoder/curve.png").is_file()
