"""The codec over whole recordings of any length, in constant memory on the device and with two compiled shapes.

Shape letters: B batch rows, T samples or frames, C audio channels, Q codebooks.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models.mimi import CodecState, Mimi
from dsm_jax.options import whole_number
from dsm_jax.runtime.compile import compiled, plain

CHUNK_FRAMES = 16


def encode_step(mimi: Mimi, pcm_BTC: jax.Array, state: CodecState, codebooks: int) -> tuple[jax.Array, CodecState]:
    """Encode a chunk of whole frames, as `Mimi.encode_step`: a function to compile."""
    return mimi.encode_step(pcm_BTC, state, codebooks=codebooks)


def decode_step(mimi: Mimi, codes_BQT: jax.Array, state: CodecState) -> tuple[jax.Array, CodecState]:
    """Decode a chunk of frames, as `Mimi.decode_step`: a function to compile."""
    return mimi.decode_step(codes_BQT, state)


def encode(model: Model, source: audio.Source, *, codebooks: int | None = None) -> np.ndarray:
    """Turn a recording into codes.

    Args:
      model: any model; its codec is used.
      source: a path, "-", an open file, or samples at the codec's rate.
      codebooks: how many, from 1; None means all of the codec's.

    Returns:
      int32 codes [codebooks, frames]; the end is padded with zeros to a whole frame.

    Raises:
      AudioError: the recording cannot be read.
      ConfigError: the codec has fewer codebooks.
    """
    config = model.config.mimi
    codebooks = config.quantizer.n_q if codebooks is None else whole_number("codebooks", codebooks)
    if not 1 <= codebooks <= config.quantizer.n_q:
        raise ConfigError(f"{codebooks} codebooks were asked for; {model.name} has 1 to {config.quantizer.n_q}")
    step, params = compiled(encode_step, (model.mimi_def,), codebooks, donate=(1,)), plain(model.mimi_params)
    state = model.codec.encoder.init_state(1)
    held, columns = np.zeros(0, np.float32), []
    chunk = CHUNK_FRAMES * config.frame_size

    def take(samples: np.ndarray) -> None:
        nonlocal state
        codes_BQT, state = step(params, jnp.asarray(samples[None, :, None]), state)
        columns.append(codes_BQT[0])

    for block in audio.blocks(source, config.sample_rate):
        held = np.concatenate([held, block])
        while held.size >= chunk:
            take(held[:chunk])
            held = held[chunk:]
    held = np.pad(held, (0, -held.size % config.frame_size))
    for frame in held.reshape(-1, config.frame_size):
        take(frame)
    return np.concatenate([np.asarray(c) for c in columns], axis=1)


def decode(model: Model, codes_QT: np.ndarray) -> np.ndarray:
    """Turn codes into samples.

    Args:
      model: any model; its codec is used.
      codes_QT: integer codes of the first Q codebooks.

    Returns:
      float32 mono samples at the codec's rate, not clipped.

    Raises:
      ConfigError: codes of another shape or range than the codec's, or a model loaded without its decoder.
    """
    config, codes_QT = model.config.mimi, np.asarray(codes_QT)
    books, bins = config.quantizer.n_q, config.quantizer.bins
    if codes_QT.ndim != 2 or not 1 <= codes_QT.shape[0] <= books or not np.issubdtype(codes_QT.dtype, np.integer):
        raise ConfigError(
            f"codes are {codes_QT.dtype} {list(codes_QT.shape)}; expected integers [1 to {books} codebooks, frames]"
        )
    if codes_QT.size and (codes_QT.min() < 0 or codes_QT.max() >= bins):
        raise ConfigError(f"codes go from {codes_QT.min()} to {codes_QT.max()}; {model.name} has 0 to {bins - 1}")
    step, params = compiled(decode_step, (model.mimi_def,), donate=(1,)), plain(model.mimi_params)
    state = model.codec.require_decoder(model.name).init_state(1)
    pieces, whole = [np.zeros(0, np.float32)], codes_QT.shape[1] // CHUNK_FRAMES * CHUNK_FRAMES
    starts = [(t, CHUNK_FRAMES) for t in range(0, whole, CHUNK_FRAMES)]
    starts += [(t, 1) for t in range(whole, codes_QT.shape[1])]
    for start, frames in starts:
        codes_BQT = jnp.asarray(codes_QT[None, :, start : start + frames].astype(np.int32))
        pcm_BTC, state = step(params, codes_BQT, state)
        pieces.append(np.asarray(pcm_BTC[0, :, 0]))
    return np.concatenate(pieces)


def read_codes(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the codes [Q, T] of a file that `dsm-jax codec encode` wrote.

    Raises:
      CheckpointError: no such file, or no codes in it.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is not a file; give a safetensors file with codes")
    try:
        with safe_open(path, framework="numpy") as file:
            if "codes" not in file.keys():  # noqa: SIM118  not a dict
                raise CheckpointError(f"{path} holds {sorted(file.keys())}; expected a tensor called 'codes'")
            return file.get_tensor("codes")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); write one with `codec encode`") from None
