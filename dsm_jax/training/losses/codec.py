"""Compute the losses of a codec: reconstruction, commitment, moving codebooks, and labels for the semantic codebook.

From the Moshi paper (Défossez et al. 2024, section 3.3): the model, the split into a semantic codebook and residual
ones, straight-through gradients, codebook dropout. Ours: the semantic codebook learns from labels (the paper distils
WavLM), which a small causal head predicts from it a few frames late; spectral and waveform distances in place of the
adversarial losses; the sizes.

Shape letters: B batch rows, T samples, N frames, D latent width, C codebook width, L codebook entries, Q codebooks,
V labels, F frequency bins, W samples of a window, H samples of a hop.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.models.mimi import Mimi
from dsm_jax.nn.conv import CausalConv1d
from dsm_jax.nn.precision import full_precision
from dsm_jax.nn.seanet import Chain
from dsm_jax.options import check_numbers
from dsm_jax.training.codebooks import Averages, CodebookRule, init_averages, quantize, set_entries
from dsm_jax.training.losses.checks import check_shares, check_weights

QUIET = 0.02  # rms; quieter recordings are scaled as if they had it
SCALES = (256, 512, 1024, 2048)  # samples in a window; the hop is a quarter
MAGNITUDE_FLOOR = 1e-3  # 60 dB below full scale; smaller magnitudes hardly count


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecObjective:
    """Weights and dropouts of the loss.

    Attributes:
      waveform: weight of the mean absolute difference of samples, of recordings scaled to rms 1.
      commitment: weight of the distance between latents and codebook entries.
      semantic: weight of the cross-entropy of labels.
      look_ahead: number of frames after the labelled frame that the semantic head reads.
      codebook_dropout: share of rows that are quantised by a random number of codebooks.
      decoded_frames: frames of each row that are decoded and compared.
      codebooks: settings of the codebooks' moving averages.
    """

    waveform: float = 0.2
    commitment: float = 0.25
    semantic: float = 4.0
    look_ahead: int = 3
    codebook_dropout: float = 0.5
    decoded_frames: int = 12
    codebooks: CodebookRule = CodebookRule()

    def __post_init__(self) -> None:
        check_numbers(self)
        check_weights(self, "waveform", "commitment", "semantic")
        check_shares(self, "codebook_dropout")
        if self.look_ahead < 0 or self.decoded_frames < 1:
            raise ConfigError(
                f"look_ahead is {self.look_ahead} and decoded_frames {self.decoded_frames}; give 0 frames or more to "
                "look ahead, and 1 or more to decode"
            )


class SemanticHead(nnx.Module):
    """The head that predicts labels from the first codebook; used in training only."""

    def __init__(self, width: int, labels: int, *, rngs: nnx.Rngs):
        hidden = 96
        self.convolutions = Chain(
            [CausalConv1d(width, hidden, kernel=6, rngs=rngs), CausalConv1d(hidden, labels, kernel=4, rngs=rngs)]
        )

    def __call__(self, x_BNC: jax.Array) -> jax.Array:
        """Compute the logits [B, N, L]."""
        return self.convolutions(x_BNC)


class CodecTrainee(nnx.Module):
    """A codec with its semantic head."""

    def __init__(self, mimi: Mimi, labels: int, *, rngs: nnx.Rngs):
        self.mimi = mimi
        self.head = SemanticHead(mimi.config.quantizer.dimension, labels, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecAux:
    """Auxiliary state of codec training: the codebooks, which have no gradients, and their averages."""

    entries: nnx.State
    semantic: Averages
    acoustic: Averages


def is_codebook(path: tuple, _: object) -> bool:
    """Select codebook entries, for `nnx.split`."""
    return "embedding_LC" in path


def split(trainee: CodecTrainee, *, fresh: bool) -> tuple[nnx.GraphDef, nnx.State, CodecAux]:
    """Split into structure, trained parameters and auxiliary state.

    Args:
      trainee: the codec and its head.
      fresh: whether to start the codebooks at vectors of the first batch instead of their present entries.
    """
    graph, entries, params = nnx.split(trainee, is_codebook, ...)
    branches = trainee.mimi.quantizer.semantic, trainee.mimi.quantizer.acoustic
    return graph, params, CodecAux(entries, *(init_averages(branch, fresh=fresh) for branch in branches))


def merge(graph: nnx.GraphDef, params: nnx.State, aux: CodecAux) -> CodecTrainee:
    """Undo `split`."""
    return nnx.merge(graph, aux.entries, params)


def magnitudes(x_BT: jax.Array, window: int) -> jax.Array:
    """Compute magnitudes [B, N, F] of a short-time Fourier transform; a full-scale sine has about 1.

    The hop is window / 4. Windows lie wholly inside the clip, so N is T // hop - 3, and F is window // 2 + 1.
    """
    hop = window // 4
    blocks = x_BT.shape[1] // hop
    parts_BNH = x_BT[:, : blocks * hop].reshape(x_BT.shape[0], blocks, hop)
    frames_BNW = jnp.concatenate([parts_BNH[:, i : blocks - 3 + i] for i in range(4)], axis=2)
    hann_W = jnp.asarray(np.hanning(window + 1)[:-1] * (4 / window), x_BT.dtype)
    spectrum_BNF = jnp.fft.rfft(frames_BNW * hann_W)
    return jnp.sqrt(spectrum_BNF.real**2 + spectrum_BNF.imag**2 + MAGNITUDE_FLOOR**2)


def stft_loss(x_BT: jax.Array, y_BT: jax.Array, *, scales: tuple[int, ...] = SCALES) -> jax.Array:
    """Average over scales the log magnitude distance plus the magnitude distance relative to the target; scalar.

    Args:
      x_BT: the target.
      y_BT: the reconstruction.
      scales: window lengths in samples.
    """
    total = jnp.zeros(())
    for window in scales:
        x_BNF, y_BNF = magnitudes(x_BT, window), magnitudes(y_BT, window)
        linear = jnp.mean(jnp.abs(x_BNF - y_BNF)) / (jnp.mean(x_BNF) + MAGNITUDE_FLOOR)
        total += jnp.mean(jnp.abs(jnp.log(x_BNF) - jnp.log(y_BNF))) + linear
    return total / len(scales)


def distances(x_BT: jax.Array, y_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the spectral distance of y from x, and their sample distance scaled so that x has rms 1; scalars."""
    level_B1 = jnp.maximum(jnp.sqrt(jnp.mean(x_BT**2, 1, keepdims=True)), QUIET)
    return stft_loss(x_BT, y_BT), jnp.mean(jnp.abs(x_BT - y_BT) / level_B1)


@full_precision
def codec_loss(
    trainee: CodecTrainee,
    aux: CodecAux,
    batch: dict[str, jax.Array],
    key: jax.Array,
    objective: CodecObjective,
) -> tuple[jax.Array, tuple[CodecAux, dict[str, jax.Array]]]:
    """Compute the loss of a batch, the codebooks after the batch, and metrics; all in float32.

    Args:
      trainee: codec and head, from `merge`.
      aux: the auxiliary state that the trainee was merged from.
      batch: `pcm_BT` float32, whole frames; `labels_BN` int32, the label of each frame, -1 if unknown. The decoded part
        of a row must be longer than the largest window of `SCALES`.
      key: PRNG key of this step.
      objective: weights and dropouts.
    """
    mimi = trainee.mimi
    pcm_BT, labels_BN = batch["pcm_BT"], batch["labels_BN"]
    rows, frames = labels_BN.shape
    used_key, full_key, semantic_key, acoustic_key, crop_key = jax.random.split(key, 5)
    latents_BND = mimi.encoder(pcm_BT[..., None])

    quantizer = mimi.quantizer
    others = len(quantizer.acoustic.codebooks)
    dropped_B = jax.random.bernoulli(full_key, objective.codebook_dropout, (rows,))
    used_B = jnp.where(dropped_B, jax.random.randint(used_key, (rows,), 0, others + 1), others)
    all_B = jnp.full((rows,), len(quantizer.semantic.codebooks))
    rule = objective.codebooks
    semantic = quantize(quantizer.semantic, latents_BND, aux.semantic, rule, all_B, semantic_key)
    acoustic = quantize(quantizer.acoustic, latents_BND, aux.acoustic, rule, used_B, acoustic_key)
    decoded_BND = quantizer.semantic.output_proj(semantic.vectors_BTC)
    decoded_BND = decoded_BND + quantizer.acoustic.output_proj(acoustic.vectors_BTC)

    logits_BNV = trainee.head(semantic.vectors_BTC)[:, objective.look_ahead :]
    target_BN = labels_BN[:, : frames - objective.look_ahead]
    known_BN = target_BN >= 0
    each_BN = optax.softmax_cross_entropy_with_integer_labels(logits_BNV, jnp.maximum(target_BN, 0))
    known = jnp.maximum(known_BN.sum(), 1).astype(jnp.float32)
    semantic_loss = jnp.sum(jnp.where(known_BN, each_BN, 0.0)) / known
    right = jnp.sum((logits_BNV.argmax(-1) == target_BN) & known_BN).astype(jnp.float32) / known

    window = min(objective.decoded_frames, frames)
    first_B = jax.random.randint(crop_key, (rows,), 0, frames - window + 1)
    size = mimi.config.frame_size
    crop = jax.vmap(jax.lax.dynamic_slice_in_dim, in_axes=(0, 0, None))
    assert mimi.decoder is not None
    made_BT = mimi.decoder(crop(decoded_BND, first_B, window))[..., 0]
    spectral, waveform = distances(crop(pcm_BT, first_B * size, window * size), made_BT)

    commitment = semantic.commitment + acoustic.commitment
    loss = spectral + objective.waveform * waveform + objective.commitment * commitment
    loss += objective.semantic * semantic_loss
    set_entries(quantizer, semantic.entries_QLC, acoustic.entries_QLC)
    after = CodecAux(nnx.state(trainee, is_codebook), semantic.averages, acoustic.averages)
    metrics = {
        "spectral": spectral,
        "waveform": waveform,
        "commitment": commitment,
        "semantic": semantic_loss,
        "label_accuracy": right,
        "entries_semantic": semantic.perplexity_Q.mean(),
        "entries_acoustic": acoustic.perplexity_Q.mean(),
    }
    return loss, (jax.lax.stop_gradient(after), metrics)


def is_decoder(path: tuple, _: object) -> bool:
    """Select the parameters of the decoder, for `nnx.split`."""
    return path[0] == "decoder"


def decoder_loss(
    mimi: Mimi, batch: dict[str, jax.Array], objective: CodecObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of decoding the codec's own codes, and the loss's parts; all in float32.

    Args:
      mimi: the codec; its codes have no gradients.
      batch: `pcm_BT` float32, whole frames, longer than the largest window of `SCALES`.
      objective: weights; only `waveform` is used.
    """
    pcm_BT = batch["pcm_BT"]
    codes_BQN = mimi.quantizer.encode(mimi.latents(pcm_BT[..., None]), mimi.config.quantizer.n_q)
    assert mimi.decoder is not None
    made_BT = mimi.decoder(mimi.quantizer.decode(codes_BQN))[..., 0]
    spectral, waveform = distances(pcm_BT, made_BT)
    return spectral + objective.waveform * waveform, {"spectral": spectral, "waveform": waveform}
