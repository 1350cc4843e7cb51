"""A codec from scratch: reconstruction, commitment, moving codebooks, and a first codebook that knows what is said.

From the Moshi paper (Défossez et al. 2024, section 3.3): the model, a semantic codebook beside residual ones,
straight-through gradients, codebook dropout. Ours: the semantic codebook learns from labels, by a small causal head
that must tell from it what is being said a few frames ago (the paper distils WavLM); spectral and waveform distances
in place of its adversarial losses; the sizes.

Shape letters: B batch rows, T samples, N frames, D latent width, C codebook width, L labels, Q codebooks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsm_jax.models.mimi import Mimi
from dsm_jax.nn.conv import CausalConv1d
from dsm_jax.nn.seanet import Chain
from dsm_jax.training.codebooks import Averages, CodebookRule, init_averages, quantize, set_entries
from dsm_jax.training.spectral import stft_loss

QUIET = 0.02  # rms; recordings below it are compared as if they were as loud


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecObjective:
    """What a codec is trained for."""

    waveform: float = 0.2  # weight of the mean absolute difference of samples, of recordings scaled to rms 1
    commitment: float = 0.25
    semantic: float = 4.0
    look_ahead: int = 3  # frames that the semantic head has heard beyond the one it names
    codebook_dropout: float = 0.5  # share of rows that go through a random number of codebooks
    decoded_frames: int = 12  # of each row, as many are decoded and compared
    codebooks: CodebookRule = CodebookRule()


class SemanticHead(nnx.Module):
    """Names what is being said from the first codebook alone; thrown away after training."""

    def __init__(self, width: int, labels: int, *, rngs: nnx.Rngs):
        hidden = 96
        self.convolutions = Chain(
            [CausalConv1d(width, hidden, kernel=6, rngs=rngs), CausalConv1d(hidden, labels, kernel=4, rngs=rngs)]
        )

    def __call__(self, x_BNC: jax.Array) -> jax.Array:
        """Logits [B, N, L]."""
        return self.convolutions(x_BNC)


class CodecTrainee(nnx.Module):
    """A codec with what it has in training only."""

    def __init__(self, mimi: Mimi, labels: int, *, rngs: nnx.Rngs):
        self.mimi = mimi
        self.head = SemanticHead(mimi.config.quantizer.dimension, labels, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecMemory:
    """What training carries along beside parameters: the codebooks, which no gradient moves."""

    entries: nnx.State
    semantic: Averages
    acoustic: Averages


def is_codebook(path: tuple, _: object) -> bool:
    """A filter for `nnx.split`: entries of codebooks."""
    return "embedding_LC" in path


def split(trainee: CodecTrainee, *, fresh: bool) -> tuple[nnx.GraphDef, nnx.State, CodecMemory]:
    """Structure, what gradients train, and what they do not; `fresh` codebooks start at vectors of the first batch."""
    graph, entries, params = nnx.split(trainee, is_codebook, ...)
    branches = trainee.mimi.quantizer.semantic, trainee.mimi.quantizer.acoustic
    return graph, params, CodecMemory(entries, *(init_averages(branch, fresh=fresh) for branch in branches))


def merge(graph: nnx.GraphDef, params: nnx.State, memory: CodecMemory) -> CodecTrainee:
    """The codec and its head again."""
    return nnx.merge(graph, memory.entries, params)


def distances(x_BT: jax.Array, y_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far y is from x, by spectra and by samples, those of recordings scaled to rms 1; scalars."""
    level_B1 = jnp.maximum(jnp.sqrt(jnp.mean(x_BT**2, 1, keepdims=True)), QUIET)
    return stft_loss(x_BT, y_BT), jnp.mean(jnp.abs(x_BT - y_BT) / level_B1)


def codec_loss(
    trainee: CodecTrainee,
    memory: CodecMemory,
    batch: dict[str, jax.Array],
    key: jax.Array,
    objective: CodecObjective,
) -> tuple[jax.Array, tuple[CodecMemory, dict[str, jax.Array]]]:
    """The loss of a batch, the codebooks after it, and what else is worth knowing; all in float32.

    Args:
      trainee: from `merge`.
      memory: the same that it was merged from.
      batch: `pcm_BT` float32, whole frames; `labels_BN` int32, what is being said in each frame, -1 where unknown.
        What is decoded of a row has to be longer than the widest spectrum's window.
      key: of this step.
      objective: what counts how much.
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
    semantic = quantize(quantizer.semantic, latents_BND, memory.semantic, rule, all_B, semantic_key)
    acoustic = quantize(quantizer.acoustic, latents_BND, memory.acoustic, rule, used_B, acoustic_key)
    decoded_BND = quantizer.semantic.output_proj(semantic.vectors_BTC)
    decoded_BND = decoded_BND + quantizer.acoustic.output_proj(acoustic.vectors_BTC)

    logits_BNL = trainee.head(semantic.vectors_BTC)[:, objective.look_ahead :]
    target_BN = labels_BN[:, : frames - objective.look_ahead]
    known_BN = target_BN >= 0
    named_BN = optax.softmax_cross_entropy_with_integer_labels(logits_BNL, jnp.maximum(target_BN, 0))
    known = jnp.maximum(known_BN.sum(), 1).astype(jnp.float32)
    semantic_loss = jnp.sum(jnp.where(known_BN, named_BN, 0.0)) / known
    right = jnp.sum((logits_BNL.argmax(-1) == target_BN) & known_BN).astype(jnp.float32) / known

    window = min(objective.decoded_frames, frames)
    first_B = jax.random.randint(crop_key, (rows,), 0, frames - window + 1)
    size = mimi.config.frame_size
    cut = jax.vmap(jax.lax.dynamic_slice_in_dim, in_axes=(0, 0, None))
    assert mimi.decoder is not None
    made_BT = mimi.decoder(cut(decoded_BND, first_B, window))[..., 0]
    spectral, waveform = distances(cut(pcm_BT, first_B * size, window * size), made_BT)

    commitment = semantic.commitment + acoustic.commitment
    loss = spectral + objective.waveform * waveform + objective.commitment * commitment
    loss += objective.semantic * semantic_loss
    set_entries(quantizer, semantic.entries_QVC, acoustic.entries_QVC)
    after = CodecMemory(nnx.state(trainee, is_codebook), semantic.averages, acoustic.averages)
    metrics = {
        "spectral": spectral,
        "waveform": waveform,
        "commitment": commitment,
        "semantic": semantic_loss,
        "named": right,
        "entries_semantic": semantic.perplexity_Q.mean(),
        "entries_acoustic": acoustic.perplexity_Q.mean(),
    }
    return loss, (jax.lax.stop_gradient(after), metrics)


def is_decoder(path: tuple, _: object) -> bool:
    """A filter for `nnx.split`: what a codec makes sound with."""
    return path[0] == "decoder"


def decoder_loss(
    mimi: Mimi, batch: dict[str, jax.Array], objective: CodecObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch for the decoder alone, from the codes that the codec gives, and its parts; all in float32.

    Args:
      mimi: the codec; no gradient moves its codes.
      batch: `pcm_BT` float32, whole frames, longer than the widest spectrum's window.
      objective: what counts how much; of sound, nothing else counts here.
    """
    pcm_BT = batch["pcm_BT"]
    codes_BQN = mimi.quantizer.encode(mimi.latents(pcm_BT[..., None]), mimi.config.quantizer.n_q)
    assert mimi.decoder is not None
    made_BT = mimi.decoder(mimi.quantizer.decode(codes_BQN))[..., 0]
    spectral, waveform = distances(pcm_BT, made_BT)
    return spectral + objective.waveform * waveform, {"spectral": spectral, "waveform": waveform}
