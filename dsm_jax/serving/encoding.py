"""Encode speech as it is made: raw samples, wav, and the formats that libsndfile writes.

Shape letters: T samples.
"""

import threading
from typing import Any

import numpy as np
import soundfile

PCM16_MAX = 32767
# libsndfile's format, subtype, compression level and bit rate mode. At a constant bit rate players can tell the length
# and seek, for which the header of a stream has no fields.
_FORMATS: dict[str, tuple[str, str, float | None, str | None]] = {
    "mp3": ("MP3", "MPEG_LAYER_III", 0.5, "CONSTANT"),
    "flac": ("FLAC", "PCM_16", None, None),
    "opus": ("OGG", "OPUS", None, None),
}
CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}


def pcm16(pcm_T: np.ndarray) -> bytes:
    """Return samples as 16-bit little-endian bytes, rounded as libsndfile rounds them."""
    return np.rint(np.clip(pcm_T, -1.0, 1.0) * PCM16_MAX).astype("<i2").tobytes()


def wav_header(rate: int) -> bytes:
    """Return the head of a wav file of unknown length: 16 bits, mono."""
    unknown = b"\xff\xff\xff\xff"
    numbers = b"".join(
        value.to_bytes(size, "little")
        for value, size in ((16, 4), (1, 2), (1, 2), (rate, 4), (2 * rate, 4), (2, 2), (16, 2))
    )
    return b"RIFF" + unknown + b"WAVEfmt " + numbers + b"data" + unknown


class SoundEncoder:
    """Turn samples into the bytes of a file of one format, piece by piece.

    Args:
      format: one of `CONTENT_TYPES`.
      rate: of the samples, Hz.

    Attributes:
      is_slow: whether encoding takes so long that it should not be done on an event loop.
    """

    def __init__(self, format: str, rate: int):
        self._sound: soundfile.SoundFile | None = None
        self._pipe: Any = _Pipe()
        self._lock = threading.Lock()  # a session may be ended while another thread still encodes its last samples
        self.is_slow = format in _FORMATS
        if self.is_slow:
            kind, subtype, level, mode = _FORMATS[format]
            self._sound = soundfile.SoundFile(
                self._pipe, "w", rate, 1, format=kind, subtype=subtype, compression_level=level, bitrate_mode=mode
            )
        elif format == "wav":
            self._pipe.write(wav_header(rate))

    def encode(self, pcm_T: np.ndarray) -> bytes:
        """Return the bytes that are complete with these samples; none where the format waits for more."""
        with self._lock:
            if self._sound is None:
                self._pipe.write(pcm16(pcm_T))
            elif not self._sound.closed:
                self._sound.write(np.clip(pcm_T, -1.0, 1.0))
            return self._pipe.take()

    def finish(self) -> bytes:
        """Return the last bytes; it may be called again, and returns none then."""
        with self._lock:
            if self._sound is not None:
                self._sound.close()
            return self._pipe.take()


class _Pipe:
    """A file of which what was appended is taken away; what libsndfile rewrites at the end has left already."""

    def __init__(self) -> None:
        self._taken = bytearray()
        self._position = self._end = 0

    def write(self, data: bytes) -> int:
        """Append bytes; drop bytes that are written over earlier ones."""
        if self._position == self._end:
            self._taken += data
            self._end += len(data)
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position."""
        self._position = (0, self._position, self._end)[whence] + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return nothing: what was written has left."""
        return b""

    def take(self) -> bytes:
        """Return what was appended since the last call."""
        taken, self._taken = bytes(self._taken), bytearray()
        return taken
