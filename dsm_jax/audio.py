"""Reads any audio as mono blocks at one rate, in constant memory however long it is, and writes it back.

Dimension key: C channels, T samples.
"""

import io
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np
import soundfile
import soxr
from numpy.typing import ArrayLike

from dsm_jax.errors import AudioError

File = str | os.PathLike[str] | BinaryIO
Source = File | ArrayLike

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
MAX_CHANNELS = 8  # of an array: beyond that, [samples, channels] was meant

_CHUNK = 16_384  # samples per channel that are decoded, or encoded, at once
_WRITABLE = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}
_UNDECODABLE = (  # offset, magic bytes, name: containers that users have and libsndfile cannot decode
    (4, b"ftyp", "MP4 (m4a, mov)"),
    (0, b"\x1aE\xdf\xa3", "WebM or Matroska"),
    (0, b"0&\xb2u", "WMA"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"#!AMR", "AMR"),
)


def blocks(source: Source, sample_rate: int = 24_000, block_seconds: float = 10.0) -> Iterator[np.ndarray]:
    """Streams a recording as mono blocks: channels are averaged, then resampled (soxr, HQ).

    The concatenation is the same, bit for bit, whatever `block_seconds` is. It has exactly the samples that the
    resampler has returned once flushed: the recording's `n * sample_rate / its own rate`, rounded to the nearest; at
    the recording's own rate the samples pass through untouched. Memory does not grow with the recording's length.
    A wav, mp3 or ogg cut short gives the part that is there; a flac cut short is an error.

    Args:
      source: a path to wav, flac, mp3, ogg (Vorbis, Opus) or whatever else libsndfile decodes; "-" for standard input;
        a binary file, read from its start; or an array at `sample_rate`, float in [-1, 1] or int16, of shape [T] or
        [C, T]. What cannot seek is first copied to a temporary file.
      sample_rate: of the blocks, Hz.
      block_seconds: length of every block but the last, which may be shorter.

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
    name = _name(source)
    if _is_file(source):
        pieces = _decode(source, sample_rate, name)
    else:
        pieces = iter([_channels(source, name, sample_rate).mean(axis=0)])
    return _cut(pieces, max(1, round(block_seconds * sample_rate)), name)


def read(source: Source, sample_rate: int = 24_000) -> np.ndarray:
    """Reads a whole recording: the concatenation of `blocks`, with the same arguments, errors and promises.

    Returns:
      float32 array of shape [T]; a copy, also when `source` is an array.
    """
    return np.concatenate(list(blocks(source, sample_rate)))


def write(path: str | os.PathLike[str], pcm: ArrayLike, sample_rate: int) -> None:
    """Writes samples as 16-bit wav or flac, or as Ogg Vorbis; the path's suffix decides.

    Args:
      path: ends in .wav, .flac or .ogg. A file already there is replaced.
      pcm: float (clipped to [-1, 1]) or int16, of shape [T] or [C, T].
      sample_rate: of `pcm`, Hz.

    Raises:
      AudioError: the suffix is another one, the folder does not exist, or `pcm` is empty, not finite, or of another
        dtype or shape.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITABLE:
        raise AudioError(f"{path} ends in {path.suffix!r}; expected .wav, .flac or .ogg. Rename the output.")
    if not path.parent.is_dir():
        raise AudioError(f"{path} cannot be written: there is no folder {path.parent}. Create it first.")
    _check_rate(sample_rate, "sample_rate")
    pcm_TC = np.clip(_channels(pcm, f"the audio for {path}", sample_rate), -1.0, 1.0).T
    kind, subtype = _WRITABLE[path.suffix.lower()]
    try:
        with soundfile.SoundFile(path, "w", sample_rate, pcm_TC.shape[1], format=kind, subtype=subtype) as sound:
            # In pieces: libsndfile 1.2.2 overflows its stack, and crashes, on minutes of Vorbis in one call.
            for start in range(0, len(pcm_TC), _CHUNK):
                sound.write(pcm_TC[start : start + _CHUNK])
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path} cannot be written as {subtype} at {sample_rate} Hz ({error.error_string.rstrip('.')}). "
            "Check that the place is writable and that the format allows this rate."
        ) from error


def duration(source: Source) -> float | None:
    """Reads a recording's length from its header, for a progress bar.

    Args:
      source: as for `blocks`.

    Returns:
      Seconds (a guess for an mp3 whose header does not say); None for anything but a path, or where the header does
      not say or cannot be read: `blocks` then says why.
    """
    if not isinstance(source, str | os.PathLike) or not Path(source).is_file():
        return None
    try:
        info = soundfile.info(source)
    except (soundfile.LibsndfileError, TypeError):
        return None
    return info.duration if info.frames < 2**63 - 1 else None  # libsndfile's mark for an unknown length


def _is_file(source: Source) -> TypeGuard[File]:
    return isinstance(source, str | os.PathLike) or hasattr(source, "read")


def _name(source: Source) -> str:
    """What error messages call the source."""
    if isinstance(source, str | os.PathLike):
        return "standard input" if source == "-" else os.fspath(source)
    if hasattr(source, "__array__"):
        return "the array"
    if hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = getattr(source, "name", None)
        return name if isinstance(name, str) else "the file object"
    raise AudioError(
        f"audio was given as {type(source).__name__}; "
        "expected a path, '-', a file opened in binary mode, or an array. Pass one of these."
    )


def _check_rate(rate: int, name: str) -> None:
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(
            f"{name} is {rate} Hz; expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz. Check the header, or the argument."
        )


def _check_finite(pcm_CT: np.ndarray, name: str, rate: int, first: int = 0) -> None:
    """Refuses NaN and infinity: the resampler and the codec would spread one of them over all that follows."""
    bad_T = ~np.isfinite(pcm_CT).all(axis=0)
    if bad_T.any():
        seconds = (first + int(bad_T.argmax())) / rate
        raise AudioError(
            f"{name} holds NaN or infinity at {seconds:.3f} s; expected finite samples. "
            "Replace them, or export the audio again."
        )


def _channels(pcm: object, name: str, rate: int) -> np.ndarray:
    """Checks an array of samples and returns it as float32 [C, T]."""
    array = np.asarray(pcm)
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


def _decode(source: File, sample_rate: int, name: str) -> Iterator[np.ndarray]:
    """Yields mono pieces at `sample_rate`, of whatever lengths decoder and resampler give."""
    with _seekable(source, name) as file, _open(file, name) as sound:
        _check_rate(sound.samplerate, f"the sample rate of {name}")
        if sound.samplerate == sample_rate:
            yield from _mono(sound, file, name)
            return
        resampler = soxr.ResampleStream(sound.samplerate, sample_rate, 1, dtype="float32", quality="HQ")
        for pcm_T in _mono(sound, file, name):
            yield resampler.resample_chunk(pcm_T)
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


class _Forward(soundfile.SoundFile):
    """A file that is only read onwards: soundfile seeks after each read, at which an mp3 loses its bit reservoir."""

    def seekable(self) -> bool:
        return False


def _mono(sound: soundfile.SoundFile, file: BinaryIO, name: str) -> Iterator[np.ndarray]:
    done = 0
    while True:
        try:
            pcm_TC = sound.read(_CHUNK, "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise _broken(name, done / sound.samplerate, str(error.error_string)) from error
        if not len(pcm_TC):
            break
        _check_finite(pcm_TC.T, name, sound.samplerate, first=done)
        done += len(pcm_TC)
        yield pcm_TC.mean(axis=1)
    # libsndfile guesses the length of an mp3 without a header for it, and stops there. Tags at the end are smaller.
    position = file.tell()
    if sound.format == "MP3" and (left := file.seek(0, os.SEEK_END) - position) > 16_384:
        raise _broken(name, done / sound.samplerate, f"{left} bytes are left over")


def _broken(name: str, seconds: float, why: str) -> AudioError:
    return AudioError(
        f"{name} decodes up to {seconds:.1f} s and then fails ({why.removeprefix('Error : ').rstrip('.')}); expected "
        f"audio to its end. Fetch it again if it is cut short, or repair it: {_ffmpeg(name)}"
    )


def _cut(pieces: Iterable[np.ndarray], size: int, name: str) -> Iterator[np.ndarray]:
    """Joins pieces of any length into blocks of `size` samples and a last, shorter one."""
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


@contextmanager
def _seekable(source: File, name: str) -> Iterator[BinaryIO]:
    """Opens a source as a binary file at its start; a pipe goes through a temporary file, as decoders must seek."""
    with ExitStack() as stack:
        if source == "-":
            file = sys.stdin.buffer
        elif isinstance(source, str | os.PathLike):
            try:
                file = stack.enter_context(open(source, "rb"))
            except FileNotFoundError as error:
                raise AudioError(f"{name} does not exist; expected an audio file. Check the path.") from error
            except IsADirectoryError as error:
                raise AudioError(f"{name} is a folder; expected an audio file. Name the files in it.") from error
            except OSError as error:
                raise AudioError(f"{name} cannot be opened ({error.strerror}). Check its permissions.") from error
        else:
            file = source
        if not file.seekable():
            spool = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, spool)
            file = spool
        file.seek(0)
        yield file


def _open(file: BinaryIO, name: str) -> soundfile.SoundFile:
    head = file.read(12)
    file.seek(0)
    if not head:
        raise AudioError(f"{name} is empty (0 bytes); expected audio. Record or fetch it again.")
    try:
        return _Forward(file)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a name ending in .raw, which has no header
        kinds = (kind for offset, magic, kind in _UNDECODABLE if head[offset:].startswith(magic))
        found = next(kinds, f"not audio that can be decoded: its first bytes are {head!r}")
        raise AudioError(
            f"{name} is {found}; expected wav, flac, mp3 or ogg. If a player opens it, convert it: {_ffmpeg(name)}"
        ) from error


def _ffmpeg(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        return "ffmpeg -i INPUT OUTPUT.wav"
    return f"ffmpeg -i {shlex.quote(name)} {shlex.quote(str(path.with_name(path.stem + '-converted.wav')))}"
