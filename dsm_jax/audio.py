"""Read any audio as mono blocks at one rate, in constant memory however long it is, and write it back.

Dimension key: C channels, T samples.
"""

import dataclasses
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeGuard

import numpy as np
import soundfile
import soxr
from numpy.typing import ArrayLike

from dsm_jax import files
from dsm_jax.errors import AudioError


class SupportsArray(Protocol):
    """An array of numpy, JAX or another library."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)  # arrays cannot be compared as one
class Recorded:
    """Samples with a rate of their own.

    Attributes:
      pcm: float in [-1, 1] or int16, [T] or [C, T].
      sample_rate: Hz.
    """

    pcm: Any
    sample_rate: int


File = str | os.PathLike[str] | BinaryIO
# A mapping is a recording of the library `datasets`, with its `array` and its `sampling_rate`.
Source = File | SupportsArray | Recorded | Mapping[str, Any]

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
MAX_CHANNELS = 8  # of an array: beyond that, [samples, channels] was meant

_CANCELLED = 0.01  # power of the average over that of the channels, below which these cancel each other out
_CHUNK = 16_384  # samples per channel that are encoded at once
_WRITABLE = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
SUFFIXES = tuple(_WRITABLE)


def blocks(
    source: Source, sample_rate: int = 24_000, block_seconds: float = 10.0, *, strict: bool = False
) -> Iterator[np.ndarray]:
    """Stream a recording as mono blocks: channels are averaged, then resampled (soxr, HQ).

    The concatenation is the same, bit for bit, whatever `block_seconds` is. It has exactly the samples that the
    resampler has returned once flushed: the recording's `n * sample_rate / its own rate`, rounded to the nearest; at
    the recording's own rate the samples pass through untouched. Memory does not grow with the recording's length.
    Channels that cancel each other out are not averaged: the loudest is taken. A file that was cut short, or that is
    damaged in places, gives the sound that is there, and a warning in the log that says how much is missing.

    Args:
      source: a path to whatever FFmpeg decodes: wav, flac, mp3, ogg, opus, m4a, mp4, webm, aac, wma and others; "-" for
        standard input; a binary file, read from its start; an array at `sample_rate`, float in [-1, 1] or int16, of
        shape [T] or [C, T]; `Recorded`, an array with another rate; or {"array": ..., "sampling_rate": ...}, as data
        sets on the Hugging Face hub hold recordings. A pipe is decoded as it arrives.
      sample_rate: sample rate of the blocks, Hz.
      block_seconds: length of every block but the last, which may be shorter.
      strict: refuse a file that was cut short or is damaged, in place of the warning.

    Returns:
      An iterator of float32 arrays of shape [T], none of them empty.

    Raises:
      AudioError: the audio cannot be read, is empty, or holds NaN or infinity. An array and the rate are checked at
        once, a file as the iterator reaches the fault.
      ValueError: `block_seconds` is not a positive number.
    """
    _check_rate(sample_rate, "sample_rate")
    if not 0 < block_seconds < math.inf:
        raise ValueError(f"block_seconds is {block_seconds}; expected a positive number of seconds.")
    if isinstance(source, Mapping):
        source = _recorded(source)
    name = _name(source)
    if _is_file(source):
        pieces = _decoded(source, sample_rate, name, strict)
    else:
        taken = source if isinstance(source, Recorded) else Recorded(source, sample_rate)
        rate = taken.sample_rate
        _check_rate(rate, f"the sample rate of {name}")
        pieces = resampled(_mono([_channels(taken.pcm, name, rate)], rate), rate, sample_rate)
    return _cut(pieces, max(1, round(block_seconds * sample_rate)), name)


def read(source: Source, sample_rate: int = 24_000, *, strict: bool = False) -> np.ndarray:
    """Read a whole recording: the concatenation of `blocks`, with the same arguments, errors and promises.

    Returns:
      float32 array of shape [T]; a copy, also when `source` is an array.
    """
    return np.concatenate(list(blocks(source, sample_rate, strict=strict)))


def write(path: str | os.PathLike[str], pcm: ArrayLike, sample_rate: int) -> None:
    """Write samples as 16-bit wav or flac, Ogg Vorbis, Opus or mp3; the path's suffix decides.

    Args:
      path: ends in one of `SUFFIXES`. A file already there is replaced once the new one is whole.
      pcm: float (clipped to [-1, 1]) or int16, of shape [T] or [C, T].
      sample_rate: of `pcm`, Hz.

    Raises:
      AudioError: the suffix is another one, the folder does not exist, the place cannot be written, the format or the
        library does not have the rate, or `pcm` is empty, not finite, or of another dtype or shape. What was at `path`
        before is then still there.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITABLE:
        raise AudioError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}. Rename the output.")
    files.check_folder_of(path, AudioError)
    _check_rate(sample_rate, "sample_rate")
    pcm_TC = np.clip(_channels(pcm, f"the audio for {path}", sample_rate), -1.0, 1.0).T
    kind, subtype = _WRITABLE[path.suffix.lower()]
    try:
        with (
            files.replacing(path) as file,
            soundfile.SoundFile(file, "w", sample_rate, pcm_TC.shape[1], format=kind, subtype=subtype) as sound,
        ):
            # In pieces: libsndfile 1.2.2 overflows its stack, and crashes, on minutes of Vorbis in one call.
            for start in range(0, len(pcm_TC), _CHUNK):
                sound.write(pcm_TC[start : start + _CHUNK])
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path} cannot be written as {subtype} at {sample_rate} Hz ({error.error_string.rstrip('.')}). "
            "Check that the format allows this rate."
        ) from error
    except OSError as error:
        raise AudioError(f"{path} cannot be written ({error.strerror}). Choose another place.") from error


def duration(source: Source) -> float | None:
    """Read a recording's length from its header, for a progress bar.

    Args:
      source: as for `blocks`.

    Returns:
      Seconds, estimated for an mp3 without a length in its header. None for a source that is not a path, and for a
      header without a length or that cannot be read; `blocks` raises the error for the latter.
    """
    if not isinstance(source, str | os.PathLike) or not Path(source).is_file():
        return None
    from dsm_jax import decoding  # late: FFmpeg's libraries take 17 MB, and samples in memory need no decoder

    return decoding.duration(source)


def path_of(source: object) -> str | None:
    """Return the path of a recording that is named by one; None for an open file and for samples."""
    return str(source) if isinstance(source, str | os.PathLike) else None


def is_source(value: object) -> TypeGuard[Source]:
    """Tell whether a value is one recording, and not several."""
    # Bytes are none, but nor are they several: the error says so once.
    return _is_file(value) or isinstance(value, Recorded | Mapping | bytes) or hasattr(value, "__array__")


def _is_file(source: object) -> TypeGuard[File]:
    return isinstance(source, str | os.PathLike) or hasattr(source, "read")


def _recorded(source: Mapping[str, Any]) -> Recorded:
    try:
        return Recorded(source["array"], source["sampling_rate"])
    except KeyError:
        raise AudioError(
            f"audio was given as a mapping of {sorted(map(str, source))}; expected array and sampling_rate. Add them."
        ) from None


def _name(source: object) -> str:
    """Return the source's name for error messages."""
    if isinstance(source, str | os.PathLike):
        return "standard input" if source == "-" else os.fspath(source)
    if isinstance(source, Recorded) or hasattr(source, "__array__"):
        return "the array"
    if hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = getattr(source, "name", None)
        name = name if isinstance(name, str) else "the file object"
        if getattr(source, "closed", False):
            raise AudioError(f"{name} is closed; expected an open file. Read it before it is closed, or give its path.")
        return name
    raise AudioError(
        f"audio was given as {type(source).__name__}; "
        "expected a path, '-', a file opened in binary mode, an array, or Recorded samples. Pass one of these."
    )


def _check_rate(rate: Any, name: str) -> None:
    if not isinstance(rate, int | float | np.number) or not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(
            f"{name} is {rate} Hz; expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz. Check the header, or the argument."
        )


def _check_finite(pcm_CT: np.ndarray, name: str, rate: int, first: int = 0) -> None:
    """Refuse NaN and infinity: the resampler and the codec would spread one of them over all that follows."""
    bad_T = ~np.isfinite(pcm_CT).all(axis=0)
    if bad_T.any():
        seconds = (first + int(bad_T.argmax())) / rate
        raise AudioError(
            f"{name} holds NaN or infinity at {seconds:.3f} s; expected finite samples. "
            "Replace them, or export the audio again."
        )


def _channels(pcm: object, name: str, rate: int) -> np.ndarray:
    """Check an array of samples and return it as float32 [C, T]."""
    array = np.asarray(pcm)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == np.int16):
        raise AudioError(f"{name} has dtype {array.dtype}; expected float in [-1, 1], or int16. Convert it first.")
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > MAX_CHANNELS):
        raise AudioError(
            f"{name} has shape {array.shape}; expected [samples], or [channels, samples] with at most {MAX_CHANNELS} "
            "channels. Transpose it, or pass one recording at a time."
        )
    if not array.size:
        raise AudioError(f"{name} is empty (shape {array.shape}); expected at least one sample. Leave it out.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, and is refused below
        pcm_CT = np.atleast_2d(array).astype(np.float32)
    if array.dtype == np.int16:
        pcm_CT /= 32768.0
    _check_finite(pcm_CT, name, rate)
    return pcm_CT


def _decoded(source: File, sample_rate: int, name: str, strict: bool) -> Iterator[np.ndarray]:
    """Yield mono pieces of a file at `sample_rate`, of whatever lengths decoder and resampler give."""
    from dsm_jax import decoding  # late, as in `duration`

    with decoding.opened(source, name) as file:
        pieces = _finite(decoding.decode(file, name, strict=strict), name)
        # A joined file may change its rate or its channels.
        for (rate, _), part in itertools.groupby(pieces, key=lambda piece: (piece[0], len(piece[1]))):
            _check_rate(rate, f"the sample rate of {name}")
            yield from resampled(_mono((pcm_CT for _, pcm_CT in part), rate), rate, sample_rate)


def _finite(pieces: Iterable[tuple[int, np.ndarray]], name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Pass pieces on while their samples are finite."""
    done = 0
    for rate, pcm_CT in pieces:
        _check_finite(pcm_CT, name, rate, first=done)
        done += pcm_CT.shape[1]
        yield rate, pcm_CT


def resampled(pieces: Iterable[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    """Resample mono pieces; at the rate that is asked for they pass through untouched."""
    if rate == sample_rate:
        yield from pieces
        return
    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
    for pcm_T in pieces:
        yield resampler.resample_chunk(pcm_T)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _mono(pieces: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Average the channels [C, T] of pieces; where they cancel each other out, take the loudest one alone.

    The choice is made for every quarter of a second of the recording, so it does not depend on the pieces' lengths.
    """
    hop = rate // 4
    held_CT: np.ndarray | None = None
    for pcm_CT in pieces:
        if len(pcm_CT) == 1:
            yield pcm_CT[0]
            continue
        held_CT = pcm_CT if held_CT is None else np.concatenate([held_CT, pcm_CT], axis=1)
        while held_CT.shape[1] >= hop:
            yield _mixed(held_CT[:, :hop])
            held_CT = held_CT[:, hop:]
    if held_CT is not None and held_CT.shape[1]:
        yield _mixed(held_CT)


def _mixed(pcm_CT: np.ndarray) -> np.ndarray:
    """Return the average of the channels, or the loudest channel where the average is far quieter than the channels."""
    mean_T, power_C = pcm_CT.mean(axis=0), np.square(pcm_CT).mean(axis=1)
    if np.square(mean_T).mean() >= _CANCELLED * power_C.mean():
        return mean_T
    # The first of channels that are about as loud, so that the choice stays the same from one hop to the next.
    return pcm_CT[np.argmax(power_C > power_C.max() / 2)]


def _cut(pieces: Iterable[np.ndarray], size: int, name: str) -> Iterator[np.ndarray]:
    """Join pieces of any length into blocks of `size` samples and a last, shorter one."""
    held, length, empty = [], 0, True
    for piece_T in pieces:
        held.append(piece_T)
        length += len(piece_T)
        if length >= size:
            whole_T = np.concatenate(held)
            cut = length - length % size
            yield from whole_T[:cut].reshape(-1, size)
            held, length, empty = [whole_T[cut:]], length - cut, False
    if length:
        yield np.concatenate(held)
    elif empty:
        raise AudioError(f"{name} holds no samples; expected at least one. Check how it was recorded, or leave it out.")
