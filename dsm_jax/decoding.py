"""Decode the sound of any file or pipe that FFmpeg reads, through PyAV, in pieces.

Dimension key: C channels, T samples.
"""

import io
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
import numpy as np

from dsm_jax import headers
from dsm_jax.errors import AudioError, plural

_log = logging.getLogger("dsm_jax")

_GUESSED = {"aac", "ac3", "amr", "eac3", "loas", "mpeg", "mpegts"}  # formats without a header that says their length
_PIPE_OPTIONS = {"probesize": "4096", "analyzeduration": "1"}  # a pipe is heard as it arrives, not 5 s later
_PIPE_BUFFER = 4096  # bytes
_KEPT_START = 1 << 20  # bytes of a pipe that are kept to look for a header; there may be a picture before it
_MP4, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"  # names of formats that write when a sound is heard
_GAP_S = 0.1  # a shorter gap is rounding, or an uneven clock
_LATE_S = 0.3  # a sound that starts sooner may follow the encoder's padding, which is left out
_LONGEST_GAP_S = 3600.0
_TOLERANCE_S = 0.06  # containers round their duration to milliseconds, and count the encoder's padding or do not


def decode(file: BinaryIO, name: str, *, strict: bool = False) -> Iterator[tuple[int, np.ndarray]]:
    """Decode the first audio stream of a file to its end.

    Chained and joined files are decoded through all of their parts. Where the sound of an MP4, WebM or Matroska file
    starts late or has a gap, silence stands there. Where the sound ends before the header says, or where packets cannot
    be decoded, the log gets a warning that says how much is missing; so it does for audio streams that are left out.

    Args:
      file: opened at its start; it need not be seekable.
      name: name of the file, for messages.
      strict: raise an error in place of the warning.

    Yields:
      The sample rate in Hz and float32 samples [C, T]; both the rate and C may change where a joined file does.

    Raises:
      AudioError: the file holds no audio, or its container cannot be read to its end; with `strict`, sound is missing.
    """
    with ExitStack() as stack:
        shown, container = _open(file, name, stack)
        stack.enter_context(container)
        if not container.streams.audio:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise AudioError(f"{name} holds no audio ({kinds} alone); expected a recording. Check the file.")
        stream = container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise AudioError(
                f"{name} has a header that says neither codec nor sample rate; expected a recording. Fetch it again."
            )
        stream.codec_context.options = {"err_detect": "crccheck+explode"}  # else a damaged flac is silent about it
        tracks = container.streams.audio
        if len(tracks) > 1:
            others = [at for at, other in enumerate(tracks) if other is not stream]
            _log.warning(
                "%s holds %d audio streams and number %d is used; for another one: ffmpeg -i INPUT -map 0:a:%d OUT.wav",
                *(name, len(tracks), tracks.index(stream), others[0]),
            )
        origin = _origin(container, stream)
        missing = _Missing(shown, container, stream, origin)
        seconds, clock = 0.0, origin
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode()
            except av.error.InvalidDataError:
                missing.damaged(seconds)
                continue
            except av.error.FFmpegError as error:
                raise broken(name, seconds, str(error.strerror)) from error
            for frame in frames:
                rate, pcm_CT = frame.sample_rate, _floats(frame)
                if clock is not None:
                    start = clock if frame.time is None else frame.time
                    shortest = _GAP_S if seconds else _LATE_S
                    for silence_CT in _silence(start - clock, shortest, rate, len(pcm_CT)):
                        seconds += silence_CT.shape[1] / rate
                        yield rate, silence_CT
                    clock = start + frame.samples / rate
                seconds += frame.samples / rate
                yield rate, pcm_CT
        if not seconds and missing.damages:
            raise AudioError(
                f"{name} has {missing.damages} packets and none can be decoded; expected a recording. "
                f"If a player plays it, convert it: {_repair(name)}"
            )
        # Gaps too short to be filled are not missing.
        reason = missing.reason(seconds if clock is None else max(seconds, clock - (origin or 0.0)))
        if reason and strict:
            raise AudioError(f"{name} {reason}; fetch it again, or repair it: {_repair(name)}")
        if reason:
            _log.warning("%s %s; the rest is used", name, reason)


def duration(path: str | os.PathLike[str]) -> float | None:
    """Read a file's length in seconds from its header: a guess where the header does not say, None for other files."""
    try:
        with av.open(os.fspath(path)) as container:
            return None if container.duration is None else container.duration / av.time_base
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        return None


def broken(name: str, seconds: float, why: str) -> AudioError:
    """Return the error for a recording that cannot be decoded to its end."""
    return AudioError(
        f"{name} decodes up to {seconds:.1f} s and then fails ({why.rstrip('.')}); expected audio to its end. "
        f"Fetch it again if it is cut short, or repair it: {_repair(name)}"
    )


@contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Open a path, "-" for standard input, or an open file, at its start where it can seek."""
    with ExitStack() as stack:
        if source == "-":
            if sys.stdin is None:
                raise AudioError("standard input is closed; expected audio. Give a file, or send audio through a pipe.")
            file = sys.stdin.buffer
        elif isinstance(source, str | os.PathLike):
            try:
                file = stack.enter_context(open(source, "rb"))
            except FileNotFoundError as error:
                raise AudioError(f"{name} does not exist; expected an audio file. Check the path.") from error
            except IsADirectoryError as error:
                raise AudioError(f"{name} is a folder; expected an audio file. Name the files in it.") from error
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise AudioError(f"{name} cannot be opened ({reason}). Check its name and permissions.") from error
        else:
            file = source
        if file.seekable():
            file.seek(0)
        yield file


class _Bytes(io.RawIOBase):
    """Show FFmpeg a part of a file, or a pipe with the bytes that have been read from it already.

    Args:
      file: positioned after `head`.
      head: bytes that come first, for a pipe.
      size: bytes that a seekable file is taken to have; None for a pipe.
    """

    def __init__(self, file: BinaryIO, *, head: bytes = b"", size: int | None = None):
        self._file, self._head, self._size = file, head, size
        self._heard, self._kept_start, self._kept_end = 0, bytearray(), b""

    def read(self, size: int = -1) -> bytes:
        if self._size is not None:
            return self._file.read(max(0, min(size, self._size - self._file.tell())))
        if self._head:
            read, self._head = self._head[:size], self._head[size:]
        else:
            # A buffered pipe would wait until it has all bytes that were asked for.
            read_some: Any = getattr(self._file, "read1", self._file.read)
            read = read_some(size)
        self._heard += len(read)
        self._kept_start += read[: _KEPT_START - len(self._kept_start)]
        self._kept_end = (self._kept_end + read)[-headers.OGG_PAGE :]
        return read

    def start(self) -> BinaryIO:
        """Return the file, or what is kept of a pipe's start, which holds its header."""
        return io.BytesIO(self._kept_start) if self._size is None else self._file

    def end(self) -> tuple[int, bytes]:
        """Return how many bytes there are, and the last of them; for a pipe that has been read, what came out of it."""
        if self._size is None:
            return self._heard, self._kept_end
        self._file.seek(max(0, self._size - headers.OGG_PAGE))
        return self._size, self._file.read(headers.OGG_PAGE)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._size is None:
            raise io.UnsupportedOperation("a pipe cannot seek")
        if whence == os.SEEK_END:
            offset, whence = self._size + offset, os.SEEK_SET
        return self._file.seek(offset, whence)

    def close(self) -> None:
        """Leave the file open: whoever opened it closes it."""


def _open(file: BinaryIO, name: str, stack: ExitStack) -> tuple[_Bytes, Any]:
    """Open a file's container, and return its bytes too.

    Raises:
      AudioError: the file is empty, or FFmpeg does not know its format.
    """
    head = file.read(12)
    if not head:
        raise AudioError(f"{name} is empty (0 bytes); expected audio. Record or fetch it again.")
    if not file.seekable() and head[4:8] == b"ftyp":
        # An MP4 may have its index at its end.
        spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  the stack closes it
        spool.write(head)
        shutil.copyfileobj(file, spool)
        file = spool
    try:
        if file.seekable():
            shown = _Bytes(file, size=headers.size_without_tag(file))
            options = {"ignore_length": "1"} if headers.outgrew_its_header(file) else {}
            file.seek(0)
            return shown, av.open(shown, options=options)
        shown = _Bytes(file, head=head)
        return shown, av.open(shown, options=_PIPE_OPTIONS, buffer_size=_PIPE_BUFFER)
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        if head[4:8] == b"ftyp":
            found = "an MP4 without its index, as a recorder that was interrupted leaves it"
        else:
            found = f"not audio that can be decoded: its first bytes are {head!r}"
        raise AudioError(
            f"{name} is {found}; expected a recording (wav, flac, mp3, ogg, m4a, mp4, webm, wma and others). "
            f"If a player opens it, convert it: {_repair(name)}"
        ) from error


def _floats(frame: av.AudioFrame) -> np.ndarray:
    """Return a frame's samples as float32 [C, T] in [-1, 1]."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.float32) / np.float32(2.0 ** (8 * array.dtype.itemsize - 1))
    return array.astype(np.float32)


def _origin(container: Any, stream: Any) -> float | None:
    """Return the time at which the recording starts by its container's clock; None for one without timestamps."""
    kind = container.format.name
    if kind not in (_MP4, _MATROSKA):
        return None
    start = (container.start_time or 0) / av.time_base
    # A fragment of a longer recording has the clock of the whole, and no index or length that counts from 0.
    whole = stream.frames > 0 if kind == _MP4 else (container.duration or 0) / av.time_base > start
    return 0.0 if whole else start


def _silence(seconds: float, shortest: float, rate: int, channels: int) -> Iterator[np.ndarray]:
    """Yield a gap's silence [C, T] in pieces; none for a shorter one, or one so long that a timestamp is damaged."""
    left = round(seconds * rate) if shortest < seconds < _LONGEST_GAP_S else 0
    while left > 0:
        yield np.zeros((channels, min(left, rate)), np.float32)
        left -= rate


class _Missing:
    """Count the sound that a file should have and has not.

    Args:
      shown: the bytes of the file or pipe.
      container: opened from them.
      stream: the audio stream.
      origin: from `_origin`.
    """

    def __init__(self, shown: _Bytes, container: Any, stream: Any, origin: float | None):
        self.damages, self._damaged_at = 0, 0.0
        self._shown, self._kind, self._rate = shown, container.format.name, stream.codec_context.sample_rate
        length = stream.duration and float(stream.duration * stream.time_base)
        if length and origin is not None:
            length += float((stream.start_time or 0) * stream.time_base) - origin
        self._length: float | None = length or (container.duration and container.duration / av.time_base)

    def damaged(self, seconds: float) -> None:
        """Count a packet that cannot be decoded."""
        self._damaged_at = seconds if not self.damages else self._damaged_at
        self.damages += 1

    def reason(self, seconds: float) -> str | None:
        """Describe the missing part of a file that gave so many seconds; return None if nothing is missing."""
        expected, open_end = self._end()
        if expected is not None and seconds < expected - _TOLERANCE_S:
            missing = expected - seconds
            # FFmpeg leaves out damaged parts of a flac without an error.
            where = (
                f"it is damaged from {self._damaged_at:.1f} s on" if self.damages else "it was cut short or is damaged"
            )
            return f"lacks {missing:.1f} s of its {expected:.1f} s: {where}"
        if self.damages:
            lost = f"{plural(self.damages, 'packet')} {'was' if self.damages == 1 else 'were'} left out"
            return f"is damaged from {self._damaged_at:.1f} s on: {lost}"
        return f"lacks its end, after {seconds:.1f} s: it was cut short" if open_end else None

    def _end(self) -> tuple[float | None, bool]:
        """Return the length that the header says, None where it does not, and whether the end of the file is missing.

        A pipe has to be read to its end before.
        """
        size, tail = self._shown.end()
        if self._kind in ("wav", "w64", "caf"):
            return headers.header_end(self._shown.start(), size)
        if self._kind == "ogg":
            return None, not headers.has_last_page(tail)
        if self._kind == "mp3":
            return headers.mp3_seconds(self._shown.start(), self._rate), False
        return (None if self._kind in _GUESSED else self._length), False


def _repair(name: str) -> str:
    """Return the command that converts a file."""
    path = Path(name)
    if not path.is_file():
        return "ffmpeg -i INPUT OUTPUT.wav"
    return f"ffmpeg -i {shlex.quote(name)} {shlex.quote(str(path.with_name(path.stem + '-converted.wav')))}"
