"""Mimi, the neural codec, between 24 kHz audio and 12.5 frames of codes a second.

Always float32: lower precision changes a visible share of the codes.

Shape letters: B batch rows, T samples or frames, C audio channels, D latent width, Q codebooks.
Source: Moshi (Défossez et al. 2024), section 3.3; kyutai-labs/moshi@e6a55d2 moshi/models/compression.py. Differs on
purpose: the attention window is exact for any size of chunks, while the reference's streaming drops a key from 10 s on.
Codes equal the reference's offline codes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import MimiConfig
from dsm_jax.errors import ConfigError, StreamError
from dsm_jax.nn.conv import CausalConv1d, ConvState, DepthwiseUpsample
from dsm_jax.nn.rvq import SplitQuantizer
from dsm_jax.nn.seanet import seanet_decoder, seanet_encoder
from dsm_jax.nn.transformer import Transformer, TransformerState
from dsm_jax.streaming import scaled_lengths, step_in_blocks

# SEANet runs over long clips in blocks of this many frames, so that the widest activations of a block stay in a CPU's
# cache. Training uses no blocks: gradients of convolutions inside a loop take four times as long.
SEANET_BLOCK_FRAMES = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecState:
    """The state of the encoder, or of the decoder."""

    seanet: tuple
    transformer: TransformerState
    resample: ConvState


class MimiEncoder(nnx.Module):
    """The encoder: samples [B, T, C] to continuous latents [B, T / frame, D]."""

    def __init__(self, config: MimiConfig, *, block_frames: int | None = SEANET_BLOCK_FRAMES, rngs: nnx.Rngs):
        self.frame_size, self.block_frames = config.frame_size, block_frames
        width, stride = config.seanet.dimension, config.resample_stride
        self.seanet = seanet_encoder(config.seanet, rngs=rngs)
        self.transformer = Transformer(config.transformer, rngs=rngs)
        self.downsample = CausalConv1d(
            width, width, kernel=2 * stride, stride=stride, bias=False, replicate=True, rngs=rngs
        )

    def init_state(self, batch_size: int) -> CodecState:
        """Make the state of `batch_size` fresh streams."""
        return CodecState(
            self.seanet.init_state(batch_size),
            self.transformer.init_state(batch_size),
            self.downsample.init_state(batch_size),
        )

    def step(
        self, x_BTC: jax.Array, state: CodecState, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, CodecState]:
        """Run a whole number of frames; lengths are in samples and multiples of the frame size.

        Raises:
          StreamError: T is not a positive multiple of the frame size.
        """
        if x_BTC.shape[1] == 0 or x_BTC.shape[1] % self.frame_size:
            raise StreamError(
                f"Mimi got {x_BTC.shape[1]} samples; a chunk is a positive multiple of {self.frame_size} samples, "
                "so hold back what is over, or pad the end of the clip with zeros"
            )

        block = x_BTC.shape[1] if self.block_frames is None else self.block_frames * self.frame_size
        y_BTD, seanet = step_in_blocks(self.seanet.step, x_BTC, state.seanet, lengths_B, block)
        latents_B = scaled_lengths(lengths_B, x_BTC.shape[1], y_BTD.shape[1])
        y_BTD, transformer = self.transformer.step(y_BTD, state.transformer, latents_B)
        y_BTD, resample = self.downsample.step(y_BTD, state.resample, latents_B)
        return y_BTD, CodecState(seanet, transformer, resample)

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        """Run one step over the whole clip."""
        rows, latents = x_BTC.shape[0], x_BTC.shape[1] // self.frame_size * self.downsample.stride
        state = self.init_state(rows)
        clip = dataclasses.replace(state, transformer=self.transformer.init_clip(rows, latents))
        return self.step(x_BTC, clip)[0]


class MimiDecoder(nnx.Module):
    """The decoder: latents [B, T, D] to samples [B, T * frame, C], not clipped."""

    def __init__(self, config: MimiConfig, *, block_frames: int | None = SEANET_BLOCK_FRAMES, rngs: nnx.Rngs):
        self.block_frames = block_frames
        self.upsample = DepthwiseUpsample(config.seanet.dimension, stride=config.resample_stride, rngs=rngs)
        self.transformer = Transformer(config.transformer, rngs=rngs)
        self.seanet = seanet_decoder(config.seanet, rngs=rngs)

    def init_state(self, batch_size: int) -> CodecState:
        """Make the state of `batch_size` fresh streams."""
        return CodecState(
            self.seanet.init_state(batch_size),
            self.transformer.init_state(batch_size),
            self.upsample.init_state(batch_size),
        )

    def step(
        self, x_BTD: jax.Array, state: CodecState, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, CodecState]:
        """Run any number of frames."""

        y_BTD, resample = self.upsample.step(x_BTD, state.resample, lengths_B)
        latents_B = scaled_lengths(lengths_B, x_BTD.shape[1], y_BTD.shape[1])
        y_BTD, transformer = self.transformer.step(y_BTD, state.transformer, latents_B)
        block = y_BTD.shape[1] if self.block_frames is None else self.block_frames * self.upsample.stride
        y_BTC, seanet = step_in_blocks(self.seanet.step, y_BTD, state.seanet, latents_B, block)
        return y_BTC, CodecState(seanet, transformer, resample)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Run one step over the whole clip."""
        rows, latents = x_BTD.shape[0], x_BTD.shape[1] * self.upsample.stride
        state = self.init_state(rows)
        clip = dataclasses.replace(state, transformer=self.transformer.init_clip(rows, latents))
        return self.step(x_BTD, clip)[0]


class Mimi(nnx.Module):
    """The codec: an encoder, a quantiser and a decoder, each usable on its own.

    A codec that only encodes can be made without its decoder. SEANet runs on `block_frames` frames at a time; None, for
    training, runs it on the whole clip at once.
    """

    def __init__(
        self,
        config: MimiConfig,
        *,
        decoder: bool = True,
        block_frames: int | None = SEANET_BLOCK_FRAMES,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.encoder = MimiEncoder(config, block_frames=block_frames, rngs=rngs)
        self.quantizer = SplitQuantizer(config.quantizer, rngs=rngs)
        self.decoder = MimiDecoder(config, block_frames=block_frames, rngs=rngs) if decoder else None

    def encode_step(
        self, x_BTC: jax.Array, state: CodecState, lengths_B: jax.Array | None = None, *, codebooks: int | None = None
    ) -> tuple[jax.Array, CodecState]:
        """Encode a chunk of audio.

        Args:
          x_BTC: samples in [-1, 1] at the config's `sample_rate`; T is a positive multiple of its `frame_size`: 24 kHz
            and 1920 in the published codec.
          state: from `encoder.init_state`, or from the previous call.
          lengths_B: int32, samples that each row takes, a multiple of `frame_size`; None means all.
          codebooks: number of codebooks to compute, at least 1; None means all.

        Returns:
          codes: int32 [B, codebooks, T / frame_size], from 0 to below the quantizer's `bins`, coarsest first.
          The state to pass next time.

        Raises:
          ConfigError: `codebooks` is not between 1 and the codec's number of codebooks.
          StreamError: T is not a whole number of frames.
        """
        most = self.config.quantizer.n_q
        codebooks = most if codebooks is None else codebooks
        if not 1 <= codebooks <= most:
            raise ConfigError(f"{codebooks} codebooks were asked for; the codec has 1 to {most}")
        y_BTD, state = self.encoder.step(x_BTC, state, lengths_B)
        return self.quantizer.encode(y_BTD, codebooks), state

    def decode_step(
        self, codes_BQT: jax.Array, state: CodecState, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, CodecState]:
        """Decode codes of any number of codebooks and frames to samples [B, T * 1920, C], not clipped.

        A code of -1 is absent and adds nothing, so rows may have different numbers of codebooks.

        Raises:
          ConfigError: there are more codebooks than the codec has, or the codec was made without its decoder.
        """
        if codes_BQT.shape[1] > self.config.quantizer.n_q:
            raise ConfigError(f"{codes_BQT.shape[1]} codebooks were given; give at most {self.config.quantizer.n_q}")
        return self.require_decoder().step(self.quantizer.decode(codes_BQT), state, lengths_B)

    def latents(self, x_BTC: jax.Array) -> jax.Array:
        """Compute the continuous latents [B, T, D] of a whole clip, before quantisation; pads the end with zeros."""
        return self.encoder(pad_to_frames(x_BTC, self.config.frame_size))

    def encode(self, x_BTC: jax.Array, *, codebooks: int | None = None) -> jax.Array:
        """Encode a whole clip to codes [B, codebooks, T]; pads the end with zeros to a whole frame."""
        state = self.encoder.init_state(x_BTC.shape[0])
        return self.encode_step(pad_to_frames(x_BTC, self.config.frame_size), state, codebooks=codebooks)[0]

    def decode(self, codes_BQT: jax.Array) -> jax.Array:
        """Decode a whole clip to samples [B, T * frame_size, C], not clipped."""
        return self.decode_step(codes_BQT, self.require_decoder().init_state(codes_BQT.shape[0]))[0]

    def require_decoder(self, owner: str = "this codec") -> MimiDecoder:
        """Return the decoder.

        Args:
          owner: name of the model, for the message.

        Raises:
          ConfigError: the codec was made without its decoder.
        """
        if self.decoder is None:
            raise ConfigError(
                f"{owner} has no decoder of sound: it was loaded with stt_only=True, or made with decoder=False. "
                "Load or make it without"
            )
        return self.decoder


def pad_to_frames(x_BTC: jax.Array, frame_size: int) -> jax.Array:
    """Pad the end with zeros to a whole number of frames."""
    return jnp.pad(x_BTC, ((0, 0), (0, -x_BTC.shape[1] % frame_size), (0, 0)))
